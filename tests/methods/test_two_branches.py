"""Methods with a contrast branch, and those that read out earlier layers, against their NumPy references."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.methods import ICD, M3ID, PAI, SEVI, SID, VCD, VISTA, DeCo, DoLa
from tests.checkpoints import IMAGE
from tests.methods import compare
from tests.methods.compare import ATOL, EDGES, MIXED
from tests.reference import causalmm, contrast, exits, one_branch, sevi
from tests.slow import cases, named

SHALLOW, DEEP = (2, "bare"), (4, "bare")
WORDS = (17, 5, 44, 90, 23)
GATED = {"decay": 0.2, "alpha_gate": 0.3}


def noise_of(method, shape, index):
    """VCD's noise alone: its result for black images."""
    noisy = method.contrast_pixels(jnp.zeros(shape), jnp.asarray(index))
    return np.asarray(noisy, np.float64) / np.sqrt(1 - contrast.kept_share(int(method.noise_step)))


def noised(method):
    """The reference with the library's noise; everything else is its own."""
    return {"noise": lambda pixels: noise_of(method, pixels.shape, np.arange(len(pixels)))}


STRONG_VCD, CROP = VCD(alpha=2.5, noise_step=999, seed=7), methods.RITUAL(seed=3, only="crop", alpha=1.0, beta=0.3)


def crop(picture, index):
    """The crop of `CROP` for an image of the reference, which is a NumPy array."""
    return CROP.contrast_image(jnp.asarray(picture), index)


STRONG_AVISC, ONE = methods.AvisC(gamma=0.9, lambda_=0, alpha=2, beta=0.3), methods.DAMRO(tokens=1, alpha=1, beta=0.2)
CUT = {"alpha": 2.0, "beta": 0.3}
# Method, its reference and what that is given besides, prompts, model, and the factor on rounding.
CASES = {
    "vcd": (VCD(), contrast.vcd, noised(VCD()), MIXED, SHALLOW, 3),
    "vcd edges": (VCD(), contrast.vcd, noised(VCD()), EDGES, SHALLOW, 3),
    "vcd pope": (VCD(beta=0.2), contrast.vcd, noised(VCD()) | {"beta": 0.2}, MIXED, SHALLOW, 3),
    "vcd strong": (STRONG_VCD, contrast.vcd, noised(STRONG_VCD) | {"alpha": 2.5, "step": 999}, MIXED, SHALLOW, 6),
    "icd": (ICD(tokens=WORDS), contrast.icd, {"words": WORDS}, MIXED, SHALLOW, 3),
    "icd strong": (ICD(tokens=WORDS, **CUT), contrast.icd, {"words": WORDS} | CUT, EDGES, SHALLOW, 5),
    "m3id": (M3ID(), contrast.m3id, {}, MIXED, SHALLOW, 1.4),
    "m3id gated": (M3ID(**GATED), contrast.m3id, GATED, MIXED, SHALLOW, 9),
    "m3id gated edges": (M3ID(**GATED), contrast.m3id, GATED, EDGES, SHALLOW, 9),
    "m3id port": (M3ID(variant="port"), contrast.m3id, {"variant": "port"}, MIXED, SHALLOW, 1.4),
    "m3id strong port": (M3ID(variant="port", decay=0.2, beta=0.3), contrast.m3id,
                         {"variant": "port", "decay": 0.2, "beta": 0.3}, EDGES, SHALLOW, 9),
    "pai": (PAI(), contrast.pai, {}, MIXED, DEEP, 3.2),
    "pai edges": (PAI(), contrast.pai, {}, EDGES, DEEP, 3.2),
    "pai strong": (PAI(alpha=0.9, gamma=1.7, beta=0.3), contrast.pai, {"alpha": 0.9, "gamma": 1.7, "beta": 0.3}, MIXED,
                   DEEP, 4.4),
    "pai layers": (PAI(layers=(1, 3)), contrast.pai, {"layers": (1, 3)}, MIXED, DEEP, 3.2),
    "pai range": (PAI(start_layer=0.0, end_layer=0.5), contrast.pai, {"layers": (0, 1)}, MIXED, DEEP, 3.2),
    "sid": (SID(keep=4), contrast.sid, {"keep": 4}, MIXED, DEEP, 2),
    "sid edges": (SID(keep=4), contrast.sid, {"keep": 4}, EDGES, DEEP, 2),
    "sid one": (SID(keep=1, alpha=1.5, beta=0.3), contrast.sid, {"keep": 1, "alpha": 1.5, "beta": 0.3}, MIXED, DEEP, 4),
    "sid from 1": (SID(keep=7, start_layer=1), contrast.sid, {"keep": 7, "first_layer": 1}, EDGES, DEEP, 2),
    # Image tokens that the last row cannot see take no part in the ranking.
    "sid window": (SID(keep=3), contrast.sid, {"keep": 3}, MIXED, (4, "bare_window"), 2),
    "ritual": (methods.RITUAL(), contrast.ritual, {"change": methods.RITUAL().contrast_image}, MIXED, SHALLOW, 4),
    "ritual crop": (CROP, contrast.ritual, {"change": crop, "alpha": 1.0, "beta": 0.3}, EDGES, SHALLOW,
                    4),
    "nolan": (methods.NoLan(), contrast.nolan, {}, MIXED, DEEP, 4.2),
    "avisc": (methods.AvisC(lambda_=0.2), contrast.avisc, {"lambda_": 0.2}, MIXED, DEEP, 3),
    "avisc strong": (STRONG_AVISC, contrast.avisc, {"gamma": 0.9, "lambda_": 0, "alpha": 2, "beta": 0.3}, EDGES, DEEP,
                     5),
    "damro": (methods.DAMRO(tokens=3), contrast.damro, {"keep": 3}, MIXED, DEEP, 5),
    "damro one": (ONE, contrast.damro, {"keep": 1, "alpha": 1, "beta": 0.2}, EDGES, DEEP, 3),
    "causalmm": (methods.CausalMM(), causalmm.run, {}, MIXED, DEEP, 3),
    "causalmm seed": (methods.CausalMM(gamma=1, beta=0.2, seed=7), causalmm.run, {"gamma": 1, "beta": 0.2, "seed": 7},
                      EDGES, DEEP, 5),
}  # fmt: skip
# Further strengths and layouts of a method whose other cases are quick.
SLOW = ("vcd edges", "icd strong", "m3id gated edges", "m3id strong port", "pai edges", "pai layers", "sid one")
SLOW += ("sid edges", "ritual crop", "avisc strong", "damro one", "causalmm seed")
UNCUT = ("nolan", "m3id", "m3id gated", "m3id gated edges")


