"""Meshes, where parameters live on them, and the start of several processes."""

from lvlm_jax.parallel.mesh import AXES, make_mesh, parameter_sharding
from lvlm_jax.parallel.processes import start

__all__ = ["AXES", "make_mesh", "parameter_sharding", "start"]
