"""Kernels that replace the loops of `stream`: cuDNN's on NVIDIA GPUs, splash attention on TPUs.

Both take 16-bit operands whose rows and columns are the same tokens: a prompt or a training sequence. The loops compute
all other cases: float32, which the kernels would round; rows after a prefix; image tokens that see later ones.
"""

import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lvlm_jax.attention.lazy_mask import LazyMask

HALVES = (jnp.bfloat16, jnp.float16)
OLDEST_GPU = 8.0  # compute capability that cuDNN's kernel needs
SPLASH_BLOCK = 512
Kernel = Callable[[jax.Array, jax.Array, jax.Array, LazyMask], jax.Array]


def usable(query: Float[Array, "B H T D"], key: Float[Array, "B K S D"], lazy_mask: LazyMask) -> dict[str, Kernel]:
    """The kernels that can compute `streaming_attention` of these operands, by platform."""
    kernels: dict[str, Kernel] = {}
    further = (lazy_mask.run, lazy_mask.answer, lazy_mask.picture, lazy_mask.group)
    if query.shape[2] != key.shape[2] or any(array is not None for array in further):
        return kernels
    if query.dtype in HALVES and _cudnn_supports(query.shape, key.shape, query.dtype):
        kernels["cuda"] = cudnn
    if query.dtype == jnp.bfloat16 and compiles_for_tpus() and _one_device_or_mesh():
        kernels["tpu"] = splash
    return kernels


def cudnn(
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K T D"],
    value: Float[Array, "B K T D"],
    lazy_mask: LazyMask,
    implementation: str = "cudnn",
) -> Float[Array, "B H T D"]:
    """cuDNN's attention. It allows padding only after a sequence, so each sample is moved to the first column."""
    lengths = lazy_mask.valid.sum(axis=1, dtype=jnp.int32)
    start = jnp.argmax(lazy_mask.valid, axis=1)

    def shift(array: Float[Array, "B H T D"], by: jax.Array) -> Float[Array, "B H T D"]:
        if not lazy_mask.causal:  # the filler of an image comes after its patches
            return array
        return jax.vmap(functools.partial(jnp.roll, axis=1))(array, by)

    mixed = jax.nn.dot_product_attention(
        *(shift(array, -start).swapaxes(1, 2) for array in (query, key, value)),
        is_causal=lazy_mask.causal,
        query_seq_lengths=jnp.maximum(lengths, 1),
        key_value_seq_lengths=jnp.maximum(lengths, 1),
        local_window_size=None if lazy_mask.window is None else (lazy_mask.window - 1, 0),
        implementation=implementation,
    )
    # Padding rows may come back non-finite, which would spoil every row that gives them weight 0.
    return jnp.where(lazy_mask.valid[:, None, :, None], shift(mixed.swapaxes(1, 2), start), 0)


@functools.cache
def _cudnn_supports(query: tuple[int, ...], key: tuple[int, ...], dtype: np.dtype) -> bool:
    """Whether the installed jax has cuDNN, and cuDNN supports these shapes."""
    devices = [device for device in jax.devices() if device.platform == "gpu"]
    if any(float(getattr(device, "compute_capability", OLDEST_GPU)) < OLDEST_GPU for device in devices):
        return False

    def operand(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        batch, heads, rows, size = shape
        return jax.ShapeDtypeStruct((batch, rows, heads, size), dtype)

    attention = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    try:
        jax.eval_shape(attention, operand(query), operand(key), operand(key))
    except (RuntimeError, NotImplementedError, ValueError):  # raised if cuDNN is missing or does not support the heads
        return False
    return True


def splash(
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K T D"],
    value: Float[Array, "B K T D"],
    lazy_mask: LazyMask,
    interpret: bool = False,
) -> Float[Array, "B H T D"]:
    """Splash attention, on the devices of the mesh in which the program is traced, if there is one."""
    kernel = functools.partial(_splash, lazy_mask.window, lazy_mask.causal, interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        batch, heads = _axes(mesh, query.shape[0], ("data", "fsdp")), _axes(mesh, key.shape[1], ("tensor",))
        spec = PartitionSpec(batch, heads)
        specs = (spec, spec, spec, PartitionSpec(batch))
        kernel = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return kernel(query, key, value, lazy_mask.valid)


def _splash(window: int | None, causal: bool, interpret: bool, query, key, value, valid) -> Float[Array, "B H T D"]:
    # This import takes half a second and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    rows = query.shape[2]
    block = min(SPLASH_BLOCK, -(-rows // 128) * 128)
    padding = -rows % block
    query, key, value = (jnp.pad(array, ((0, 0), (0, 0), (0, padding), (0, 0))) for array in (query, key, value))
    segments = jnp.pad(valid, ((0, 0), (0, padding))).astype(jnp.int32)  # padding sees only padding
    shape = (rows + padding, rows + padding)
    mask = splash_attention_mask.CausalMask(shape) if causal else splash_attention_mask.FullMask(shape)
    if window is not None:
        mask = mask & splash_attention_mask.LocalMask(shape, (window - 1, 0), 0)
    sizes = splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    attention = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * query.shape[1]),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    scaled = (query * query.shape[-1] ** -0.5).astype(query.dtype)
    mixed = jax.vmap(attention)(scaled, key, value, splash_attention_kernel.SegmentIds(segments, segments))
    return mixed[:, :, :rows].astype(query.dtype)


@functools.cache
def compiles_for_tpus() -> bool:
    """Whether this Python has the TPU compiler; without it, tracing the TPU kernel would be wasted."""
    return importlib.util.find_spec("libtpu") is not None


def _one_device_or_mesh() -> bool:
    """Whether a Mosaic kernel can run: the compiler does not partition it, so several devices need a known mesh
    (`jax.set_mesh`)."""
    return jax.device_count() == 1 or jax.sharding.get_abstract_mesh().size > 1


def _axes(mesh: jax.sharding.AbstractMesh, size: int, names: tuple[str, ...]) -> tuple[str, ...] | None:
    """The mesh axes in `names`, if together they divide `size`; otherwise None."""
    axes = tuple(name for name in names if name in mesh.shape)
    shards = int(np.prod([mesh.shape[name] for name in axes]))
    return axes if axes and size % shards == 0 else None