@pytest.mark.parametrize("name", cases({name: (name,) for name in CASES}, SLOW))
def test_equals_the_reference(name):
    method, run, settings, layouts, case, factor = CASES[name]
    compare.assert_contrastive(compare.load(*case), method, run, factor, layouts, name not in UNCUT, **settings)


def test_icds_words_take_the_place_of_the_system_prompt():
    """Prefill and cached steps: a system prompt inside the first text, one that opens the prompt, and none."""
    case, spans = compare.load(*SHALLOW), [(1, 3), (0, 4), (0, 0)]
    prompt = case.ours.prepare(case.inputs(MIXED))
    padding = prompt.tokens.shape[1] - prompt.lengths
    prompt = dataclasses.replace(prompt, system=np.asarray(spans) + padding[:, None])
    main, other, combined = compare.run_library(case.ours, prompt, case.forced(MIXED), ICD(tokens=WORDS))
    each = iter(spans)
    wanted = case.references(lambda *sample: contrast.icd(*sample, words=WORDS, system=next(each)), MIXED)
    before = case.library(MIXED, ICD(tokens=WORDS))[1]  # no system prompt is known
    for row, want in enumerate(wanted):
        compare.assert_close(main[row], want[0], f"main {row}")
        compare.assert_close(other[row], want[1], f"contrast {row}")
        compare.assert_combined(combined[row], want[2], want[3], 3)
        assert (np.abs(other[row] - before[row]).max() > 0.05) == (spans[row] != (0, 0))


