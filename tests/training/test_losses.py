import jax.numpy as jnp
import numpy as np

from lvlm_jax.training.losses import Mean, accuracy, cross_entropy


def example():
    rng = np.random.default_rng(0)
    logits, targets = rng.normal(size=(3, 5, 7)).astype(np.float32) * 3, rng.integers(0, 7, (3, 5))
    return jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(rng.random((3, 5)) < 0.5)


def test_cross_entropy_is_the_mean_negative_log_probability_of_selected_targets():
    logits, targets, mask = example()
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = [-np.log(probabilities[i, t, targets[i, t]]) for i, t in np.argwhere(mask)]
    found = cross_entropy(logits, targets, mask)
    assert found.count == mask.sum()
    np.testing.assert_allclose(found.value, np.mean(expected), rtol=1e-5)


def test_targets_outside_the_mask_change_nothing():
    logits, targets, mask = example()
    elsewhere = jnp.where(mask, targets, (targets + 1) % 7)
    for metric in (cross_entropy, accuracy):
        assert metric(logits, targets, mask).total == metric(logits, elsewhere, mask).total


def test_parts_add_up_to_the_whole():
    logits, targets, mask = example()
    for metric in (cross_entropy, accuracy):
        whole = metric(logits, targets, mask)
        first, second = (metric(logits[part], targets[part], mask[part]) for part in (np.s_[:1], np.s_[1:]))
        np.testing.assert_allclose((first + second).value, whole.value, rtol=1e-6)


def test_accuracy_counts_the_highest_logits():
    logits = jnp.eye(4)[None]
    assert accuracy(logits, jnp.array([[0, 1, 0, 0]]), jnp.array([[True, True, True, False]])).value == jnp.float32(
        2 / 3
    )


def test_a_mean_over_nothing_is_zero_not_nan():
    assert Mean(jnp.zeros(()), jnp.zeros(())).value == 0
