"""Kernels that take the place of `stream`'s loops where they can: cuDNN's on NVIDIA GPUs, splash attention on TPUs.

Both are for 16 bits, and for rows that are the columns: a prompt or a training sequence. What is left to the loops:
float32, which kernels round; rows behind a prefix; image tokens that see later ones.
"""

import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from lvlm_jax.attention.sight import Sight

HALVES = (jnp.bfloat16, jnp.float16)
OLDEST_GPU = 8.0  # compute capability that cuDNN's kernel needs
SPLASH_BLOCK = 512
Kernel = Callable[[jax.Array, jax.Array, jax.Array, Sight], jax.Array]


def fitting(query: Float[Array, "B H T D"], key: Float[Array, "B K S D"], sight: Sight) -> dict[str, Kernel]:
    """The kernels that compute `stream.streamed` of such operands, by platform."""
    found: dict[str, Kernel] = {}
    if query.shape[2] != key.shape[2] or sight.run is not None:
        return found
    if query.dtype in HALVES and _cudnn_takes(query.shape, key.shape, query.dtype):
        found["cuda"] = cudnn
    if query.dtype == jnp.bfloat16 and compiles_for_tpus() and _one_device_or_mesh():
        found["tpu"] = splash
    return found


def cudnn(
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K T D"],
    value: Float[Array, "B K T D"],
    sight: Sight,
    implementation: str = "cudnn",
) -> Float[Array, "B H T D"]:
    """cuDNN's attention. It knows padding behind a sequence only, so that each sample is moved to the first column."""
    lengths = sight.valid.sum(axis=1, dtype=jnp.int32)
    start = jnp.argmax(sight.valid, axis=1)

    def moved(array: Float[Array, "B H T D"], by: jax.Array) -> Float[Array, "B H T D"]:
        if not sight.causal:  # a picture's filler is behind it
            return array
        return jax.vmap(functools.partial(jnp.roll, axis=1))(array, by)

    mixed = jax.nn.dot_product_attention(
        *(moved(array, -start).swapaxes(1, 2) for array in (query, key, value)),
        is_causal=sight.causal,
        query_seq_lengths=jnp.maximum(lengths, 1),
        key_value_seq_lengths=jnp.maximum(lengths, 1),
        local_window_size=None if sight.window is None else (sight.window - 1, 0),
        implementation=implementation,
    )
    # Nothing is promised about rows of padding, and what is not finite there would spoil every row that weighs it 0.
    return jnp.where(sight.valid[:, None, :, None], moved(mixed.swapaxes(1, 2), start), 0)


@functools.cache
def _cudnn_takes(query: tuple[int, ...], key: tuple[int, ...], dtype: np.dtype) -> bool:
    """Whether the jax that is installed has cuDNN, and cuDNN such shapes."""
    devices = [device for device in jax.devices() if device.platform == "gpu"]
    if any(float(getattr(device, "compute_capability", OLDEST_GPU)) < OLDEST_GPU for device in devices):
        return False

    def operand(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        batch, heads, rows, size = shape
        return jax.ShapeDtypeStruct((batch, rows, heads, size), dtype)

    attention = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    try:
        jax.eval_shape(attention, operand(query), operand(key), operand(key))
    except (RuntimeError, NotImplementedError, ValueError):  # what jax says of no cuDNN, and of heads that it lacks
        return False
    return True


def splash(
    query: Float[Array, "B H T D"],
    key: Float[Array, "B K T D"],
    value: Float[Array, "B K T D"],
    sight: Sight,
    interpret: bool = False,
) -> Float[Array, "B H T D"]:
    """Splash attention, on the devices of the mesh in which the program is traced, if it is in any."""
    kernel = functools.partial(_splash, sight.window, sight.causal, interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        batch, heads = _axes(mesh, query.shape[0], ("data", "fsdp")), _axes(mesh, key.shape[1], ("tensor",))
        spec = PartitionSpec(batch, heads)
        specs = (spec, spec, spec, PartitionSpec(batch))
        kernel = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
    return kernel(query, key, value, sight.valid)


def _splash(window: int | None, causal: bool, interpret: bool, query, key, value, valid) -> Float[Array, "B H T D"]:
    # Half a second of imports, for TPUs alone.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    rows = query.shape[2]
    block = min(SPLASH_BLOCK, -(-rows // 128) * 128)
    more = -rows % block
    query, key, value = (jnp.pad(array, ((0, 0), (0, 0), (0, more), (0, 0))) for array in (query, key, value))
    segments = jnp.pad(valid, ((0, 0), (0, more))).astype(jnp.int32)  # padding sees padding alone
    shape = (rows + more, rows + more)
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
    """Whether this Python has the compiler of TPUs; elsewhere their kernel would be traced for nothing."""
    return importlib.util.find_spec("libtpu") is not None


def _one_device_or_mesh() -> bool:
    """Mosaic kernels are not split by the compiler: with several devices the mesh must be known (`jax.set_mesh`)."""
    return jax.device_count() == 1 or jax.sharding.get_abstract_mesh().size > 1


def _axes(mesh: jax.sharding.AbstractMesh, size: int, names: tuple[str, ...]) -> tuple[str, ...] | None:
    """Those of a mesh's axes that divide a size, all or none."""
    known = tuple(name for name in names if name in mesh.shape)
    ways = int(np.prod([mesh.shape[name] for name in known]))
    return known if known and size % ways == 0 else None
