import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lvlm_jax.training import step
from lvlm_jax.training.losses import Mean

TERMS = {"fit": 1.0, "words": 0.3}
ROWS, TOKENS, WIDTH = 16, 7, 5


def objective(trainable, frozen, batch, key):
    """Two terms that count differently: one per row, one per token of ragged rows."""
    hidden = jnp.tanh(batch["inputs"] @ trainable["layer"]["kernel"] + frozen["layer"]["bias"])
    words = jnp.cumsum(hidden, axis=1) ** 2 * batch["mask"][..., None]
    return {
        "fit": Mean(jnp.sum(hidden.mean(axis=(1, 2)) ** 2), jnp.float32(len(hidden))),
        "words": Mean(words.sum(), batch["mask"].sum()),
        "rows": Mean(jnp.float32(len(hidden)), jnp.float32(len(hidden))),
    }


@pytest.fixture(scope="module")
def example():
    """(trainable, frozen, batch of 16 ragged rows, the first one empty)"""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, TOKENS + 1, ROWS)
    lengths[0] = 0
    batch = {
        "inputs": rng.normal(size=(ROWS, TOKENS, WIDTH)).astype(np.float32),
        "mask": (np.arange(TOKENS) < lengths[:, None]).astype(np.float32),
    }
    trainable = {"layer": {"kernel": rng.normal(size=(WIDTH, WIDTH)).astype(np.float32)}}
    return trainable, {"layer": {"bias": jnp.linspace(-1, 1, WIDTH)}}, batch


def run(example, accumulate, steps=3, objective=objective):
    trainable, frozen, batch = example
    if accumulate > 1:
        batch = jax.tree.map(lambda leaf: leaf.reshape(accumulate, -1, *leaf.shape[1:]), batch)
    transformation = optax.adam(1e-2)
    update = step.make_step(objective, TERMS, transformation, accumulate=accumulate)
    state = step.State.create(jax.tree.map(jnp.asarray, trainable), transformation)
    for _ in range(steps):
        state, metrics = update(state, frozen, batch)
    return state, metrics


def test_the_loss_is_the_weighted_sum_of_means(example):
    trainable, frozen, batch = example
    hidden = np.tanh(batch["inputs"] @ trainable["layer"]["kernel"] + np.linspace(-1, 1, WIDTH))
    fit = np.mean(hidden.mean(axis=(1, 2)) ** 2)
    words = (np.cumsum(hidden, axis=1) ** 2 * batch["mask"][..., None]).sum() / batch["mask"].sum()
    _, metrics = run(example, 1, steps=1)
    np.testing.assert_allclose(metrics["objective"].value, fit + 0.3 * words, rtol=1e-5)


@pytest.mark.parametrize("accumulate", [4, 16])
def test_parts_give_what_the_whole_batch_gives(example, accumulate):
    """Sixteen rows at once, in four parts, and one by one; a mean of the parts' means would be 20 % off."""
    (whole, expected), (state, metrics) = run(example, 1), run(example, accumulate)
    assert metrics.keys() == expected.keys()
    for name, mean in expected.items():
        np.testing.assert_allclose(metrics[name].total, mean.total, rtol=1e-5, err_msg=name)
        assert metrics[name].count == mean.count
    np.testing.assert_allclose(
        state.trainable["layer"]["kernel"], whole.trainable["layer"]["kernel"], rtol=0, atol=1e-5
    )


def test_a_batch_in_which_a_term_counts_nothing_has_a_finite_loss(example):
    trainable, frozen, batch = example
    for accumulate in (1, 4):
        _, metrics = run((trainable, frozen, batch | {"mask": np.zeros_like(batch["mask"])}), accumulate)
        assert np.isfinite(metrics["objective"].total) and metrics["words"].value == 0


def test_counting_first_costs_no_second_forward_pass(example):
    """The objective is traced for its counts, too; nothing of that pass but the counts is left in the program."""
    trainable, frozen, batch = example
    parts = jax.tree.map(lambda leaf: leaf.reshape(4, -1, *leaf.shape[1:]), batch)
    transformation, calls = optax.sgd(1.0), []

    def counted(*arguments):
        calls.append(arguments)
        return objective(*arguments)

    update = step.make_step(counted, TERMS, transformation, accumulate=4)
    lowered = update.lower(step.State.create(trainable, transformation), frozen, parts)
    assert len(calls) > 1 and lowered.as_text().count("stablehlo.tanh") == 1


def test_the_state_is_donated_and_the_frozen_part_is_not(example):
    trainable, frozen, batch = example
    transformation = optax.adam(1e-2)
    state = step.State.create(jax.tree.map(jnp.asarray, trainable), transformation)
    step.make_step(objective, TERMS, transformation)(state, frozen, batch)
    assert state.trainable["layer"]["kernel"].is_deleted()
    assert not frozen["layer"]["bias"].is_deleted()


def test_parts_draw_different_randomness_that_repeats(example):
    def noisy(trainable, frozen, batch, key):
        noise = jax.random.normal(key)
        return objective(trainable, frozen, batch, key) | {"noise": Mean(noise, 1.0), "square": Mean(noise**2, 1.0)}

    draws = [run(example, 4, steps, noisy)[1] for steps in (1, 1, 2)]
    means, squares = zip(*((float(d["noise"].value), float(d["square"].value)) for d in draws), strict=True)
    assert means[0] == means[1] != means[2]
    assert squares[0] > means[0] ** 2 + 1e-3  # the four differ


def test_master_weights_stay_in_float32_under_bfloat16_products(example):
    """An update of 1e-4 of a weight's size, which bfloat16 could not hold, is not lost."""
    trainable, frozen, batch = example

    def low(trainable, frozen, batch, key):
        half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), trainable)
        metrics = objective(half, frozen, {**batch, "inputs": batch["inputs"].astype(jnp.bfloat16)}, key)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), metrics)

    frozen = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), frozen)
    transformation = optax.sgd(1e-4)
    update = step.make_step(low, TERMS, transformation)
    before = np.ones((WIDTH, WIDTH), np.float32)
    state, _ = update(step.State.create({"layer": {"kernel": jnp.asarray(before)}}, transformation), frozen, batch)
    kernel = np.asarray(state.trainable["layer"]["kernel"])
    moved = np.abs(kernel - before)
    assert kernel.dtype == np.float32 and 0 < moved.max() < 2**-9
