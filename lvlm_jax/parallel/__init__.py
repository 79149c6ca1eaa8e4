"""Meshes and where parameters live on them."""

from lvlm_jax.parallel.mesh import AXES, make_mesh, parameter_sharding

__all__ = ["AXES", "make_mesh", "parameter_sharding"]
