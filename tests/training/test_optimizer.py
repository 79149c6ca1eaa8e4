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
    np.testing.assert_allclose(
        [rate(0), rate(5), rate(10), rate(55), rate(100)], [0, 5e-3, 1e-2, 5.5e-3, 1e-3], rtol=1e-5
    )


def test_a_trial_run_shorter_than_the_warm_up_still_reaches_the_peak():
    rate = optimizer.schedule(settings(steps=6, warmup=100))
    assert max(float(rate(step)) for step in range(7)) == np.float32(1e-2)


def test_a_warm_up_below_one_is_a_share_of_the_steps():
    given, share = (optimizer.schedule(settings(warmup=warmup)) for warmup in (30, 0.3))
    np.testing.assert_array_equal(*([rate(step) for step in range(100)] for rate in (given, share)))
    assert optimizer.schedule(settings(warmup=0.001))(0) == np.float32(1e-2)  # less than half a step is none


def test_only_matrices_decay():
    proj = {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3), "lora_a": jnp.ones((3, 2))}
    params = {"norm": {"scale": jnp.ones(3)}, "proj": proj}
    transformation = optimizer.make(settings(warmup=0))
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, _ = transformation.update(nothing, transformation.init(params), params)
    np.testing.assert_allclose(updates["proj"]["kernel"], -1e-2 * 0.1 * np.ones((3, 3)), rtol=1e-5)
    np.testing.assert_allclose(updates["proj"]["lora_a"], -1e-2 * 0.1 * np.ones((3, 2)), rtol=1e-5)
    assert not np.any(updates["proj"]["bias"]) and not np.any(updates["norm"]["scale"])


def test_gradients_are_clipped_by_their_global_norm():
    params = {"a": {"bias": jnp.zeros(2)}, "b": {"bias": jnp.zeros(2)}}
    transformation = optimizer.make(settings(warmup=0, clip=0.5))
    huge = {"a": {"bias": jnp.array([300.0, 0])}, "b": {"bias": jnp.array([0, 400.0])}}
    _, state = transformation.update(huge, transformation.init(params), params)
    first_moment = state[1][0].mu
    np.testing.assert_allclose(first_moment["a"]["bias"][0], 0.1 * 0.3, rtol=1e-5)
    np.testing.assert_allclose(first_moment["b"]["bias"][1], 0.1 * 0.4, rtol=1e-5)
