"""Meshes, placement of parameters on them, and the start of several processes."""

from lvlm_jax.parallel.mesh import (
    AXES,
    ambient,
    batch_sharding,
    cache_sharding,
    local,
    make_mesh,
    mesh_for,
    parameter_sharding,
    placing,
    refuse_cut_heads,
    row_sharding,
    shards,
    spread,
)
from lvlm_jax.parallel.processes import lost, start

__all__ = [
    "AXES",
    "ambient",
    "batch_sharding",
    "cache_sharding",
    "local",
    "lost",
    "make_mesh",
    "mesh_for",
    "parameter_sharding",
    "placing",
    "refuse_cut_heads",
    "row_sharding",
    "shards",
    "spread",
    "start",
]
