"""Changes of parameters that a fingerprint detects."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.weights.fingerprint import fingerprint

KERNEL, BIAS = jnp.arange(12.0).reshape(3, 4), jnp.ones(2, jnp.bfloat16)


def tree(kernel=KERNEL, bias=BIAS):
    return {"layer": {"kernel": kernel, "bias": bias}}


CHANGES = {
    "value": tree(KERNEL.at[2, 3].add(1e-6)),
    "value in bfloat16": tree(bias=BIAS.at[1].set(1.0078125)),
    "sign of zero": tree(KERNEL.at[0, 0].set(-0.0)),
    "order": tree(KERNEL[:, ::-1]),
    "shape": tree(KERNEL.reshape(4, 3)),
    "dtype": tree(bias=BIAS.astype(jnp.float16)),
    "bits as another dtype": tree(bias=jax.lax.bitcast_convert_type(BIAS, jnp.int16)),
    "name of a leaf": {"layer": {"kernel": KERNEL, "scale": BIAS}},
    "name of a module": {"other": tree()["layer"]},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_shows(change):
    assert fingerprint(change) != fingerprint(tree())


def test_the_order_of_names_and_the_kind_of_array_do_not():
    assert fingerprint({"layer": dict(reversed(tree()["layer"].items()))}) == fingerprint(tree())
    assert fingerprint(jax.tree.map(np.asarray, tree())) == fingerprint(tree())
    for dtype in (jnp.int8, jnp.uint8, jnp.int32, jnp.float16, jnp.float32):  # every width
        array = jnp.arange(6, dtype=dtype)
        assert fingerprint({"a": array}) != fingerprint({"a": array.at[5].set(4)})
