"""The transform protocol through the model: identity, what a stage sees, where it acts, CMAC's shared prefix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.attention.transform import mixes
from lvlm_jax.generation import forward
from lvlm_jax.generation.state import Prompt
from tests.attention.toys import Edited, Identity, Witness

MAX_LENGTH = 41 + 64  # of the mixed prompts: 64 columns of prompt, 128 of cache
FORCED = np.random.default_rng(5).integers(3, 250, (3, 3)).astype(np.int32)  # steps, samples


def run(model, prompt, method, **options):
    """Main and contrast logits of the prefill and of three forced steps, `[steps, B, V]`, and the last state."""
    state, step = model.prefill(prompt, method, MAX_LENGTH, **options)
    steps = [step]
    for tokens in FORCED:
        state, step = model.decode(state, tokens)
        steps.append(step)
    contrast = None if step.contrast is None else np.stack([step.contrast for step in steps])
    return np.stack([step.main for step in steps]), contrast, state


def test_identity_is_bit_equal_to_no_method(model, mixed):
    plain, *_ = run(model, mixed, None)
    for rows in ("post_image", "all"):
        main, contrast, _ = run(model, mixed, Edited((Identity(rows),)))
        assert contrast is None
        np.testing.assert_array_equal(main, plain)


def expected_site(image_id, first_row):
    """The expected fields of a site for the rows from `first_row` on, computed sample by sample with loops."""
    samples, columns = image_id.shape
    rows = range(first_row, columns)
    site = {
        "image_id": image_id,
        "image": image_id > 0,
        "after_image": np.zeros(image_id.shape, bool),
        "post_image": np.zeros((samples, len(rows)), bool),
        "mask": np.zeros((samples, len(rows), columns), bool),
    }
    for sample, ids in enumerate(image_id):
        images = np.flatnonzero(ids > 0)
        for index, row in enumerate(rows):
            site["post_image"][sample, index] = images.size > 0 and row > images[-1]
            for column in range(row + 1):
                site["mask"][sample, index, column] = ids[column] >= 0
        for column in range(columns):
            after = images.size > 0 and column > images[-1]
            site["after_image"][sample, column] = after and ids[column] >= 0
    return site


def assert_sites(carried, expected):
    """All layers saw the expected fields; softmax weights sum to 1 over visible columns."""
    assert [int(seen["layer"]) for seen in carried] == [0, 1]
    visible = expected["mask"][:, None]
    alive = visible.any(axis=-1, keepdims=True)  # rows of padding see nothing and mean nothing
    for seen in carried:
        for name, array in expected.items():
            np.testing.assert_array_equal(seen[name], array, err_msg=name)
        logits, weights = np.asarray(seen["logits"], np.float64), np.asarray(seen["weights"])
        assert logits.shape == weights.shape == (*visible.shape[:1], 4, *visible.shape[2:])
        powers = np.where(visible, np.exp(logits), 0)
        shares = powers / np.where(alive, powers.sum(axis=-1, keepdims=True), 1)
        np.testing.assert_allclose(np.where(alive, weights, 0), shares, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("transforms", "rows"),
    [
        ((Witness("last"),), 1),
        ((Witness("post_image"),), 16),
        ((Witness("all"),), 64),
        ((Witness("post_image"), Identity("last")), 16),  # a second branch, hence a shared prefix
    ],
    ids=["last", "post_image", "all", "two branches"],
)
def test_stages_see_the_rows_they_asked_for(model, mixed, transforms, rows):
    prompt = model.prepare(mixed)
    state, _ = model.prefill(prompt, Edited(transforms), MAX_LENGTH)
    assert_sites(state.memory.logits, expected_site(prompt.image_id, 64 - rows))
    if len(transforms) == 1 and rows > 1:
        return  # a decode step has one row whatever was asked for: once per number of branches will do
    assert state.capacity == 128
    state, _ = model.decode(state, FORCED[0])
    image_id = np.concatenate([prompt.image_id, np.zeros((3, 1), np.int32)], axis=1)
    expected = expected_site(image_id, 64)
    for name, fill in [("image_id", -1), ("image", False), ("after_image", False), ("mask", False)]:
        width = [(0, 0)] * (expected[name].ndim - 1) + [(0, 63)]
        expected[name] = np.pad(expected[name], width, constant_values=fill)
    assert_sites(state.memory.logits, expected)


@pytest.mark.parametrize(
    ("transform", "calls"),
    [
        (Witness(), (2, 2)),
        (Witness(only=(1,)), (1, 1)),
        (Witness(phases=("prefill",)), (2, 0)),
        (Witness(phases=("decode",), only=(0,)), (0, 1)),
    ],
    ids=["everywhere", "layer 1", "prefill", "layer 0 in decode"],
)
def test_stages_run_where_they_are_active(model, mixed, transform, calls):
    """Checked by a transform's carry through prefill and a decode step; the programs are traced, not run."""
    prompt = model.prepare(mixed)

    def both(params, embeddings):
        embedded = Prompt(embeddings, jnp.asarray(prompt.image_id))
        options = {"tail_rows": prompt.tail_rows, "capacity": 128}
        state, _ = forward.prefill(params, model.config, embedded, Edited((transform,)), **options)
        after, _ = forward.decode_step(params, model.config, state, jnp.zeros(3, jnp.int32))
        return len(state.memory.logits), len(after.memory.logits)

    found = []
    jax.eval_shape(lambda *given: found.append(both(*given)), model.params, jnp.zeros((3, 64, 48)))
    assert found == [calls]


def test_a_shared_prefix_equals_running_both_branches(model, mixed):
    main, contrast, state = run(model, mixed, methods.CMAC())
    main_apart, contrast_apart, apart = run(model, mixed, methods.CMAC(), share_prefix=False)
    assert all(cache.prefix is None for cache in apart.caches)
    assert [cache.prefix.length for cache in state.caches] == [48, 48]
    np.testing.assert_allclose(main, main_apart, rtol=0, atol=1e-5)
    np.testing.assert_allclose(contrast, contrast_apart, rtol=0, atol=1e-5)
    assert np.abs(contrast[:, 0] - main[:, 0]).max() > 0.01


def test_a_mixture_does_not_speak_for_stages_of_a_subclass():
    class Louder(methods.CAPL):
        def weights(self, site, weights):
            return 2 * super().weights(site, weights)

    class Named(methods.CAPL):
        pass

    kinds = (methods.CAPL(), Named(), Louder(), methods.VAF())
    assert [mixes(method) for method in kinds] == [True, True, False, False]
