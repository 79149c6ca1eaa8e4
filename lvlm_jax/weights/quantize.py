"""Weight-only int8 for a parameter tree: the decoder's projections and its output layer; everything else stays float.

A quantized projection has `models.layers.INT8_LEAVES` instead of its kernel (`models.int8` explains and multiplies
them). Embeddings stay float, because a step reads only one row per token; so a tied output layer stays float too.
Norms, biases, towers and connectors are small or process an image once. Checkpoints are read in their float dtype and
quantized tensor by tensor (`weights.load_parameters`); a quantized tree cannot be saved as a checkpoint.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from lvlm_jax.errors import LVLMError, shown
from lvlm_jax.models import int8
from lvlm_jax.models.layers import INT8_LEAVES
from lvlm_jax.parallel.mesh import sharding_beside
from lvlm_jax.weights.tables import flatten, unflatten

QUANTS = ("int8",)

Place = Callable[[str, tuple[int, ...]], jax.sharding.Sharding | None]


def check_quant(quant: str | None) -> None:
    """Raises an LVLMError unless `quant` is one of QUANTS, or None for float kernels."""
    if quant is not None and not (isinstance(quant, str) and quant in QUANTS):
        raise LVLMError(f"quant {shown(quant)} is not supported; expected {' or '.join(QUANTS)}, or None for none")


def is_quantized(path: str) -> bool:
    """Whether quantization replaces the parameter of this path, such as "language_model/lm_head/kernel"."""
    return path.startswith("language_model/") and path.endswith("/kernel")


def leaf_paths(path: str) -> tuple[str, str]:
    """The paths of the integers and the scales of a kernel."""
    kernel, scale = (path.removesuffix("kernel") + name for name in INT8_LEAVES)
    return kernel, scale


def leaves(path: str, weight: jax.Array, place: Place) -> dict[str, jax.Array]:
    """The quantized leaves of a kernel, by path.

    Args:
        path: path of the kernel.
        weight: the kernel as [out, in], in any float dtype, on any devices.
        place: returns the sharding of a leaf, from its path and shape.
    """
    paths = leaf_paths(path)
    shardings = place(paths[0], weight.shape), place(paths[1], weight.shape[:1])
    return dict(zip(paths, jax.jit(int8.quantize, out_shardings=shardings)(weight), strict=True))


def quantize(params: Mapping) -> dict:
    """A tree with its decoder quantized, on the same devices; other leaves are shared with `params`.

    Both trees are in memory until the first is dropped. `jax.eval_shape` accepts this function too, for shapes alone.
    """
    flat = {}
    for path, leaf in flatten(params).items():
        if is_quantized(path):
            flat |= leaves(path, leaf.T, lambda *beside, kernel=leaf: sharding_beside(kernel, *beside))
        else:
            flat[path] = leaf
    return unflatten(flat)


def dequantize(params: Mapping, dtype=jnp.float32) -> dict:
    """A tree of float kernels that computes the same as a quantized one, for example to save it."""
    quantized, flat = flatten(params), {}
    for path, leaf in quantized.items():
        module, _, name = path.rpartition("/")
        if name == INT8_LEAVES[0]:
            kernel = int8.dequantize(leaf, quantized[f"{module}/{INT8_LEAVES[1]}"]).astype(dtype)
            flat[f"{module}/kernel"] = jax.device_put(kernel, sharding_beside(leaf, f"{module}/kernel", kernel.shape))
        elif name != INT8_LEAVES[1]:
            flat[path] = leaf
    return unflatten(flat)


def refuse_quantized(params: Mapping) -> None:
    """Raises an LVLMError if a tree that is to be saved as a checkpoint is quantized."""
    quantized = next((path for path in flatten(params) if path.endswith(INT8_LEAVES)), None)
    if quantized is not None:
        raise LVLMError(
            f"{quantized} is quantized, and checkpoints are saved as float; save the model loaded without quant, or "
            "what weights.quantize.dequantize makes of these parameters"
        )
