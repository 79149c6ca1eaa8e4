"""Meshes, where parameters live on them, and the start of several processes."""

from lvlm_jax.parallel.mesh import AXES, local, make_mesh, parameter_sharding
from lvlm_jax.parallel.processes import lost, start

__all__ = ["AXES", "local", "lost", "make_mesh", "parameter_sharding", "start"]
