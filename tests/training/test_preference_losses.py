"""The losses on log-probabilities: their values and gradients in NumPy, and what must not change them."""

import jax
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


def example():
    rng = np.random.default_rng(0)
    policy = -rng.exponential(1.5, MASK.shape).astype(np.float32)
    reference = policy + rng.normal(0, 0.7, MASK.shape).astype(np.float32)
    return policy, reference


def numpy_means(policy, reference, nll=0.0, keep=range(4), **settings):
    losses = Losses(settings["loss"], settings["beta"], settings.get("label_smoothing", 0.0), nll)
    arguments = [
        [
            array[pair, answer, : COUNTS[pair, answer]].astype(np.float64)
            for array in (policy, reference)
            for answer in (0, 1)
        ]
        for pair in keep
    ]
    return losses.mean(arguments)


def means(policy, reference, weight=(1, 1, 1, 1), **settings):
    found = preference.metrics(*map(jnp.asarray, (policy, reference, MASK, np.float32(weight))), **settings)
    return {name: mean.value for name, mean in found.items()}


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_metric_equals_numpy(settings):
    found = means(*example(), **settings)
    expected = numpy_means(*example(), **settings)
    assert found.keys() == expected.keys() - {"objective"}
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_gradient_equals_finite_differences(settings):
    policy, reference = example()

    def objective(policy):
        found = means(policy, reference, **settings)
        return found["preference"] + 0.7 * found["nll"]

    found = np.asarray(jax.grad(objective)(jnp.asarray(policy)))
    assert not found[~MASK].any()
    step = 1e-5
    for place in np.argwhere(MASK):
        moved = [policy.astype(np.float64) for _ in range(2)]
        moved[0][tuple(place)] += step
        moved[1][tuple(place)] -= step
        up, down = (numpy_means(one, reference, nll=0.7, **settings)["objective"] for one in moved)
        np.testing.assert_allclose(found[tuple(place)], (up - down) / (2 * step), atol=1e-5, rtol=1e-5)


def test_equal_policy_and_reference_give_log_2_and_no_reward():
    policy, _ = example()
    found = means(policy, policy, loss="sigmoid", beta=0.1)
    np.testing.assert_allclose(found["preference"], np.log(2), rtol=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margin", "drift"):
        assert found[name] == 0, name
    assert found["rewards/accuracy"] == 0.5  # neither answer is preferred


@pytest.mark.parametrize("settings", SETTINGS)
def test_places_without_a_token_and_pairs_of_weight_0_change_nothing(settings):
    policy, reference = example()
    weight = (1, 0, 1, 1)
    noise = np.where(MASK, 0, 9).astype(np.float32)
    found = means(policy + noise, reference - noise, weight, **settings)
    expected = numpy_means(policy, reference, keep=(0, 2, 3), **settings)
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_an_empty_row_is_harmless():
    """As it fills up an evaluation's last batch."""
    zeros = jnp.zeros((1, 2, 4))
    found = preference.metrics(zeros, zeros, zeros > 0, jnp.zeros(1), loss="ipo", beta=0.1)
    assert all(mean.total == 0 and mean.count == 0 for mean in found.values())


def test_the_divergence_is_unbiased_for_samples_of_the_reference():
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(5)), rng.dirichlet(np.ones(5))  # reference, policy
    drawn = rng.choice(5, size=(500, 2, 40), p=p)
    found = preference.metrics(
        jnp.log(q)[drawn], jnp.log(p)[drawn], drawn >= 0, jnp.ones(500), loss="sigmoid", beta=0.1
    )
    np.testing.assert_allclose(found["drift"].value, np.sum(p * np.log(p / q)), rtol=0.05)
