"""The compilers of TPUs and GPUs, used without such devices: their programs are those that a device would run.

They come with `pip install libtpu` (0.5 GB) and `pip install "jax-cuda13-plugin[with-cuda]"` (3.9 GB). Both are
optional. They compile for a TPU v5e or an H200; other TPUs and GPUs run similar programs.
"""

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from importlib import metadata, resources
from typing import Any

import jax
from jax.experimental import topologies

from lvlm_jax.compilation import GPU_OPTIONS
from lvlm_jax.errors import LVLMError

NAMES = ("tpu", "cuda")
HERE, STAND_IN = "cpu", "none"  # XLA's CPU compiler: for this CPU, or as a stand-in for an accelerator's compiler
TARGETS = (*NAMES, HERE, STAND_IN)
AUTO = "auto"
_TPU_HOST = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    # Without this, a second process would fail on a lock file.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
GPUS = 8  # in a machine


def installed() -> tuple[str, ...]:
    """The compilers in `NAMES` that are installed."""
    there = {
        "tpu": importlib.util.find_spec("libtpu") is not None,
        "cuda": any(importlib.util.find_spec(plugin) is not None for plugin in _PLUGINS),
    }
    return tuple(name for name in NAMES if there[name])


def chosen(name: str, kinds: Sequence[str | None]) -> str:
    """The target of a plan for devices of these kinds.

    Args:
        name: one of `NAMES`; `STAND_IN`; `AUTO` for the compiler of these devices if it is installed, else the
            stand-in.
        kinds: for each device one of `NAMES`, or None if any compiler will do.

    Raises:
        LVLMError: the named compiler is not installed, or compiles for devices of another kind.
    """
    known = {kind for kind in kinds if kind is not None}
    if name == AUTO:
        return known.pop() if len(known) == 1 and known <= set(installed()) else STAND_IN
    if name != STAND_IN:
        _needed(name)
        if others := known - {name}:
            raise LVLMError(
                f"the compiler {name!r} does not compile for a device of kind {others.pop()}; name devices of kind "
                f"{name}, or give --compiler {STAND_IN}"
            )
    return name


def label(target: str) -> str:
    """The compiler from which a plan's figures come, in words."""
    if target == "tpu":
        return f"the compiler of a TPU v5e (libtpu {metadata.version('libtpu')})"
    if target == "cuda":
        plugin = next(name for name in _PLUGINS if importlib.util.find_spec(name) is not None).replace("_", "-")
        return f"the compiler of an H200 ({plugin} {metadata.version(plugin)})"
    own = f"the compiler of CPUs (jaxlib {metadata.version('jaxlib')})"
    return own if target == HERE else f"{own} as a stand-in for an accelerator's"


def absent_devices(name: str, count: int = 8) -> list[jax.Device]:
    """Devices to compile for without having them: those of one v5e slice, or of machines with eight H200s each.

    Raises:
        LVLMError: the compiler is not installed, or knows no group of this number of devices.
    """
    _needed(name)
    try:
        return _absent_devices(name, count)[:count]
    except jax.errors.JaxRuntimeError as error:
        raise LVLMError(
            f"the compiler {name!r} knows no group of {count} devices; give fewer, or --compiler {STAND_IN}"
        ) from error


def _absent_devices(name: str, count: int) -> list[jax.Device]:
    if name == "tpu":
        import libtpu

        for variable, value in (_TPU_HOST | {"TPU_LIBRARY_PATH": libtpu.get_library_path()}).items():
            os.environ.setdefault(variable, value)
        side = 1 << max(3, math.ceil(math.log2(count)))  # chips of a slice: 2 x 4, 4 x 4, 4 x 8, ...
        short = 1 << (int(math.log2(side)) // 2)
        return list(topologies.get_topology_desc(platform="tpu", topology_name=f"v5e:{short}x{side // short}").devices)
    described = resources.files("lvlm_jax.planning").joinpath("h200.txtpb").read_text()
    group = f"1 x {-(-count // GPUS)} x {GPUS}"
    there = topologies.get_topology_desc("h200", platform="cuda", target_config=described, topology=group)
    return list(there.devices)


def _needed(name: str) -> None:
    if name not in installed():
        needs = {"tpu": "libtpu", "cuda": "jax-cuda13-plugin[with-cuda]"}
        raise LVLMError(
            f"the compiler {name!r} is not installed; pip install {needs.get(name, 'one of libtpu, jax-cuda13-plugin')}"
        )


def options(target: str) -> Mapping[str, Any]:
    """Options for `Lowered.compile`; they turn off the tuning of tiles, which needs a device."""
    without_device = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    return without_device | GPU_OPTIONS if target == "cuda" else {}
