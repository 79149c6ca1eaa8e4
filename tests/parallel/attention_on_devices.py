"""Attention and its gradient on two simulated devices, each with its samples, and what one device computes."""

import json

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lvlm_jax import parallel
from tests.native import test_attention as whole

mesh = parallel.make_mesh(data=2)
arrays, mask = [whole.random((2, 2, 130, 8), seed) for seed in range(4)], whole.sight(130, 130)
run = jax.jit(whole.with_gradients)
divided = [jax.device_put(array, NamedSharding(mesh, PartitionSpec("data"))) for array in arrays]
everywhere = jax.device_put(mask, NamedSharding(mesh, PartitionSpec()))
program = run.lower(*divided[:3], everywhere, divided[3]).compile()
pairs = zip(program(*divided[:3], everywhere, divided[3]), run(*arrays[:3], mask, arrays[3]), strict=True)
print(
    json.dumps(
        {
            "calls": [program.as_text().count(f'"{target}"') for target in whole.TARGETS],
            "largest_difference": max(float(np.abs(np.asarray(one) - np.asarray(other)).max()) for one, other in pairs),
        }
    )
)
