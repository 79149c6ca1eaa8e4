"""Shapes in signatures are checked while tests run; the session's small model and its inputs."""

import os

# Tests time and count compilations, and must not leave programs behind in the user's cache.
os.environ["LVLM_JAX_COMPILATION_CACHE"] = "0"

from jaxtyping import install_import_hook

import tests.signatures

install_import_hook("lvlm_jax", f"{tests.signatures.__name__}.check")
