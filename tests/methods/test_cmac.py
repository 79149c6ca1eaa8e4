"""CMAC through the public face, against the NumPy reference: both branches, prefill and cached decode steps."""

import functools

import numpy as np
import pytest
import torch

from lvlm_jax import LVLM, methods
from tests import checkpoints
from tests.checkpoints import IMAGE
from tests.methods.one_branch import run_library
from tests.reference import cmac, llava

pytestmark = pytest.mark.full_compiler  # bit-equal to plain generation, as users have it

MIXED = [(4, IMAGE, 3, IMAGE, 6), (9,), (3, IMAGE, 11)]
# An image that opens the prompt, two images side by side, an image that ends the prompt.
EDGES = [(IMAGE, 7), (2, IMAGE, IMAGE, 1), (5, IMAGE)]
STEPS = 8
ATOL = 1e-4
MAIN_VARIETY = "qwen2_tied_two_feature_layers"


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """load(variety) -> (transformers' model, ours, reference weights, reference config), made once each."""

    @functools.cache
    def make(variety):
        folder = tmp_path_factory.mktemp(variety)
        theirs = checkpoints.make_llava(folder, seed=21, **checkpoints.VARIETIES[variety])
        return theirs, LVLM.from_pretrained(folder, dtype="float32"), *llava.from_torch(theirs)

    return make


def forced_tokens(config, rows, steps=STEPS):
    """Int[rows, steps] text tokens."""
    return np.random.default_rng(31).integers(3, config.text_config.vocab_size - 1, (rows, steps))


def run_reference(theirs, weights, config, inputs, forced, settings, noise=None):
    """One reference Result per sample of the batch."""
    results = []
    for row in range(len(forced)):
        sample = checkpoints.select(theirs.config, inputs, row)
        pixels = sample.get("pixel_values")
        ids = sample["input_ids"][0]
        results.append(cmac.run(weights, config, ids, pixels, forced[row], settings, noise))
    return results


def assert_combined(got, want, main, settings, has_image):
    """Combined logits [T, V]: equal inside the cut, −inf outside, tokens within rounding of the cut left out."""
    with np.errstate(divide="ignore"):
        cut = main.max(-1, keepdims=True) + np.log(settings.beta)
    clear = np.abs(main - cut) > 2 * ATOL
    kept = np.isfinite(want)
    np.testing.assert_allclose(
        got[kept & clear], want[kept & clear], rtol=0, atol=ATOL * (1 + 2 * settings.alpha)
    )
    if has_image:
        assert np.isneginf(got[~kept & clear]).all()


def assert_equal_to_reference(load, variety, layouts, steps=STEPS, **strengths):
    theirs, ours, weights, config = load(variety)
    settings = cmac.Settings(**strengths)
    inputs = checkpoints.random_inputs(theirs.config, seed=22, layouts=layouts)
    forced = forced_tokens(theirs.config, len(layouts), steps)
    main, contrast, combined = run_library(ours, inputs, forced, methods.CMAC(**strengths))
    contrast = main if contrast is None else contrast
    results = run_reference(theirs, weights, config, inputs, forced, settings)
    for row, want in enumerate(results):
        # Were a logit this close to its threshold, float32 could decide otherwise than float64: take another seed.
        assert want.margin > 2e-5 and (IMAGE not in layouts[row] or want.gate_margin > 1e-3)
        np.testing.assert_allclose(main[row], want.main, rtol=0, atol=ATOL, err_msg=f"main, sample {row}")
        np.testing.assert_allclose(
            contrast[row], want.contrast, rtol=0, atol=ATOL, err_msg=f"contrast, sample {row}"
        )
        assert_combined(combined[row], want.combined, want.main, settings, IMAGE in layouts[row])
    return results


@pytest.mark.parametrize(
    "strengths",
    [
        {},
        {"variant": "code", "alpha": 1.0},
        {"distort": "attention_mask", "beta": 0.5},
        {"cmpc": False},
        {"imd": False},
        {"imd": False, "cmpc": False},
    ],
    ids=["paper", "code", "attention_mask", "imd_only", "cmpc_only", "neither"],
)
def test_variants_and_switches(load, strengths):
    results = assert_equal_to_reference(load, MAIN_VARIETY, MIXED, **strengths)
    if strengths.get("variant") == "code":  # the gate is met both open and closed
        assert {0.0, 1.0} <= {alpha for result in results for alpha in result.alphas}


@pytest.mark.parametrize(
    "variety",
    [
        "llama_gqa_all_biases",
        "qwen3_full_selection",
        "mistral_window",
        pytest.param("llama", marks=pytest.mark.slow),
        pytest.param("yarn_rope", marks=pytest.mark.slow),
    ],
)
def test_families(load, variety):
    assert_equal_to_reference(load, variety, MIXED)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_images_at_the_edges_of_the_prompt(load, variant):
    assert_equal_to_reference(load, MAIN_VARIETY, EDGES, variant=variant)


