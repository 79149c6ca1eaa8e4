import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lvlm_jax.training import optimizer


def settings(**changes):
    fields = dict(steps=100, warmup=10, peak=1e-2, final=0.1, clip=1.0, beta1=0.9, beta2=0.99, weight_decay=0.1)
    return ConfigDict(fields | changes)


def test_the_rate_rises_to_its_peak_and_falls_to_its_end():
    rate = optimizer.schedule(settings())
    found = [rate(step) for step in (0, 5, 10, 55, 100)]
    np.testing.assert_allclose(found, [0, 5e-3, 1e-2, 5.5e-3, 1e-3], rtol=1e-5)
    trial = optimizer.schedule(settings(steps=6, warmup=100))  # shorter than the warm-up
    assert max(float(trial(step)) for step in range(7)) == np.float32(1e-2)
    given, share = (optimizer.schedule(settings(warmup=warmup)) for warmup in (30, 0.3))
    np.testing.assert_array_equal(*([rate(step) for step in range(0, 100, 7)] for rate in (given, share)))
    assert optimizer.schedule(settings(warmup=0.001))(0) == np.float32(1e-2)  # less than half a step is none


def test_only_matrices_decay():
    proj = {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3), "lora_a": jnp.ones((3, 2))}
    params = {"norm": {"scale": jnp.ones(3)}, "proj": proj}
    transformation = optimizer.make(settings(warmup=0))
    updates, _ = transformation.update(jax.tree.map(jnp.zeros_like, params), transformation.init(params), params)
    for name in ("kernel", "lora_a"):
        np.testing.assert_allclose(updates["proj"][name], -1e-2 * 0.1 * proj[name], rtol=1e-5)
    assert not np.any(updates["proj"]["bias"]) and not np.any(updates["norm"]["scale"])


def test_gradients_are_clipped_by_their_global_norm():
    params = {"a": {"bias": jnp.zeros(2)}, "b": {"bias": jnp.zeros(2)}}
    transformation = optimizer.make(settings(warmup=0, clip=0.5))
    huge = {"a": {"bias": jnp.array([300.0, 0])}, "b": {"bias": jnp.array([0, 400.0])}}
    _, state = transformation.update(huge, transformation.init(params), params)
    moment = state[1][0].mu
    np.testing.assert_allclose([moment["a"]["bias"][0], moment["b"]["bias"][1]], [0.1 * 0.3, 0.1 * 0.4], rtol=1e-5)
