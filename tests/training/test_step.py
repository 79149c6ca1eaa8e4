import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lvlm_jax.training import step
from lvlm_jax.training.losses import Mean

TERMS = {"fit": 1.0, "words": 0.3}
ROWS, TOKENS, WIDTH = 16, 7, 5
RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(1, TOKENS + 1, ROWS) * (np.arange(ROWS) > 0)  # ragged rows, the first one empty
BATCH = {
    "inputs": RNG.normal(size=(ROWS, TOKENS, WIDTH)).astype(np.float32),
    "mask": (np.arange(TOKENS) < LENGTHS[:, None]).astype(np.float32),
}
KERNEL = RNG.normal(size=(WIDTH, WIDTH)).astype(np.float32)
FROZEN = {"layer": {"bias": jnp.linspace(-1, 1, WIDTH)}}


def objective(trainable, frozen, batch, key):
    """Two terms with different counts: one per row, one per token of rows of unequal length."""
    hidden = jnp.tanh(batch["inputs"] @ trainable["layer"]["kernel"] + frozen["layer"]["bias"])
    words = jnp.cumsum(hidden, axis=1) ** 2 * batch["mask"][..., None]
    return {
        "fit": Mean(jnp.sum(hidden.mean(axis=(1, 2)) ** 2), jnp.float32(len(hidden))),
        "words": Mean(words.sum(), batch["mask"].sum()),
        "rows": Mean(jnp.float32(len(hidden)), jnp.float32(len(hidden))),
    }


def state_of(transformation, kernel=KERNEL):
    return step.State.create({"layer": {"kernel": jnp.asarray(kernel)}}, transformation)


def parts_of(batch, accumulate):
    return jax.tree.map(lambda leaf: leaf.reshape(accumulate, -1, *leaf.shape[1:]), batch)


def run(accumulate, steps=3, objective=objective, batch=BATCH):
    """(kernel, metrics of the last step)"""
    transformation = optax.adam(1e-2)
    update = step.make_step(objective, TERMS, transformation, accumulate=accumulate)
    state, batch = state_of(transformation), parts_of(batch, accumulate) if accumulate > 1 else batch
    for _ in range(steps):
        state, metrics = update(state, FROZEN, batch)
    return state.trainable["layer"]["kernel"], metrics


def test_the_loss_is_the_weighted_sum_of_means():
    hidden = np.tanh(BATCH["inputs"] @ KERNEL + np.linspace(-1, 1, WIDTH))
    fit = np.mean(hidden.mean(axis=(1, 2)) ** 2)
    words = (np.cumsum(hidden, axis=1) ** 2 * BATCH["mask"][..., None]).sum() / BATCH["mask"].sum()
    np.testing.assert_allclose(run(1, steps=1)[1]["objective"].value, fit + 0.3 * words, rtol=1e-5)


@pytest.mark.parametrize("accumulate", [4, 16])
def test_parts_give_what_the_whole_batch_gives(accumulate):
    """Sixteen rows at once, in four parts, and one by one; a mean of the parts' means would be 20 % off."""
    (whole, expected), (kernel, metrics) = run(1), run(accumulate)
    assert metrics.keys() == expected.keys()
    for name, mean in expected.items():
        np.testing.assert_allclose(metrics[name].total, mean.total, rtol=1e-5, err_msg=name)
        assert metrics[name].count == mean.count
    np.testing.assert_allclose(kernel, whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_batch_in_which_a_term_counts_nothing_has_a_finite_loss(accumulate):
    _, metrics = run(accumulate, batch=BATCH | {"mask": np.zeros_like(BATCH["mask"])})
    assert np.isfinite(metrics["objective"].total) and metrics["words"].value == 0


def test_counting_first_costs_no_second_forward_pass():
    """The objective is traced for its counts, too; nothing of that pass but the counts is left in the program."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return objective(*arguments)

    update = step.make_step(counted, TERMS, optax.sgd(1.0), accumulate=4)
    lowered = update.lower(state_of(optax.sgd(1.0)), FROZEN, parts_of(BATCH, 4))
    assert len(calls) > 1 and lowered.as_text().count("stablehlo.tanh") == 1


def test_parts_draw_different_randomness_that_repeats():
    def noisy(trainable, frozen, batch, key):
        noise = jax.random.normal(key)
        return objective(trainable, frozen, batch, key) | {"noise": Mean(noise, 1.0), "square": Mean(noise**2, 1.0)}

    draws = [run(4, steps, noisy)[1] for steps in (1, 1, 2)]
    means, squares = zip(*((float(d["noise"].value), float(d["square"].value)) for d in draws), strict=True)
    assert means[0] == means[1] != means[2]
    assert squares[0] > means[0] ** 2 + 1e-3  # the four differ


def test_master_weights_stay_in_float32_under_bfloat16_products():
    """An update of 1e-4 of a weight's size, which bfloat16 could not hold, is not lost; the old state is donated."""

    def low(trainable, frozen, batch, key):
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), trainable)
        metrics = objective(half, frozen, {**batch, "inputs": batch["inputs"].astype(jnp.bfloat16)}, key)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), metrics)

    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), FROZEN)
    before = state_of(optax.sgd(1e-4), np.ones((WIDTH, WIDTH), np.float32))
    state, _ = step.make_step(low, TERMS, optax.sgd(1e-4))(before, frozen, BATCH)
    kernel = np.asarray(state.trainable["layer"]["kernel"])
    assert kernel.dtype == np.float32 and 0 < np.abs(kernel - 1).max() < 2**-9
    assert before.trainable["layer"]["kernel"].is_deleted() and not frozen["layer"]["bias"].is_deleted()
