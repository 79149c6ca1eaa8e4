"""Run by `test_hosts` in each of two processes that JAX joins: loads a checkpoint onto meshes of both, and measures.

Arguments: a small checkpoint, the one to be measured, folder for results. Each process writes `INDEX.json`, per mesh:
bytes of the model, of what this process holds and of its largest tensor; the peak and the end of its resident memory;
bytes of the slices it read, and bytes that came from the disk, the file not being in memory before.
"""

import json
import os
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from lvlm_jax import models, parallel, weights
from lvlm_jax.weights import plan
from tests.planning.resident_growth import begin_anew, number

MESHES = {"one device": None, "fsdp": (1, 2, 1), "tensor": (1, 1, 2)}


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
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measured(small: str, large: str, sizes: tuple | None) -> dict:
    place = parallel.parameter_sharding(parallel.make_mesh(*sizes)) if sizes else None

    def load(folder: str) -> dict:
        return weights.load_parameters(folder, models.config_from_hf(weights.read_config(folder)), "float32", place)

    load(small)  # everything that is imported or compiled once
    forget(large)
    Recorder.read = 0
    resident, disk = begin_anew(), number("io", "read_bytes")
    leaves = jax.tree.leaves(load(large))
    held = [shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards]
    found = {"model": sum(leaf.nbytes for leaf in leaves), "held": sum(held), "largest": max(held)}
    found |= {"peak": number("status", "VmHWM") - resident, "resident": number("status", "VmRSS") - resident}
    return found | {"slices": Recorder.read, "disk": number("io", "read_bytes") - disk}


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
