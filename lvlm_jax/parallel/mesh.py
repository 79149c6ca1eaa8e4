"""One mesh with the axes `data`, `fsdp` and `tensor`, and one table with the sharding of each parameter.

The table names each parameter's own axes, `[in, out]` for kernels; a second table maps these names to mesh axes. The
compiler derives the sharding of activations and caches. Low-rank factors of LoRA are split like their kernel, along the
axis they share with it. int8 kernels, which are `[out, in]`, and their scales are split like the kernel they represent.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lvlm_jax.errors import LVLMError, shown

AXES = ("data", "fsdp", "tensor")

# The first pattern that matches a parameter's path names its axes.
PARAMETER_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"embed_tokens/embedding$", ("vocabulary", "embed")),
    (r"lm_head/kernel$", ("embed", "vocabulary")),
    (r"/([qkv]|kv)_proj/kernel$", ("embed", "heads")),
    (r"/([qkv]|kv)_proj/bias$", ("heads",)),
    (r"/(o|out)_proj/kernel$", ("heads", "embed")),
    (r"/(gate_proj|up_proj|fc1|linear_1)/kernel$", ("embed", "hidden")),
    (r"/(gate_proj|up_proj|fc1|linear_1)/bias$", ("hidden",)),
    (r"/(down_proj|fc2|linear_2)/kernel$", ("hidden", "embed")),
    (r"(^connector|/proj|/projection)/kernel$", (None, "embed")),
)
MESH_AXES: dict[str, str] = {"vocabulary": "tensor", "heads": "tensor", "hidden": "tensor", "embed": "fsdp"}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = -1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over all devices; one axis may be -1 and takes the rest.

    Raises:
        LVLMError: sizes are not whole numbers, or their product is not the number of devices.
    """
    devices = list(devices or jax.devices())
    sizes = [data, fsdp, tensor]
    for axis, size in zip(AXES, sizes, strict=True):
        if isinstance(size, bool) or not isinstance(size, int | np.integer):
            raise LVLMError(f"the mesh's axis {axis} is {shown(size)}; expected a whole number, or -1 for the rest")
    if sizes.count(-1) == 1:
        rest = -math.prod(map(int, sizes))
        sizes[sizes.index(-1)] = len(devices) // rest if rest > 0 else 0
    if min(sizes) < 1 or math.prod(map(int, sizes)) != len(devices):
        sizes_text = f"data={shown(data)}, fsdp={shown(fsdp)}, tensor={shown(tensor)}"
        raise LVLMError(
            f"a mesh of {sizes_text} does not cover {len(devices)} devices; "
            "the sizes must multiply to their number (one may be -1)"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES)


def refuse_cut_heads(mesh: Mesh, heads: int, key_heads: int) -> None:
    """Checks that a mesh does not split attention heads: halves of heads would have to be combined in every layer.

    Raises:
        LVLMError: the tensor axis does not divide the number of heads or of key heads.
    """
    tensor, common = mesh.shape["tensor"], math.gcd(heads, key_heads)
    if common % tensor:
        fitting = [str(size) for size in range(1, common + 1) if common % size == 0]
        raise LVLMError(
            f"a mesh with tensor={tensor} cuts this model's {heads} attention heads and {key_heads} key heads; give "
            f"tensor as one of {', '.join(fitting)} and the other devices to data or fsdp"
        )


