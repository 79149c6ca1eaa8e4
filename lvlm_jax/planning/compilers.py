"""The compilers of TPUs and GPUs for devices that are absent: their results are those of real devices.

They come with `pip install libtpu` (0.5 GB) and `pip install "jax-cuda13-plugin[with-cuda]"` (3.9 GB), and are
optional.
"""

import importlib.util
import os
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jax
from jax.experimental import topologies

from lvlm_jax.errors import LVLMError

NAMES = ("tpu", "cuda")  # one v5e host of eight chips; H200s in one machine
_TPU_HOST = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    # Without this, a second process would fail on a lock file.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
GPUS = 8


def installed() -> tuple[str, ...]:
    """The compilers in `NAMES` that are installed."""
    installed_names = {
        "tpu": importlib.util.find_spec("libtpu") is not None,
        "cuda": any(importlib.util.find_spec(plugin) is not None for plugin in _PLUGINS),
    }
    return tuple(name for name in NAMES if installed_names[name])


def absent_devices(name: str) -> list[jax.Device]:
    """Eight absent devices to compile for.

    Raises:
        LVLMError: the compiler is not installed.
    """
    if name not in installed():
        needs = {"tpu": "libtpu", "cuda": "jax-cuda13-plugin[with-cuda]"}
        raise LVLMError(
            f"the compiler {name!r} is not installed; pip install {needs.get(name, 'one of libtpu, jax-cuda13-plugin')}"
        )
    if name == "tpu":
        import libtpu

        for variable, value in (_TPU_HOST | {"TPU_LIBRARY_PATH": libtpu.get_library_path()}).items():
            os.environ.setdefault(variable, value)
        return list(topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices)
    described = resources.files("lvlm_jax.planning").joinpath("h200.txtpb").read_text()
    topology = topologies.get_topology_desc(
        "h200", platform="cuda", target_config=described, topology=f"1 x 1 x {GPUS}"
    )
    return list(topology.devices)


def options(name: str) -> Mapping[str, Any]:
    """Options for `Lowered.compile`: without a device, tiles cannot be tuned."""
    return {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False} if name == "cuda" else {}
