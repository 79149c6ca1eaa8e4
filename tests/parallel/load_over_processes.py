"""Run by `test_hosts` in each of two processes that JAX joins: loads a checkpoint onto meshes of both, and measures.

Arguments: a small checkpoint, the one to be measured, folder for results. Each process writes `INDEX.json`, per mesh:
bytes of the model, of what this process holds and of its largest tensor; the peak and the end of its resident memory;
bytes of the slices it read, and bytes that came from the disk, the file not being in memory before.
"""

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from lvlm_jax import models, parallel, weights
from lvlm_jax.weights import plan

MESHES = {"one device": None, "fsdp": (1, 2, 1), "tensor": (1, 1, 2)}


def number(file: str, field: str) -> int:
    line = next(line for line in Path("/proc/self", file).read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * (1024 if file == "status" else 1)


class Recorder(np.ndarray):
    """A view of a file that notes how much of it is asked for."""

    read = 0

    def __getitem__(self, index):
        piece = super().__getitem__(index)
        Recorder.read += piece.nbytes
        return piece


def forget(folder: str) -> None:
    """Has the system drop a checkpoint's files from its memory."""
    for path in Path(folder).glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measured(small: str, large: str, sizes: tuple | None) -> dict:
    place = parallel.parameter_sharding(parallel.make_mesh(*sizes)) if sizes else None

    def load(folder: str) -> dict:
        return weights.load_parameters(folder, models.config_from_hf(weights.read_config(folder)), "float32", place)

    load(small)  # everything that is imported or compiled once
    forget(large)
    Recorder.read = 0
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the load before has freed goes back to the system
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    resident, disk = number("status", "VmRSS"), number("io", "read_bytes")
    leaves = jax.tree.leaves(load(large))
    return {
        "model": sum(leaf.nbytes for leaf in leaves),
        "held": sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards),
        "largest": max(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards),
        "peak": number("status", "VmHWM") - resident,
        "resident": number("status", "VmRSS") - resident,
        "slices": Recorder.read,
        "disk": number("io", "read_bytes") - disk,
    }


def main(small: str, large: str, results: str) -> None:
    assert parallel.start()
    view = plan.Source.view
    plan.Source.view = lambda source: view(source).view(Recorder)
    found: dict[str, dict] = {}
    for name, sizes in MESHES.items():
        for turn in range(jax.process_count()):  # one after the other, as on hosts of their own
            if turn == jax.process_index():
                found[name] = measured(small, large, sizes)
            multihost_utils.sync_global_devices(f"{name} {turn}")
    Path(results, f"{jax.process_index()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
