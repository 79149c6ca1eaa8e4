"""The losses on log-probabilities: every metric in NumPy, and what must not change it."""

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.training import preference_losses as preference
from tests.reference.preference import Losses

SETTINGS = [
    dict(loss="sigmoid", beta=0.1),
    dict(loss="sigmoid", beta=0.5, label_smoothing=0.2),
    dict(loss="ipo", beta=0.1),
    dict(loss="hinge", beta=0.3),
]
COUNTS = np.array([[3, 5], [6, 1], [2, 2], [4, 6]])  # answer tokens, chosen and rejected
MASK = np.arange(6) < COUNTS[..., None]
NLL = 0.7
RNG = np.random.default_rng(0)
POLICY = -RNG.exponential(1.5, MASK.shape).astype(np.float32)
REFERENCE = POLICY + RNG.normal(0, 0.7, MASK.shape).astype(np.float32)


def numpy_means(policy, keep, settings):
    losses = Losses(settings["loss"], settings["beta"], settings.get("label_smoothing", 0.0), NLL)
    arrays = policy.astype(np.float64), REFERENCE.astype(np.float64)
    return losses.mean(
        [[array[pair, side, : COUNTS[pair, side]] for array in arrays for side in (0, 1)] for pair in keep]
    )


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_metric_equals_numpy(settings):
    """Places without a token and pairs of weight 0, as they fill up an evaluation's last batch, change nothing."""
    noise = np.where(MASK, 0, 9).astype(np.float32)
    for weight, keep in ((jnp.ones(4), range(4)), (jnp.array([1.0, 0, 1, 1]), (0, 2, 3))):
        found = preference.metrics(POLICY + noise, REFERENCE - noise, MASK, weight, **settings)
        expected = numpy_means(POLICY, keep, settings)
        assert found.keys() == expected.keys() - {"objective"}
        for name, mean in found.items():
            np.testing.assert_allclose(mean.value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
    zeros = jnp.zeros((1, 2, 4))
    empty = preference.metrics(zeros, zeros, zeros > 0, jnp.zeros(1), **settings)
    assert all(mean.total == 0 == mean.count and mean.value == 0 for mean in empty.values())