def test_m3id_leaves_sure_tokens_alone_and_grows_from_nothing():
    """The paper's gate is met open and closed; where it is closed the logits are the main ones."""
    case = compare.load(*SHALLOW)
    main, other, combined = case.library(MIXED, M3ID(**GATED))
    closed = np.exp(one_branch.log_softmax(main)).max(axis=-1) >= GATED["alpha_gate"]
    closed[:, 0] = True  # where the factor is 0
    closed[1] = True  # the sample without an image
    np.testing.assert_array_equal(combined[closed], main[closed])
    assert (np.abs(combined - main).max(axis=-1)[~closed] > 0.01).all()
    assert closed[:, 1:].any() and not closed.all()
    main, other, combined = case.library(MIXED, M3ID(decay=0.1, variant="port"))
    kept = np.isfinite(combined)
    np.testing.assert_array_equal(combined[:, 0][kept[:, 0]], main[:, 0][kept[:, 0]])
    for step in range(1, compare.STEPS + 1):
        moved, apart = combined[0, step] - main[0, step], main[0, step] - other[0, step]
        share = moved[kept[0, step]] / apart[kept[0, step]]
        np.testing.assert_allclose(share, np.expm1(0.1 * step), rtol=1e-2)
    for variant in ("paper", "port"):  # however long the answer
        _, _, combined = case.library(MIXED, M3ID(decay=1000.0, variant=variant))
        assert not np.isnan(combined).any() and np.isfinite(combined).any(axis=-1).all()


def test_sid_chooses_anew_in_every_call_and_keeps_few_image_tokens_all():
    """In the tests' model the choice changes, so keeping the prompt's choice would fail the comparison above."""
    case = compare.load(*DEEP)
    for row, want in enumerate(case.references(contrast.sid, MIXED, keep=4)):
        assert len(set(want[5])) > (1 if IMAGE in MIXED[row] else 0)
    main, other, _ = case.library(MIXED, SID())  # keeps 100
    np.testing.assert_allclose(other, main, rtol=0, atol=1e-5)


VARIANTS = ["paper", "code", "code-qwen"]


@pytest.mark.parametrize("variant", named(VARIANTS, slow=VARIANTS[1:]))
@pytest.mark.parametrize("omega", [0.0, 1.0])
def test_cicd_equals_the_reference(variant, omega):
    case = compare.load(5)
    size = case.inputs(MIXED)["pixel_values"].shape[-1]
    other = np.random.default_rng(5).normal(size=(3, size, size)).astype(np.float32)
    method = SEVI(cicd=True, variant=variant, omega=omega, start_layer=1, other_image=other)
    main, branch, combined = case.library(MIXED, method)

    def edit(*sample):
        edited = sevi.Sevi(omega=omega, start_layer=1, variant=variant)
        logits = one_branch.run(*sample, edited)
        assert edited.margin > 2e-6
        return logits

    def others(_, layout):
        return np.stack([other] * layout.count(IMAGE)) if IMAGE in layout else None

    alphas, edits = [], case.references(edit, MIXED)
    contrasts = case.references(one_branch.run, MIXED, pixels=others)
    for row, (layout, want, want_contrast) in enumerate(zip(MIXED, edits, contrasts, strict=True)):
        np.testing.assert_allclose(main[row], want, rtol=0, atol=ATOL)
        np.testing.assert_allclose(branch[row], want_contrast, rtol=0, atol=ATOL)
        if IMAGE not in layout:
            np.testing.assert_array_equal(combined[row], main[row])
            continue
        for step in range(len(want)):
            logits, alpha, _ = sevi.combine(want[step], want_contrast[step], variant)
            alphas.append(alpha)
            clear = np.abs(want[step] - want[step].max() - np.log(0.1)) > 2 * ATOL
            np.testing.assert_allclose(combined[row, step][clear], logits[clear], rtol=0, atol=8 * ATOL)
    assert min(alphas) >= 1 or variant == "code-qwen"
    assert len({round(alpha, 3) for alpha in alphas}) > 5


DECO = {
    "default": ({"exits": (2, 3)}, {}),
    "explicit": ({"exits": (0, 1, 3), "alpha": 2.0, "most": 3}, {"layers": (0, 1, 3), "alpha": 2.0, "candidates": 3}),
    "range": ({"exits": (0, 1, 2), "top_p": 0.3}, {"start_layer": 0, "end_layer": 3, "top_p": 0.3}),
    "all_tokens": ({"exits": (2, 3), "top_p": 1.0, "most": 120},
                   {"start_layer": 0.5, "end_layer": None, "top_p": 1.0, "candidates": 120}),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "fields"), cases(DECO, slow=["range", "all_tokens"]))
