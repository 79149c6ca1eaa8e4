"""Memory and peak speed of devices, the ceilings in a plan."""

import dataclasses
import os
import statistics
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lvlm_jax.errors import LVLMError
from lvlm_jax.parallel.peaks import peak_flops

GIB = 2**30
USABLE = 0.92  # share of a device's memory that arrays can use, besides runtime and fragmentation


@dataclasses.dataclass(frozen=True)
class Device:
    """One device of a group of equal devices.

    Attributes:
        memory: bytes.
        bandwidth: bytes per second between memory and arithmetic.
        flops: by dtype, FLOP/s of dense products; float32 means products that are exact to float32.
        link: bytes per second that one device receives from its neighbours.
        beside: how many devices the links connect, itself included.
        network: bytes per second that one device receives from all others.
        kind: the name of the compiler for it, one of `compilers.NAMES`; None if that is not known.
    """

    name: str
    memory: float
    bandwidth: float
    flops: Mapping[str, float]
    link: float
    beside: int
    network: float
    kind: str | None = None

    def holds(self, size: float) -> bool:
        """Whether `size` bytes fit."""
        return size <= USABLE * self.memory

    def seconds(self, moved: float, flops: float, dtype: str, received: Mapping[int, float]) -> float:
        """The roofline time: the slower of memory and arithmetic, plus communication.

        Args:
            moved: bytes to and from the device's memory.
            flops: FLOPs of products, in `dtype`.
            received: bytes from other devices, by the size of the block of devices that exchange them.
        """
        own = max(moved / self.bandwidth, flops / self.flops[dtype])
        return own + sum(
            size / (self.link if reach <= self.beside else self.network) for reach, size in received.items()
        )


def _known(
    name: str, kind: str, gib: float, gb: float, single: float | None, link: float, beside: int, network: float
) -> Device:
    """A device with a peak in `peaks`, by its `kind`.

    Exact float32 products take six passes of bfloat16 on TPUs (JAX's precision HIGHEST), for which `single` is None.
    """
    half, is_tpu = peak_flops(kind) / 1e12, kind.startswith("TPU")
    device = _device(name, gib, gb, half, half / 6 if single is None else single, link, beside, network)
    return dataclasses.replace(device, kind="tpu" if is_tpu else "cuda")


def _device(
    name: str, gib: float, gb: float, half: float, single: float, link: float, beside: int, network: float
) -> Device:
    """Makes a device from GiB, GB/s, TFLOP/s of 16-bit and 32-bit products, GB/s of links and network."""
    flops = {"bfloat16": half * 1e12, "float16": half * 1e12, "float32": single * 1e12}
    return Device(name, gib * GIB, gb * 1e9, flops, link * 1e9, beside, network * 1e9)


# GPUs: memory as `nvidia-smi` shows it; bandwidth, float32 peak and NVLink (half of "bidirectional") of the SXM boards
# from NVIDIA's data sheets ("NVIDIA A100 Tensor Core GPU", "H100 Tensor Core GPU", "H200 Tensor Core GPU", "L4 Tensor
# Core GPU"); nodes of eight; networks as in DGX A100 (200 Gb/s a GPU), DGX H100 and H200 (400 Gb/s a GPU); L4 over PCIe
# 4.0 x16, and 100 Gb/s for eight of them (Google Cloud's g2-standard-96).
# TPUs: per chip, docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}: memory, bandwidth, inter-chip interconnect (half of
# "bidirectional"), chips of a pod. Between pods: the network of a pod, or of a host, over its chips; for v4 and v5p as
# in "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus).
DEVICES: tuple[Device, ...] = (
    _known("l4", "L4", 22.5, 300, 30.3, 32, 8, 1.56),
    _known("a100-40", "A100", 40, 1555, 19.5, 300, 8, 25),
    _known("a100-80", "A100", 80, 2039, 19.5, 300, 8, 25),
    _known("h100", "H100", 79.6, 3350, 67, 450, 8, 50),
    _known("h200", "H200", 140.4, 4800, 67, 450, 8, 50),
    _known("tpu-v5e", "TPU v5e", 16, 819, None, 200, 256, 3.1),
    _known("tpu-v4", "TPU v4", 32, 1228, None, 300, 4096, 6.2),
    _known("tpu-v6e", "TPU v6e", 32, 1638, None, 400, 256, 12.5),
    _known("tpu-v5p", "TPU v5p", 95, 2765, None, 600, 8960, 6.2),
)
CPU = "cpu"


def find(words: str, count: int = 1) -> Device:
    """A device by name; "cpu" is this machine, measured and shared by `count` simulated devices.

    A device outside the table is "name=GiB,GB/s,TFLOP/s", optionally with ",GB/s" of links.

    Raises:
        LVLMError: an unknown name, or malformed figures.
    """
    name, equals, figures = words.partition("=")
    if equals:
        return _from_figures(name, figures, words)
    if name.lower() == CPU:
        return this_cpu(count)
    match = next((device for device in DEVICES if device.name == name.lower()), None)
    if match is None:
        names = ", ".join(device.name for device in DEVICES)
        raise LVLMError(
            f"device {words!r} is not known; expected one of {names}, {CPU} for this machine, or your own as "
            "NAME=GiB,GB/s,TFLOP/s such as b200=180,8000,2250"
        )
    return match


def _from_figures(name: str, figures: str, words: str) -> Device:
    try:
        values = [float(figure) for figure in figures.split(",")]
    except ValueError:
        values = []
    if len(values) not in (3, 4) or not all(0 < value < float("inf") for value in values):
        raise LVLMError(
            f"device {words!r} is malformed; expected NAME=GiB,GB/s,TFLOP/s, and maybe the GB/s of its links, such as "
            "b200=180,8000,2250,900"
        )
    gib, gb, peak, *link = values
    return _device(name, gib, gb, peak, peak, (link or [gb])[0], 1 << 30, gb)


def this_cpu(count: int = 1) -> Device:
    """This machine's memory and its measured speed, divided by `count` devices."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    array, matrix = jnp.ones((2**26,), jnp.float32), jnp.ones((1536, 1536), jnp.float32)
    bandwidth = array.nbytes / _seconds(jax.jit(jnp.sum), array)
    peak = 2 * 1536**3 / _seconds(jax.jit(lambda x: jnp.dot(x, x, precision="highest")), matrix)
    # 16-bit products run on float32 operands.
    flops = dict.fromkeys(("bfloat16", "float16", "float32"), peak / count)
    share = bandwidth / count
    return Device(CPU, memory / count, share, flops, share, 1 << 30, share)


def _seconds(call, argument: jax.Array) -> float:
    """The median time of five calls, after one that compiles."""
    times = []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(call(argument))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
