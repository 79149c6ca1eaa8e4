"""What a fingerprint of parameters sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.weights.fingerprint import fingerprint

KERNEL, BIAS = jnp.arange(12.0).reshape(3, 4), jnp.ones(2, jnp.bfloat16)
PARAMS = {"layer": {"kernel": KERNEL, "bias": BIAS}}
CHANGES = {
    "value": {"layer": {"kernel": KERNEL.at[2, 3].add(1e-6), "bias": BIAS}},
    "value in bfloat16": {"layer": {"kernel": KERNEL, "bias": BIAS.at[1].set(1.0078125)}},
    "sign of zero": {"layer": {"kernel": KERNEL.at[0, 0].set(-0.0), "bias": BIAS}},
    "order": {"layer": {"kernel": KERNEL[:, ::-1], "bias": BIAS}},
    "shape": {"layer": {"kernel": KERNEL.reshape(4, 3), "bias": BIAS}},
    "dtype": {"layer": {"kernel": KERNEL, "bias": BIAS.astype(jnp.float16)}},
    "bits as another dtype": {"layer": {"kernel": KERNEL, "bias": jax.lax.bitcast_convert_type(BIAS, jnp.int16)}},
    "name of a leaf": {"layer": {"kernel": KERNEL, "scale": BIAS}},
    "name of a module": {"other": {"kernel": KERNEL, "bias": BIAS}},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_shows(change):
    assert fingerprint(change) != fingerprint(PARAMS)


def test_the_order_of_names_and_the_kind_of_array_do_not():
    assert fingerprint({"layer": dict(reversed(PARAMS["layer"].items()))}) == fingerprint(PARAMS)
    assert fingerprint(jax.tree.map(np.asarray, PARAMS)) == fingerprint(PARAMS)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int32, jnp.float16, jnp.float32])
def test_arrays_of_every_width(dtype):
    array = jnp.arange(6, dtype=dtype)
    assert fingerprint({"a": array}) != fingerprint({"a": array.at[5].set(4)})
