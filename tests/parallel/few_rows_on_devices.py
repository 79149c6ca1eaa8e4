"""A product of few rows whose matrix lies on all devices, and one on a single of them. Prints a line of JSON."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lvlm_jax import native
from lvlm_jax.models import layers
from lvlm_jax.native import build

mesh = jax.make_mesh((jax.device_count(),), ("tensor",))
rng = np.random.default_rng(0)
x, matrix = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 64), (64, 48)))
product = jax.jit(lambda x, matrix: native.few_rows_dot(x, matrix, False, layers._exact))


def calls(*arguments):
    return product.lower(*arguments).compile().as_text().count(build.TARGET)


divided = jax.device_put(matrix, NamedSharding(mesh, PartitionSpec(None, "tensor")))
whole = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
got = product(whole, divided)
assert got.sharding.spec == PartitionSpec(None, "tensor"), got.sharding
error = float(np.abs(np.asarray(got) - np.float64(x) @ np.float64(matrix)).max())
print(json.dumps({"calls": calls(whole, divided), "alone": calls(x, matrix), "error": error}))
