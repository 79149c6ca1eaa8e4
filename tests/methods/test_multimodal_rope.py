"""CMAC, EAH, SEVI and CAPL on Qwen2.5-VL (multimodal positions, grouped queries) against the NumPy references."""

import numpy as np
import pytest
import torch

from lvlm_jax import LVLM, methods
from lvlm_jax.methods.capl import CAPL
from lvlm_jax.methods.eah import EAH
from lvlm_jax.methods.sevi import SEVI
from tests.methods.one_branch import ATOL, STEPS, run_library
from tests.methods.test_cmac import assert_combined
from tests.models.families.patches import QWEN2_5_VL
from tests.reference import capl, cmac, eah, one_branch, qwen2_5_vl, sevi

# Rows and columns of patches: lying and upright images, two, none and one of them, of different lengths.
LAYOUTS = [(2, (4, 12), 3, (8, 4), 4), (9,), (3, (12, 6), 11)]
DEPTH = 3


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(ours, weights, config, inputs, forced tokens, a function of the row giving its ids and images)."""
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    theirs = QWEN2_5_VL.build(folder, 21, text={"num_hidden_layers": DEPTH})
    ours = LVLM.from_pretrained(folder, dtype="float32")
    weights, config = qwen2_5_vl.from_torch(theirs)
    inputs = QWEN2_5_VL.inputs(theirs.config, 22, LAYOUTS)
    forced = np.random.default_rng(31).integers(3, QWEN2_5_VL.word, (len(LAYOUTS), STEPS))
    grids = torch.from_numpy(inputs["image_grid_thw"])
    with torch.no_grad():
        pictures = theirs.model.get_image_features(
            torch.from_numpy(inputs["pixel_values"]), grids
        ).pooler_output
    found = iter(zip(pictures, grids.tolist(), strict=True))
    samples = []
    for row, layout in enumerate(LAYOUTS):
        own = [next(found) for part in layout if isinstance(part, tuple)]
        embeddings = [features.double().numpy() for features, _ in own]
        images = qwen2_5_vl.Images(
            np.concatenate(embeddings) if own else None,
            tuple((height // 2, width // 2) for _, (_, height, width) in own),
        )
        samples.append((inputs["input_ids"][row, inputs["attention_mask"][row].astype(bool)], images))
    return theirs, ours, weights, config, inputs, forced, samples


def test_the_reference_equals_transformers(case):
    theirs, _, weights, config, inputs, _, samples = case
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    with torch.no_grad():
        expected = theirs(**tensors).logits.numpy()
    for row, (ids, images) in enumerate(samples):
        got = qwen2_5_vl.logits(weights, config, ids, images)
        np.testing.assert_allclose(got, expected[row, -len(ids) :], rtol=0, atol=ATOL)


def test_calibrated_positions():
    """An image of two rows and three columns, then one of two rows and one column, each between text."""
    is_image = np.array([0, *[1] * 6, 0, *[1] * 2, 0], bool)
    images = qwen2_5_vl.Images(None, ((2, 3), (2, 1)))
    ordinary = [
        [0, 1, 1, 1, 1, 1, 1, 4, 5, 5, 7],
        [0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 7],
        [0, 1, 2, 3, 1, 2, 3, 4, 5, 5, 7],
    ]
    np.testing.assert_array_equal(images.places(is_image), ordinary)
    calibrated = [
        [0, 1, 1, 1, 1, 1, 1, 2.5, 3.5, 3.5, 4.5],
        [0, 1, 1, 1, 1.5, 1.5, 1.5, 2.5, 3.5, 4, 4.5],
        [0, 1, 1.5, 2, 1, 1.5, 2, 2.5, 3.5, 3.5, 4.5],
    ]
    np.testing.assert_array_equal(images.places(is_image, 2.0), calibrated)


@pytest.mark.parametrize(
    "strengths",
    [
        pytest.param({}, id="paper"),
        pytest.param({"variant": "code", "alpha": 1.0}, id="code"),
        pytest.param({"cmpc": False}, id="imd_only", marks=pytest.mark.slow),
        pytest.param({"imd": False}, id="cmpc_only", marks=pytest.mark.slow),
    ],
)
def test_cmac(case, strengths):
    _, ours, weights, config, inputs, forced, samples = case
    settings = cmac.Settings(**strengths)
    main, contrast, combined = run_library(ours, inputs, forced, methods.CMAC(**strengths))
    contrast = main if contrast is None else contrast
    effects = []
    for row, (ids, images) in enumerate(samples):
        want = cmac.run(
            weights, config, ids, images, forced[row], settings, embed=qwen2_5_vl.embed, places=images.places
        )
        has_image = bool(images.grids)
        # Were a logit this close to its threshold, float32 could decide otherwise than float64: take another seed.
        assert want.margin > 2e-5 and (not has_image or want.gate_margin > 1e-3)
        np.testing.assert_allclose(main[row], want.main, rtol=0, atol=ATOL, err_msg=f"main, sample {row}")
        np.testing.assert_allclose(
            contrast[row], want.contrast, rtol=0, atol=ATOL, err_msg=f"contrast, sample {row}"
        )
        assert_combined(combined[row], want.combined, want.main, settings, has_image)
        plain = run_one_branch(case, row, one_branch.Plain())
        effects.append((np.abs(want.main - plain).max(), np.abs(want.contrast - want.main).max()))
    for moved, (calibrated, distorted) in zip((True, False, True), effects, strict=True):
        assert (calibrated > 0.05) == (moved and settings.cmpc)
        assert (distorted > 0.05) == (moved and settings.imd)


def run_one_branch(case, row, method):
    """Logits [1 + steps, V] of a method's reference on one sample."""
    _, _, weights, config, _, forced, samples = case
    ids, images = samples[row]
    return one_branch.run(
        weights,
        config,
        ids,
        images,
        forced[row],
        method,
        embed=qwen2_5_vl.embed,
        image_ids=images.image_ids,
        places=images.places,
    )


@pytest.mark.parametrize(
    ("method", "make_reference"),
    [
        (EAH(beta=0.03, layer=1), lambda: eah.Eah(beta=0.03, layer=1)),
        (EAH(beta=0.06, layer=1, variant="code"), lambda: eah.Eah(beta=0.06, layer=1, variant="code")),
        (
            SEVI(omega=2.0, start_layer=1, kappa=0.4),
            lambda: sevi.Sevi(omega=2.0, start_layer=1, kappa=0.4),
        ),
        (CAPL(rho=0.6), lambda: capl.Capl(rho="0.6")),
        (CAPL(mode="truncated"), lambda: capl.Capl(mode="truncated")),
    ],
    ids=["eah", "eah_code", "sevi", "capl", "capl_truncated"],
)
def test_single_branch_methods(case, method, make_reference):
    _, ours, _, _, inputs, forced, samples = case
    main, _, combined = run_library(ours, inputs, forced, method)
    references, effects = [], []
    for row, (_, images) in enumerate(samples):
        reference = make_reference()
        want = run_one_branch(case, row, reference)
        plain = run_one_branch(case, row, one_branch.Plain())
        np.testing.assert_allclose(main[row], want, rtol=0, atol=ATOL, err_msg=f"sample {row}")
        np.testing.assert_array_equal(combined[row], main[row])
        if not images.grids:
            np.testing.assert_allclose(want, plain, rtol=0, atol=1e-9)
        references.append(reference)
        effects.append(np.abs(want - plain).max())
    assert max(effects) > 0.05, f"the method changes nothing: {effects}"
    # Were a decision this close, float32 could take it otherwise than float64: take another seed.
    assert min(reference.margin for reference in references) > 2e-6
