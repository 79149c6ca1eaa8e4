"""CMAC through the public face, against the NumPy reference: both branches, prefill and cached decode steps."""

import numpy as np
import pytest
import torch

from lvlm_jax import LVLM, methods
from tests import checkpoints
from tests.checkpoints import IMAGE
from tests.methods import compare
from tests.methods.compare import ATOL, EDGES, MIXED, STEPS, load
from tests.reference import cmac
from tests.slow import cases

MAIN, CODE = "qwen2_tied_two_feature_layers", {"variant": "code", "alpha": 1.0}
CASES = {
    "paper": (MAIN, MIXED, {}),
    "code": (MAIN, MIXED, CODE),
    "gate": (MAIN, MIXED, CODE | {"gate": "first"}),
    "last_gate": (MAIN, MIXED, {"gate": "last"}),
    "attention_mask": (MAIN, MIXED, {"distort": "attention_mask", "beta": 0.5}),
    "imd_only": (MAIN, MIXED, {"cmpc": False}),
    "cmpc_only": (MAIN, MIXED, {"imd": False}),
    "neither": (MAIN, MIXED, {"imd": False, "cmpc": False}),
    "edges paper": (MAIN, EDGES, {}),
    "edges code": (MAIN, EDGES, {"variant": "code"}),
    "mistral_window": ("mistral_window", MIXED, {}),
}
MORE = {name: (name, MIXED, {}) for name in ("llama_gqa_all_biases", "qwen3_full_selection", "llama", "yarn_rope")}


# Both gates are met below, over more steps.
SLOW = [*MORE, "gate", "last_gate", "neither", "edges code"]


@pytest.mark.parametrize(("variety", "layouts", "strengths"), cases(CASES | MORE, SLOW))
def test_equals_the_reference(variety, layouts, strengths):
    results = compare.assert_cmac(load(variety=variety), layouts, strengths)
    alphas = {alpha for result in results for alpha in result.alphas}
    assert len(alphas) == 1 + bool(strengths.get("gate"))  # a gate is met both open and closed


WINDOWS = {"first": lambda t: slice(0, min(t + 1, 30)), "last": lambda t: slice(max(t - 29, 0), t + 1)}


@pytest.mark.parametrize(
    ("gate", "steps", "variety"), [("first", 40, "llama_gqa_all_biases"), ("last", 70, "qwen3_full_selection")]
)
def test_the_gate_looks_back_at_thirty_steps_only(gate, steps, variety):
    layouts = [(3, IMAGE, 4), (2, IMAGE, IMAGE, 2)]
    results = compare.assert_cmac(load(variety=variety), layouts, CODE | {"gate": gate}, steps)
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
    for gate in ("last", None):
        assert methods.CMAC.preset("llava-1.5/chair", variant="code", gate=gate).gate == gate


def test_value_noise(tmp_path):
    """The noise is the library's own, so: the main branch is exact, the contrast branch moves, and twice is once.

    It has the mean and deviation of the values: where every value is one constant, the branches are equal.
    """
    case, method = load(variety=MAIN), methods.CMAC(distort="value_noise")
    main, contrast, _ = case.library(MIXED, method)
    np.testing.assert_array_equal(contrast, case.library(MIXED, method)[1])
    for row, want in enumerate(case.references(cmac.run, MIXED, settings=cmac.Settings())):
        np.testing.assert_allclose(main[row], want.main, rtol=0, atol=ATOL)
        difference = np.abs(contrast[row] - main[row]).max(axis=-1)
        assert difference.min() > 0.05 if IMAGE in MIXED[row] else difference.max() < ATOL
    assert np.isfinite(contrast).all()
    theirs = checkpoints.make_llava(None, seed=21, **checkpoints.VARIETIES[MAIN])
    for layer in theirs.model.language_model.layers:
        torch.nn.init.zeros_(layer.self_attn.v_proj.weight)
        torch.nn.init.constant_(layer.self_attn.v_proj.bias, 0.7)
    theirs.save_pretrained(tmp_path)
    constant = compare.Case(theirs, LVLM.from_pretrained(tmp_path, dtype="float32"), {}, {})
    main, contrast, _ = constant.library(MIXED, method)
    np.testing.assert_allclose(contrast, main, rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    "strengths", cases({"paper": ({},), "code": ({"variant": "code", "gate": "last"},)}, slow=["code"])
)
def test_greedy_generation_takes_the_reference_tokens(strengths):
    """The whole driver: every token generated is the arg-max of the reference's combined logits at that step."""
    strengths, case = {"alpha": 1.0, "beta": 0.1} | strengths, load(variety=MAIN)
    out = case.ours.generate(case.inputs(MIXED), methods.CMAC(**strengths), max_new_tokens=STEPS + 1, temperature=0.0)
    tokens = np.stack([np.asarray(row) for row in out.tokens])
    results = case.references(cmac.run, MIXED, tokens[:, :-1], settings=cmac.Settings(**strengths))
    for row, want in enumerate(results):
        np.testing.assert_array_equal(tokens[row], want.combined.argmax(axis=-1))