def test_deco(settings, fields):
    case = compare.load(4, "bare", seed=23)
    main, other, combined = case.library(MIXED, DeCo(**fields))
    assert other is None
    chosen, counts = set(), set()
    for row, want in enumerate(case.references(exits.deco, MIXED, **settings)):
        if settings.get("most") != 120:  # else every token is a candidate, whatever its neighbours
            assert want[4] > 1e-5, "a choice is too close; take another seed"
        compare.assert_close(main[row], want[0], f"main {row}")
        kept = np.isfinite(want[1])
        compare.assert_close(combined[row][kept], want[1][kept], f"combined {row}", 3)
        assert np.isneginf(combined[row][~kept]).all() and kept.sum(axis=-1).tolist() == want[3]
        assert np.abs(combined[row] - main[row])[kept].max() > 0.2
        chosen |= set(want[2])
        counts |= set(want[3])
    assert len(chosen) > 1, "samples and steps should disagree about the layer"
    assert max(counts) <= settings.get("most", 20)
    assert settings.get("most") or len(counts) > 1


DOLA = {
    "low": ({"layers": "low"}, 0.1),
    "high_code": ({"layers": "high", "variant": "code"}, 0.1),
    "low_code": ({"layers": "low", "variant": "code"}, 0.02),
    "explicit": ({"layers": (0, 2, 3, 5)}, 0.5),
}


@pytest.mark.parametrize(("fields", "beta"), cases(DOLA, slow=["low_code", "explicit"]))
def test_dola(fields, beta):
    case = compare.load(6, "bare")
    main, other, combined = case.library(MIXED, DoLa(beta=beta, **fields))
    assert other is None
    layers = exits.buckets(6).get(fields["layers"], fields["layers"])
    settings = {"exits": layers, "beta": beta, "norm": fields.get("variant") != "code"}
    chosen = set()
    for row, want in enumerate(case.references(exits.dola, MIXED, **settings)):
        assert want[4] > 1e-5, "a choice of layer is too close; take another seed"
        compare.assert_close(main[row], want[0], f"main {row}")
        compare.assert_combined(combined[row], want[1], want[2], 3, f"combined {row}")
        chosen |= set(want[3])
    # Without the final norm one exit always wins; otherwise samples and steps should disagree about the layer.
    assert "variant" in fields or len(chosen) > 1


STEERED = {"lambda_": 0.6, "gamma": 0.5}
# What the reference is given, what the method is given, prompts.
STEERINGS = {
    "default": ({"exits": (3,)}, {}, MIXED),
    "edges": ({"exits": (3,)}, {}, EDGES),
    "strong": ({"exits": (1, 3), "strength": 0.6, "gamma": 0.5}, {"layers": (1, 3)} | STEERED, MIXED),
    "away": ({"exits": (1, 2), "strength": -0.2}, {"start_layer": 1, "end_layer": 3, "lambda_": -0.2}, MIXED),
    "paper": ({"exits": (3,), "variant": "paper"}, {"variant": "paper"}, MIXED),
    "strong paper": ({"exits": (0, 2), "strength": 0.6, "gamma": 0.5, "variant": "paper"},
                     {"layers": (0, 2), "variant": "paper"} | STEERED, EDGES),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "fields", "layouts"), cases(STEERINGS, slow=["edges", "strong", "strong paper"]))
def test_vista(settings, fields, layouts):
    case = compare.load(*DEEP)
    plain, _, _ = case.library(layouts, None)
    main, other, combined = case.library(layouts, VISTA(**fields))
    assert other is None
    for row, want in enumerate(case.references(exits.vista, layouts, **settings)):
        compare.assert_close(main[row], want[0], f"main {row}")
        compare.assert_close(combined[row], want[1], f"combined {row}", 2)
        if IMAGE in layouts[row]:
            assert np.abs(main[row] - plain[row]).max(axis=-1).min() > 0.05
            assert np.abs(combined[row] - main[row]).max(axis=-1).min() > 0.05
        else:
            np.testing.assert_allclose(combined[row], plain[row], rtol=0, atol=1e-5)