def test_the_gate_looks_back_at_the_first_thirty_steps_only(load):
    layouts = [(3, IMAGE, 4), (2, IMAGE, IMAGE, 2)]
    results = assert_equal_to_reference(
        load, "llama_gqa_all_biases", layouts, steps=40, variant="code", alpha=1.0
    )
    assert {alpha for result in results for alpha in result.alphas[30:]} == {0.0, 1.0}
    for mean_since in (lambda t: 0, lambda t: max(t - 29, 0)):  # means over all steps, over the last thirty
        other = [
            [float(s >= np.mean(result.gate[mean_since(t) : t + 1])) for t, s in enumerate(result.gate)]
            for result in results
        ]
        assert other != [result.alphas for result in results]


def test_value_noise(load):
    """The noise is the library's own, so: the main branch is exact, the contrast branch moves, and twice is once."""
    theirs, ours, weights, config = load(MAIN_VARIETY)
    inputs = checkpoints.random_inputs(theirs.config, seed=22, layouts=MIXED)
    forced = forced_tokens(theirs.config, len(MIXED))
    method = methods.CMAC(distort="value_noise")
    main, contrast, _ = run_library(ours, inputs, forced, method)
    again = run_library(ours, inputs, forced, method)
    np.testing.assert_array_equal(contrast, again[1])
    results = run_reference(theirs, weights, config, inputs, forced, cmac.Settings())
    for row, layout in enumerate(MIXED):
        np.testing.assert_allclose(main[row], results[row].main, rtol=0, atol=ATOL)
        difference = np.abs(contrast[row] - main[row]).max(axis=-1)
        if IMAGE in layout:
            assert difference.min() > 0.05 and np.isfinite(contrast).all()
        else:
            assert difference.max() < ATOL


def test_value_noise_has_the_mean_and_deviation_of_the_values(tmp_path):
    """Where every value is one constant, so is the noise, and the contrast branch equals the main one."""
    theirs = checkpoints.make_llava(None, seed=21, **checkpoints.VARIETIES[MAIN_VARIETY])
    for layer in theirs.model.language_model.layers:
        torch.nn.init.zeros_(layer.self_attn.v_proj.weight)
        torch.nn.init.constant_(layer.self_attn.v_proj.bias, 0.7)
    theirs.save_pretrained(tmp_path)
    inputs = checkpoints.random_inputs(theirs.config, seed=22, layouts=MIXED)
    forced = forced_tokens(theirs.config, len(MIXED))
    ours = LVLM.from_pretrained(tmp_path, dtype="float32")
    main, contrast, _ = run_library(ours, inputs, forced, methods.CMAC(distort="value_noise"))
    np.testing.assert_allclose(contrast, main, rtol=0, atol=ATOL)


def test_neutral_strengths_equal_plain_generation(load):
    """alpha = 0, gamma = 1 and a vanishing beta leave nothing of the method."""
    theirs, ours, _, _ = load(MAIN_VARIETY)
    inputs = checkpoints.random_inputs(theirs.config, seed=22, layouts=MIXED)
    forced = forced_tokens(theirs.config, len(MIXED))
    plain, _, _ = run_library(ours, inputs, forced, None)
    neutral = methods.CMAC(alpha=0.0, beta=1e-30, gamma=1.0)
    main, contrast, combined = run_library(ours, inputs, forced, neutral)
    np.testing.assert_allclose(main, plain, rtol=0, atol=1e-5)
    np.testing.assert_allclose(combined, plain, rtol=0, atol=1e-5)
    assert np.abs(contrast[0] - main[0]).max() > 0.05  # the branch is alive, only its weight is 0
    tokens = [
        ours.generate(inputs, method=method, max_new_tokens=24, temperature=0.0).tokens
        for method in (None, neutral)
    ]
    np.testing.assert_array_equal(np.asarray(tokens[0]), np.asarray(tokens[1]))


def test_a_batch_equals_its_samples_alone(load):
    """No statistic mixes samples, and padding takes no part; the code variant has the gate's besides."""
    theirs, ours, _, _ = load(MAIN_VARIETY)
    inputs = checkpoints.random_inputs(theirs.config, seed=22, layouts=MIXED)
    forced = forced_tokens(theirs.config, len(MIXED))
    method = methods.CMAC(variant="code")
    main, contrast, _ = run_library(ours, inputs, forced, method)
    for row in range(len(MIXED)):
        sample = checkpoints.select(theirs.config, inputs, row)
        alone = run_library(ours, sample, forced[row : row + 1], method)
        np.testing.assert_allclose(main[row], alone[0][0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(contrast[row], alone[1][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_greedy_generation_takes_the_reference_tokens(load, variant):
    """The whole driver: every token generated is the arg-max of the reference's combined logits at that step."""
    theirs, ours, weights, config = load(MAIN_VARIETY)
    inputs = checkpoints.random_inputs(theirs.config, seed=22, layouts=MIXED)
    method = methods.CMAC(alpha=1.0, beta=0.1, variant=variant)
    out = ours.generate(inputs, method=method, max_new_tokens=STEPS + 1, temperature=0.0)
    tokens = np.stack([np.asarray(row) for row in out.tokens])
    settings = cmac.Settings(alpha=1.0, beta=0.1, variant=variant)
    results = run_reference(theirs, weights, config, inputs, tokens[:, :-1], settings)
    for row, want in enumerate(results):
        np.testing.assert_array_equal(tokens[row], want.combined.argmax(axis=-1))
