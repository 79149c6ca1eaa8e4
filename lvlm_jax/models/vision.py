"""Functions that vision towers share: attention over patches, patches from pixels, and runs over a few images at a
time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lvlm_jax.attention.lazy_mask import LazyMask
from lvlm_jax.attention.stream import streaming_attention

PROJECTIONS = ("q_proj", "k_proj", "q_norm", "k_norm")  # names of the modules that make queries and keys in towers
STREAM_FROM = 1024  # from this many patches of an image on, attention runs block by block
CHUNK = 2**13  # patches (of all images) that go through a tower at a time


def patch_attention(
    query: Float[Array, "I P H D"],
    key: Float[Array, "I Q H D"],
    value: Float[Array, "I Q H D"],
    mask: Bool[Array, "#I #P Q"] | None = None,
    bias: Float[Array, "#I #H P Q"] | None = None,
) -> Float[Array, "I P H D"]:
    """Bidirectional attention inside each row; `mask` says which patches are visible, `bias` is added to the logits."""
    dtype = query.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    # Written out, because jax.nn.dot_product_attention does not support float16 on CPUs.
    product = partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    logits = product("IPHD,IQHD->IHPQ", query, key) * query.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(dtype)
    return product("IHPQ,IQHD->IPHD", weights, value).astype(dtype)


def picture_attention(
    query: Float[Array, "R P H D"],
    key: Float[Array, "R P H D"],
    value: Float[Array, "R P H D"],
    valid: Bool[Array, "R P"] | None = None,
) -> Float[Array, "R P H D"]:
    """Each patch attends to its whole image; `valid` marks the visible patches, None for all."""
    rows, patches = query.shape[:2]
    if patches < STREAM_FROM:
        return patch_attention(query, key, value, None if valid is None else valid[:, None])
    heads = (array.swapaxes(1, 2) for array in (query, key, value))
    visible = jnp.ones((rows, patches), bool) if valid is None else valid
    return streaming_attention(*heads, LazyMask.everywhere(patches, visible)).swapaxes(1, 2)


def by_pictures(
    model: nn.Module, look: Callable[..., Any], pixels: Float[Array, "R ..."], patches: int, *more: Array
) -> Any:
    """`look(model, pixels, *more)` for all images, a few at a time, to save memory.

    Args:
        look: a function of images that returns arrays with an entry for each.
        patches: number of patches of an image.
        more: further arrays with an entry for each image.
    """
    rows = pixels.shape[0]
    # A power of two divides well among devices.
    fitting = [count for count in range(1, rows + 1) if rows % count == 0 and count * patches <= max(patches, CHUNK)]
    few = rows if rows in fitting else max(fitting, key=lambda count: (count & -count, count))
    if few == rows:
        return look(model, pixels, *more)
    # Neighbours are in different parts, so that each device of a mesh has some images of every part.
    parts = tuple(array.reshape(few, rows // few, *array.shape[1:]) for array in (pixels, *more))
    outputs = in_turn(model, look, parts)
    return jax.tree.map(lambda array: array.reshape(rows, *array.shape[2:]), outputs)


def in_turn(module: nn.Module, call: Callable[..., Any], parts: tuple[Array, ...]) -> Any:
    """`call(module, *part)` for each of the N entries along the second axis of `parts`, one after the other."""

    def one(module: nn.Module, carry: tuple, index: Array) -> tuple:
        # The parts are not inputs of the scan, because it would copy them with the second axis in front.
        part = (jax.lax.dynamic_index_in_dim(array, index, axis=1, keepdims=False) for array in parts)
        return carry, call(module, *part)

    scan = nn.scan(
        one, variable_broadcast="params", split_rngs={"params": False, "dropout": True}, in_axes=0, out_axes=1
    )
    return scan(module, (), jnp.arange(parts[0].shape[1]))[1]


def class_attention(encode: Callable[[], Any], layer: int) -> Float[Array, "R P"]:
    """The attention that a tower's class token pays to each patch in a layer, as one head over all channels.

    Args:
        encode: runs the tower.
        layer: index from 0.
    """
    projections = {}

    def note(function: Callable, arguments: tuple, options: dict, context: nn.module.InterceptorContext) -> Any:
        result = function(*arguments, **options)
        name = context.module.name
        if context.method_name == "__call__" and name in PROJECTIONS and f"layers_{layer}" in context.module.path:
            projections[name[0]] = result  # norms, if there are any, come later and replace this
        return result

    with nn.intercept_methods(note):
        encode()
    query, key = projections["q"][:, 0], projections["k"]
    precision = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
    logits = jnp.einsum("RC,RPC->RP", query, key, precision=precision, preferred_element_type=jnp.float32)
    return jax.nn.softmax(logits * query.shape[-1] ** -0.5, axis=-1)[:, 1:]


def with_edited_outputs(encode: Callable[[], Any], name: str, edit: Callable[[int, jax.Array], jax.Array]) -> Any:
    """The result of `encode` if modules in a tower's layers return `edit(layer, output)` instead of their output.

    Args:
        encode: runs the tower.
        name: name of the modules: "v_proj" for values `[R, P, C]`; "mlp" for outputs of feed-forward blocks `[R, P,
            W]`, where a call may have only some of the patches.
        edit: gets the layer and the output.
    """
    inside: list[tuple] = []  # a projection calls its base class, which is intercepted too

    def change(function: Callable, arguments: tuple, options: dict, context: nn.module.InterceptorContext) -> Any:
        path = context.module.path
        matches = context.method_name == "__call__" and path[-1:] == (name,) and "vision_tower" in path
        if not matches or path in inside:
            return function(*arguments, **options)
        inside.append(path)
        result = function(*arguments, **options)
        inside.remove(path)
        return edit(_layer(path), result)

    with nn.intercept_methods(change):
        return encode()


def layer_outputs(encode: Callable[[], Any]) -> list[Float[Array, "R P W"]]:
    """The outputs of a tower's layers.

    Args:
        encode: runs the tower in one piece, on so few images that `by_pictures` does not divide them.
    """
    outputs: dict[int, Array] = {}

    def note(function: Callable, arguments: tuple, options: dict, context: nn.module.InterceptorContext) -> Any:
        result, path = function(*arguments, **options), context.module.path
        if context.method_name == "__call__" and "vision_tower" in path and path[-1].startswith("layers_"):
            outputs[_layer(path)] = result
        return result

    with nn.intercept_methods(note):
        encode()
    return [outputs[layer] for layer in sorted(outputs)]


def _layer(path: tuple[str, ...]) -> int:
    """The layer of a tower that a module belongs to."""
    (layer,) = (int(name.removeprefix("layers_")) for name in path if name.startswith("layers_"))
    return layer


def patch_convolution(
    pixels: Float[Array, "I 3 Y X"], width: int, patch: int, dtype: jnp.dtype, name: str, use_bias: bool
) -> Float[Array, "I P W"]:
    """Projects non-overlapping patches to `width` channels, row by row; called inside a compact module."""
    patches = nn.Conv(
        width,
        kernel_size=(patch, patch),
        strides=patch,
        padding="VALID",
        use_bias=use_bias,
        dtype=dtype,
        precision=jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None,
        name=name,
    )(pixels.transpose(0, 2, 3, 1))
    return patches.reshape(pixels.shape[0], -1, width)