def mesh_for(heads: int, key_heads: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices with the largest tensor axis that the model's heads allow; the rest is for data."""
    devices = list(devices or jax.devices())
    return make_mesh(data=-1, tensor=math.gcd(heads, key_heads, len(devices)), devices=devices)


def ambient(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Context for tracing programs for several TPUs, whose kernels must know the mesh (`attention.kernels`)."""
    on_tpus = mesh is not None and mesh.devices.flat[0].platform == "tpu"
    return jax.set_mesh(mesh) if on_tpus else contextlib.nullcontext()


def parameter_sharding(mesh: Mesh) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """The sharding of a parameter: a function of its path, such as "language_model/norm/scale", and its shape.

    An axis that a mesh axis does not divide evenly is replicated instead.
    """

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        names = _axes(path, len(shape))
        split = [MESH_AXES.get(name) if name else None for name in names]
        even = [
            axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(split, shape, strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*even))

    return place


def placing(mesh: Any, heads: int, key_heads: int) -> Callable[[str, tuple[int, ...]], NamedSharding] | None:
    """`parameter_sharding` of a mesh, checked for a model with these heads; None without a mesh.

    Raises:
        LVLMError: it is not a mesh, or splits attention heads.
    """
    if mesh is None:
        return None
    if not isinstance(mesh, Mesh):
        raise LVLMError(f"mesh is {shown(mesh)}; expected a mesh from parallel.make_mesh")
    refuse_cut_heads(mesh, heads, key_heads)
    return parameter_sharding(mesh)


def sharding_beside(neighbour, path: str, shape: tuple[int, ...]) -> NamedSharding | None:
    """The sharding of a parameter that is added beside another one: on the same mesh, according to the table.

    Args:
        neighbour: an existing parameter.
        path, shape: of the new parameter.

    Returns:
        None if the neighbour is not on a mesh: then the default device is used.
    """
    sharding = getattr(neighbour, "sharding", None)
    return parameter_sharding(sharding.mesh)(path, shape) if isinstance(sharding, NamedSharding) else None


def spread(batch: Any, mesh: Mesh | None) -> Any:
    """Shards arrays along their first axis over the mesh's data axes if these divide it; otherwise returns them
    unchanged.

    With several processes, each has all of `batch` and gives its devices their part.
    """
    if mesh is None:
        return batch
    place = batch_sharding(mesh)

    def placed(array: Any) -> jax.Array:
        if array.shape[0] % shards(mesh):
            return array
        if place.is_fully_addressable or not getattr(array, "is_fully_addressable", True):
            return jax.device_put(array, place)
        host_array = np.asarray(array)
        return jax.make_array_from_callback(host_array.shape, place, lambda index: host_array[index])

    return jax.tree.map(placed, batch)


def shards(mesh: Mesh | None) -> int:
    """Into how many parts the data axes of a mesh split a batch."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays with one row per conversation or per image."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def row_sharding(mesh: Mesh, rows: int) -> NamedSharding:
    """`batch_sharding`, or every row on every device where the data axes do not divide the number of rows."""
    return NamedSharding(mesh, PartitionSpec()) if rows % shards(mesh) else batch_sharding(mesh)


def cache_sharding(mesh: Mesh, shape: tuple[int, int, int, int]) -> NamedSharding:
    """The sharding of a block of keys or values `[B, K, S, D]`: rows as in `row_sharding`, key heads over `tensor`."""
    (rows,) = row_sharding(mesh, shape[0]).spec or (None,)
    return NamedSharding(mesh, PartitionSpec(rows, None if shape[1] % mesh.shape["tensor"] else "tensor"))


def local(tree: Any, keep: bool = True) -> Any:
    """Replaces arrays that are spread over processes by complete NumPy arrays; other arrays are returned unchanged.

    All processes call it together, each with its part of the same arrays.

    Args:
        keep: a process that passes False takes part but gets None for such an array.
    """

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return leaf
        replicated = _gather(NamedSharding(leaf.sharding.mesh, PartitionSpec()))(leaf)
        return np.asarray(replicated) if keep else None

    return jax.tree.map(whole, tree)


@functools.cache
def _gather(everywhere: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=everywhere)


def _axes(path: str, rank: int) -> tuple[str | None, ...]:
    """The names of a parameter's axes; None for an axis that is never split."""
    kernel = re.sub(r"/(lora_[ab]|kernel_int8|kernel_scale)$", "/kernel", path)
    names = next((axes for pattern, axes in PARAMETER_AXES if re.search(pattern, kernel)), (None,) * rank)
    if path.endswith("/lora_a"):
        return (names[0], None)
    if path.endswith("/kernel_int8"):
        return names[::-1]
    if path.endswith("/kernel_scale"):
        return names[-1:]
    return (None, names[-1]) if path.endswith("/lora_b") else names
