"""SEVI and CICD against the NumPy reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lvlm_jax import methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.sevi import SEVI, built_in_picture, jensen_shannon
from tests.checkpoints import IMAGE
from tests.methods import compare
from tests.methods.compare import ATOL, EDGES, MIXED
from tests.reference import one_branch, sevi

DEPTH = 5


@pytest.mark.parametrize(
    ("settings", "case", "layouts"),
    [
        ({}, (DEPTH,), MIXED),
        ({"omega": 0.5, "start_layer": 1, "kappa": 0.35}, (DEPTH,), MIXED),
        ({"omega": 4.0, "start_layer": 0, "kappa": 0.5}, (DEPTH,), MIXED),
        ({"omega": 2.0, "start_layer": 1, "kappa": 0.4}, (DEPTH,), EDGES),
        ({"omega": 2.0, "start_layer": 0, "kappa": 0.4}, (3, "mistral_window"), MIXED),
        ({"omega": 2.0, "start_layer": 0, "kappa": 0.5, "variant": "code-qwen"}, (DEPTH,), MIXED),
    ],
    ids=["focused", "mild", "all_layers", "edges", "window", "code_qwen"],
)
def test_equals_the_reference(settings, case, layouts):
    references = compare.assert_one_branch(
        compare.load(*case), layouts, SEVI(**settings), lambda: sevi.Sevi(**settings)
    )
    if settings and layouts == MIXED and len(case) == 1:  # both stages are met
        assert set().union(*(reference.stages for reference in references)) == {"text", "global"}


def test_presets():
    balanced = SEVI.preset("balanced")
    assert [layer for layer in range(12) if balanced.active(layer, 12, "decode")] == [8, 9, 10, 11]
    assert float(balanced.omega) == 0.5 and len(balanced.branches()) == 1
    assert len(SEVI.preset("focused+cicd").branches()) == 2
    assert dataclass_values(SEVI()) == dataclass_values(SEVI.preset("focused"))


def dataclass_values(method):
    leaves, structure = jax.tree_util.tree_flatten(method)
    return [float(leaf) for leaf in leaves], structure


@pytest.mark.parametrize("variant", ["paper", "code", "code-qwen"])
@pytest.mark.parametrize("omega", [0.0, 1.0])
def test_cicd_equals_the_reference(variant, omega):
    case = compare.load(DEPTH)
    size = case.inputs(MIXED)["pixel_values"].shape[-1]
    other = np.random.default_rng(5).normal(size=(3, size, size)).astype(np.float32)
    method = SEVI(cicd=True, variant=variant, omega=omega, start_layer=1, other_image=other)
    main, contrast, combined = case.library(MIXED, method)

    def edit(*sample):
        edited = sevi.Sevi(omega=omega, start_layer=1, variant=variant)
        logits = one_branch.run(*sample, edited)
        assert edited.margin > 2e-6
        return logits

    def others(_, layout):
        return np.stack([other] * layout.count(IMAGE)) if IMAGE in layout else None

    alphas = []
    edits = case.references(edit, MIXED)
    contrasts = case.references(one_branch.run, MIXED, pixels=others, method=one_branch.Plain())
    for row, (layout, want, want_contrast) in enumerate(zip(MIXED, edits, contrasts, strict=True)):
        np.testing.assert_allclose(main[row], want, rtol=0, atol=ATOL)
        np.testing.assert_allclose(contrast[row], want_contrast, rtol=0, atol=ATOL)
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


@pytest.mark.parametrize("variant", ["paper", "code", "code-qwen"])
def test_contrast_strength_over_the_whole_range_of_divergence(variant):
    """From equal branches (no contrast) over small divergences (α at its bound) to opposite ones (J at its bound)."""
    generator = np.random.default_rng(3)
    main = generator.normal(size=(7, 40)) * 2
    scale = np.array([0, 0.003, 0.02, 0.1, 0.5, 2, 12])[:, None]
    contrast = main + scale * generator.normal(size=main.shape)
    method = SEVI(cicd=True, variant=variant)
    readout = methods.Readout(jnp.float32(main), jnp.float32(contrast), None, jnp.ones(len(main), bool))
    got = jax.jit(lambda method, readout: method.combine(readout, ())[0])(method, readout)
    want, alphas, divergences = zip(
        *(sevi.combine(*rows, variant) for rows in zip(main, contrast, strict=True)), strict=True
    )
    np.testing.assert_allclose(got, np.stack(want), rtol=2e-4, atol=1e-3)
    assert alphas[0] == alphas[1] == 0 and 1 <= min(alphas[5:]) < 2
    # Between 1e-4 and 0.1 only the authors' Qwen2-VL files do not contrast.
    small = np.array([1e-4 < j < 0.1 for j in divergences])
    assert small.any() and (np.array(alphas)[small] == 0).all() == (variant == "code-qwen")
    assert variant == "code-qwen" or 3.0 in alphas
    assert variant == "paper" or max(divergences) == 1
    np.testing.assert_allclose(
        jensen_shannon(readout.main, readout.contrast, variant)[1:5],
        [sevi.divergence(*rows, variant) for rows in zip(main, contrast, strict=True)][1:5],
        rtol=1e-2,
        atol=1e-7,
    )


def test_gradients_are_finite_for_equal_and_for_different_branches():
    main = jnp.asarray(np.random.default_rng(4).normal(size=(2, 30)), jnp.float32)
    contrast = main.at[1].set(main[1, ::-1])

    def total(method, main, contrast):
        logits, _ = method.combine(methods.Readout(main, contrast, None, jnp.ones(2, bool)), ())
        return jnp.where(jnp.isfinite(logits), logits, 0).sum()

    for gradient in jax.tree.leaves(jax.grad(total, argnums=(0, 1, 2))(SEVI(cicd=True), main, contrast)):
        assert np.isfinite(gradient).all()


def test_the_built_in_picture():
    picture = built_in_picture(24, 32)
    assert picture.shape == (3, 24, 32) and picture.dtype == np.float32
    from importlib.resources import files

    with files("lvlm_jax.pocket").joinpath("sample.png").open("rb") as file:
        raw = np.asarray(Image.open(file).convert("RGB").resize((32, 24), Image.BICUBIC), float) / 255
    green = (raw[..., 1] - 0.4578275) / 0.26130258
    np.testing.assert_allclose(picture[1], green, atol=1e-5)
    np.testing.assert_array_equal(SEVI(cicd=True).contrast_picture(24, 32), picture)


def test_a_given_picture_takes_the_size_that_is_asked_for():
    given = np.random.default_rng(6).normal(size=(3, 8, 12)).astype(np.float32)
    method = SEVI(cicd=True, other_image=given)
    np.testing.assert_array_equal(method.contrast_picture(8, 12), given)
    smaller = method.contrast_picture(4, 6)
    assert smaller.shape == (3, 4, 6) and smaller.dtype == np.float32
    np.testing.assert_allclose(smaller.mean((1, 2)), given.mean((1, 2)), atol=0.1)


def test_a_picture_of_another_form_is_refused():
    with pytest.raises(LVLMError, match=r"\(8, 12\); expected \[3, height, width\]"):
        SEVI(cicd=True, other_image=np.zeros((8, 12), np.float32)).contrast_picture(4, 4)
