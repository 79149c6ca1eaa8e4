"""Sharding of a training run: parameters by the table of `parallel`, batches by rows, everything else replicated.

With several processes, each has a part of every global array. Every process makes the whole batch, which depends only
on its number, and keeps the rows of its own devices.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lvlm_jax import parallel
from lvlm_jax.training.step import State

ROWS = ("data", "fsdp")  # mesh axes over which the rows of a batch are spread
GEOMETRY = "geometry"  # a batch's further inputs of the tower, see `pair_batches`


def everywhere(mesh: Mesh) -> NamedSharding:
    """The sharding with a complete copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def of_parameters(params: Any, mesh: Mesh) -> Any:
    """The sharding of every parameter, from its path and shape."""
    place = parallel.parameter_sharding(mesh)

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        return place("/".join(entry.key for entry in path), jnp.shape(leaf))

    return jax.tree_util.tree_map_with_path(sharding, params)


def of_state(trainable: Any, transformation: optax.GradientTransformation, mesh: Mesh) -> State:
    """Shapes, dtypes and shardings of a training state: moments are sharded like parameters, counters replicated."""
    shapes = jax.eval_shape(lambda params: State.create(params, transformation), trainable)
    parameters = of_parameters(trainable, mesh)
    moments = optax.tree.map_params(
        transformation,
        lambda _, sharding: sharding,
        shapes.optimizer,
        parameters,
        transform_non_params=lambda _: everywhere(mesh),
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        State(everywhere(mesh), parameters, moments),
    )


def of_batch(batch: Any, mesh: Mesh, accumulate: int = 1) -> Any:
    """The sharding of every array of a batch: its rows over `ROWS` if they divide evenly, else replicated.

    Rows of the tower are rows too; arrays of `geometry` about image tokens are replicated.

    Args:
        accumulate: above 1, rows are the second axis; the first axis numbers the parts.
    """
    lead = (None,) if accumulate > 1 else ()

    def rows(leaf: np.ndarray) -> int:
        return leaf.shape[len(lead)] if leaf.ndim > len(lead) else 0

    def sharding(path: tuple, leaf: np.ndarray) -> NamedSharding:
        keys = [getattr(entry, "key", None) for entry in path]
        owner = batch
        for key in keys[: keys.index(GEOMETRY)] if GEOMETRY in keys else ():
            owner = owner[key]
        of_tokens = GEOMETRY in keys and rows(leaf) != rows(owner["images"])
        even = rows(leaf) > 0 and rows(leaf) % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
        split = even and not of_tokens
        return NamedSharding(mesh, PartitionSpec(*lead, ROWS)) if split else everywhere(mesh)

    return jax.tree_util.tree_map_with_path(sharding, batch)


def by_rows(array: jax.Array) -> jax.Array:
    """Spreads the rows of an array over the axes `ROWS` of the mesh in use (`jax.set_mesh`) if they divide evenly.

    For use inside a program. Without it, the compiler might split channels like the weights, and keep all rows on every
    device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or array.shape[0] % math.prod(mesh.shape[axis] for axis in ROWS):
        return array
    return jax.lax.with_sharding_constraint(array, PartitionSpec(ROWS))


def put(tree: Any, shardings: Any) -> Any:
    """Places every array of `tree` according to `shardings`; arrays are the same on all processes, or global."""
    return jax.tree.map(_put, tree, shardings)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if sharding.is_fully_addressable or not getattr(leaf, "is_fully_addressable", True):
        return jax.device_put(leaf, sharding)
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
