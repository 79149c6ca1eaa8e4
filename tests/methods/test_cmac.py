"""CMAC through the public face, against the NumPy reference: both branches, prefill and cached decode steps."""

import numpy as np
import pytest
import torch

from lvlm_jax import LVLM, methods
from tests import checkpoints
from tests.checkpoints import IMAGE
from tests.methods import compare
from tests.methods.compare import ATOL, EDGES, MIXED, STEPS, assert_cut, load, run_library
from tests.reference import cmac

pytestmark = pytest.mark.full_compiler  # bit-equal to plain generation, as users have it

MAIN_VARIETY = "qwen2_tied_two_feature_layers"


def run_reference(case, layouts, settings, tokens=None, noise=None):
    """One reference Result per sample."""
    return list(case.references(cmac.run, layouts, tokens, settings=settings, noise=noise))


def assert_equal_to_reference(variety, layouts, steps=STEPS, **strengths):
    case, settings = load(variety=variety), cmac.Settings(**strengths)
    main, contrast, combined = case.library(layouts, methods.CMAC(**strengths), steps)
    contrast = main if contrast is None else contrast
    results = run_reference(case, layouts, settings, case.forced(layouts, steps))
    for row, want in enumerate(results):
        # Were a logit this close to its threshold, float32 could decide otherwise than float64: take another seed.
        assert want.margin > 2e-5 and (IMAGE not in layouts[row] or want.gate_margin > 1e-3)
        np.testing.assert_allclose(main[row], want.main, rtol=0, atol=ATOL, err_msg=f"main, sample {row}")
        np.testing.assert_allclose(contrast[row], want.contrast, rtol=0, atol=ATOL, err_msg=f"contrast, sample {row}")
        assert_cut(combined[row], want.combined, want.main, settings, IMAGE in layouts[row])
    return results


@pytest.mark.parametrize(
    "strengths",
    [
        {},
        {"variant": "code", "alpha": 1.0},
        {"variant": "code", "alpha": 1.0, "gate": "first"},
        {"gate": "last"},
        {"distort": "attention_mask", "beta": 0.5},
        {"cmpc": False},
        {"imd": False},
        {"imd": False, "cmpc": False},
    ],
    ids=["paper", "code", "gate", "last_gate", "attention_mask", "imd_only", "cmpc_only", "neither"],
)
def test_variants_and_switches(strengths):
    results = assert_equal_to_reference(MAIN_VARIETY, MIXED, **strengths)
    alphas = {alpha for result in results for alpha in result.alphas}
    assert len(alphas) == 1 + bool(strengths.get("gate"))  # a gate is met both open and closed


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
def test_families(variety):
    assert_equal_to_reference(variety, MIXED)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_images_at_the_edges_of_the_prompt(variant):
    assert_equal_to_reference(MAIN_VARIETY, EDGES, variant=variant)


WINDOWS = {"first": lambda t: slice(0, min(t + 1, 30)), "last": lambda t: slice(max(t - 29, 0), t + 1)}


@pytest.mark.parametrize(("gate", "steps"), [("first", 40), ("last", 70)])
def test_the_gate_looks_back_at_thirty_steps_only(gate, steps):
    layouts = [(3, IMAGE, 4), (2, IMAGE, IMAGE, 2)]
    results = assert_equal_to_reference("llama_gqa_all_biases", layouts, steps, variant="code", alpha=1.0, gate=gate)
    assert {alpha for result in results for alpha in result.alphas[30:]} == {0.0, 1.0}
    for name, window in {**WINDOWS, "all steps": lambda t: slice(0, t + 1)}.items():
        alphas = [
            [float(s >= np.mean(result.gate[window(t)])) for t, s in enumerate(result.gate)] for result in results
        ]
        assert (alphas == [result.alphas for result in results]) == (name == gate)


def test_only_chair_presets_of_the_code_have_a_gate():
    for variant in ("paper", "code"):
        assert methods.CMAC(variant=variant).gate is None
        for name in methods.CMAC.PRESETS:
            gated = variant == "code" and name.endswith("/chair")
            assert methods.CMAC.preset(name, variant=variant).gate == ("first" if gated else None)
    assert methods.CMAC.preset("llava-1.5/chair", variant="code", gate="last").gate == "last"
    assert methods.CMAC.preset("llava-1.5/chair", variant="code", gate=None).gate is None


def test_value_noise():
    """The noise is the library's own, so: the main branch is exact, the contrast branch moves, and twice is once."""
    case, method = load(variety=MAIN_VARIETY), methods.CMAC(distort="value_noise")
    main, contrast, _ = case.library(MIXED, method)
    np.testing.assert_array_equal(contrast, case.library(MIXED, method)[1])
    results = run_reference(case, MIXED, cmac.Settings())
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
    case = compare.Case(theirs, LVLM.from_pretrained(tmp_path, dtype="float32"), {}, {})
    main, contrast, _ = case.library(MIXED, methods.CMAC(distort="value_noise"))
    np.testing.assert_allclose(contrast, main, rtol=0, atol=ATOL)


def test_neutral_strengths_equal_plain_generation():
    """alpha = 0, gamma = 1 and a vanishing beta leave nothing of the method, but its branch is alive."""
    case, neutral = load(variety=MAIN_VARIETY), methods.CMAC(alpha=0.0, beta=1e-30, gamma=1.0)
    compare.assert_plain(case, MIXED, neutral)
    main, contrast, _ = case.library(MIXED, neutral)
    assert np.abs(contrast[0] - main[0]).max() > 0.05
    plain, same = (
        case.ours.generate(case.inputs(MIXED), method=method, max_new_tokens=24, temperature=0.0).tokens
        for method in (None, neutral)
    )
    np.testing.assert_array_equal(np.asarray(plain), np.asarray(same))


def test_a_batch_equals_its_samples_alone():
    """No statistic mixes samples, and padding takes no part; the gate's neither."""
    case, method = load(variety=MAIN_VARIETY), methods.CMAC(variant="code", gate="first")
    inputs, forced = case.inputs(MIXED), case.forced(MIXED)
    together = run_library(case.ours, inputs, forced, method)[:2]
    for row in range(len(MIXED)):
        sample = checkpoints.select(case.theirs.config, inputs, row)
        alone = run_library(case.ours, sample, forced[row : row + 1], method)[:2]
        np.testing.assert_allclose([one[row] for one in together], [one[0] for one in alone], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("variant", "gate"), [("paper", None), ("code", None), ("code", "last")])
def test_greedy_generation_takes_the_reference_tokens(variant, gate):
    """The whole driver: every token generated is the arg-max of the reference's combined logits at that step."""
    strengths = {"alpha": 1.0, "beta": 0.1, "variant": variant, "gate": gate}
    case, method = load(variety=MAIN_VARIETY), methods.CMAC(**strengths)
    out = case.ours.generate(case.inputs(MIXED), method=method, max_new_tokens=STEPS + 1, temperature=0.0)
    tokens = np.stack([np.asarray(row) for row in out.tokens])
    results = run_reference(case, MIXED, cmac.Settings(**strengths), tokens[:, :-1])
    for row, want in enumerate(results):
        np.testing.assert_array_equal(tokens[row], want.combined.argmax(axis=-1))
