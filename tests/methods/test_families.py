"""CMAC, EAH, SEVI and CAPL in models with other layouts of image tokens, against the NumPy references.

Qwen2.5-VL has multimodal positions and grouped queries, InstructBLIP's image tokens are Q-Former queries.
"""

import functools
import tempfile
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from lvlm_jax import LVLM, methods
from tests.checkpoints import IMAGE
from tests.methods import compare
from tests.methods.compare import ATOL, STEPS, run_library
from tests.models.families.instructblip import INSTRUCTBLIP
from tests.models.families.instructblip import QUERIES as TOKENS_OF_AN_IMAGE
from tests.models.families.patches import QWEN2_5_VL
from tests.reference import capl, cmac, eah, llava, one_branch, qwen2_5_vl, sevi

TEXT = {"num_hidden_layers": 3, "num_key_value_heads": 2}
# Rows and columns of patches: lying and upright images, two, none and one of them, of different lengths.
GRIDS = [(2, (4, 12), 3, (8, 4), 4), (9,), (3, (12, 6), 11)]
QUERIES = [(IMAGE, IMAGE, 9), (9,), (IMAGE, 11)]  # images stand first
IMAGES = ((IMAGE,), (), (IMAGE,))  # whether a sample has some


class Case(NamedTuple):
    """One small model, ours and the reference's, with prompts of three samples.

    Attributes:
        samples: token ids and images of each, as the reference takes them.
        layouts: how the reference lays out each sample: `embed`, `image_ids`, and `places` with positions of its own.
        visible: a change of logits that is larger than this is no rounding.
    """

    theirs: Any
    ours: LVLM
    weights: dict
    config: dict
    inputs: dict
    forced: np.ndarray
    samples: list
    layouts: list[dict]
    visible: float

    def library(self, layouts, method, steps=STEPS):
        return run_library(self.ours, self.inputs, self.forced, method)

    def references(self, run, layouts, steps=STEPS, **settings):
        for sample, forced, layout in zip(self.samples, self.forced, self.layouts, strict=True):
            yield run(self.weights, self.config, *sample, forced, **settings, **layout)


def forced_tokens(vocabulary):
    return np.random.default_rng(31).integers(3, vocabulary, (3, STEPS))


def qwen2_5_vl_case(folder):
    theirs = QWEN2_5_VL.build(folder, 21, text={"num_hidden_layers": 3})
    inputs = QWEN2_5_VL.inputs(theirs.config, 22, GRIDS)
    grids = torch.from_numpy(inputs["image_grid_thw"])
    with torch.no_grad():
        features = theirs.model.get_image_features(torch.from_numpy(inputs["pixel_values"]), grids).pooler_output
    found = iter(zip(features, grids.tolist(), strict=True))
    samples, layouts = [], []
    for row, layout in enumerate(GRIDS):
        own = [next(found) for part in layout if isinstance(part, tuple)]
        images = qwen2_5_vl.Images(
            np.concatenate([tokens.double().numpy() for tokens, _ in own]) if own else None,
            tuple((height // 2, width // 2) for _, (_, height, width) in own),
        )
        samples.append((inputs["input_ids"][row, inputs["attention_mask"][row].astype(bool)], images))
        layouts.append({"embed": qwen2_5_vl.embed, "image_ids": images.image_ids, "places": images.places})
    ours = LVLM.from_pretrained(folder, dtype="float32")
    reference = qwen2_5_vl.from_torch(theirs)
    forced = forced_tokens(QWEN2_5_VL.word)
    return Case(theirs, ours, *reference, inputs, forced, samples, layouts, visible=0.05)


def instructblip_case(folder):
    theirs = INSTRUCTBLIP.build(folder, 21, text=TEXT)
    ours = LVLM.from_pretrained(folder, dtype="float32")
    weights, config = llava.from_torch(theirs)
    for old, new in (("model.", f"{llava.LANGUAGE}."), ("lm_head", "lm_head")):
        weights = {name.replace(f"language_model.{old}", new): array for name, array in weights.items()}
    inputs = INSTRUCTBLIP.inputs(theirs.config, 22, QUERIES)
    names = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
    with torch.no_grad():
        found = theirs.get_image_features(**{name: torch.from_numpy(inputs[name]) for name in names})
    features = iter(found.pooler_output.double().numpy())
    samples = []
    for row, layout in enumerate(QUERIES):
        own = [next(features) for _ in range(layout.count(IMAGE))]
        ids = inputs["input_ids"][row, inputs["attention_mask"][row].astype(bool)]
        samples.append((ids, np.concatenate(own) if own else None))

    def embed(weights, config, input_ids, image_tokens):
        x = weights[f"{llava.LANGUAGE}.embed_tokens.weight"][input_ids]
        is_image = np.asarray(input_ids) == config["image_token_index"]
        if is_image.any():
            x[is_image] = image_tokens
        return x

    def image_ids(config, input_ids):
        is_image = np.asarray(input_ids) == config["image_token_index"]
        return np.where(is_image, (np.cumsum(is_image) - 1) // TOKENS_OF_AN_IMAGE + 1, 0)

    inputs = INSTRUCTBLIP.for_us(inputs, theirs.config, ours.config)
    layouts = [{"embed": embed, "image_ids": image_ids}] * 3
    return Case(theirs, ours, weights, config, inputs, forced_tokens(200), samples, layouts, visible=0.01)


@functools.cache
def load(family):
    with tempfile.TemporaryDirectory() as folder:
        return {"qwen2_5_vl": qwen2_5_vl_case, "instructblip": instructblip_case}[family](folder)


def test_the_reference_of_qwen2_5_vl_equals_transformers():
    case = load("qwen2_5_vl")
    with torch.no_grad():
        expected = case.theirs(**{name: torch.from_numpy(array) for name, array in case.inputs.items()}).logits
    for row, (ids, images) in enumerate(case.samples):
        got = qwen2_5_vl.logits(case.weights, case.config, ids, images)
        np.testing.assert_allclose(got, expected.numpy()[row, -len(ids) :], rtol=0, atol=ATOL)


def test_calibrated_positions():
    """An image of two rows and three columns, then one of two rows and one column, each between text."""
    is_image = np.array([0, *[1] * 6, 0, *[1] * 2, 0], bool)
    images = qwen2_5_vl.Images(None, ((2, 3), (2, 1)))
    ordinary = [[0, 1, 1, 1, 1, 1, 1, 4, 5, 5, 7], [0, 1, 1, 1, 2, 2, 2, 4, 5, 6, 7], [0, 1, 2, 3, 1, 2, 3, 4, 5, 5, 7]]
    np.testing.assert_array_equal(images.places(is_image), ordinary)
    calibrated = [
        [0, 1, 1, 1, 1, 1, 1, 2.5, 3.5, 3.5, 4.5],
        [0, 1, 1, 1, 1.5, 1.5, 1.5, 2.5, 3.5, 4, 4.5],
        [0, 1, 1.5, 2, 1, 1.5, 2, 2.5, 3.5, 3.5, 4.5],
    ]
    np.testing.assert_array_equal(images.places(is_image, 2.0), calibrated)


CODE = {"variant": "code", "alpha": 1.0}


@pytest.mark.parametrize(
    ("family", "strengths"),
    [
        pytest.param("qwen2_5_vl", {}, id="qwen2_5_vl-paper"),
        pytest.param("qwen2_5_vl", CODE, id="qwen2_5_vl-code", marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", {"cmpc": False}, id="qwen2_5_vl-imd_only", marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", {"imd": False}, id="qwen2_5_vl-cmpc_only", marks=pytest.mark.slow),
        pytest.param("instructblip", {}, id="instructblip-paper"),
        pytest.param("instructblip", CODE, id="instructblip-code", marks=pytest.mark.slow),
    ],
)
def test_cmac(family, strengths):
    case, settings = load(family), cmac.Settings(**strengths)
    results = compare.assert_cmac(case, IMAGES, strengths, least=2e-5 if family == "qwen2_5_vl" else 2e-6)
    for want, plain, own in zip(results, case.references(one_branch.run, IMAGES), IMAGES, strict=True):
        assert (np.abs(want.main - plain).max() > case.visible) == (bool(own) and settings.cmpc)
        assert (np.abs(want.contrast - want.main).max() > case.visible) == (bool(own) and settings.imd)


SINGLE = {
    "eah": (methods.EAH, eah.Eah, {"beta": 0.03, "layer": 1}),
    "sevi": (methods.SEVI, sevi.Sevi, {"omega": 2.0, "start_layer": 1, "kappa": 0.4}),
    "capl": (methods.CAPL, capl.Capl, {"rho": "0.6"}),
    "eah_code": (methods.EAH, eah.Eah, {"beta": 0.06, "layer": 1, "variant": "code"}),
    "capl_truncated": (methods.CAPL, capl.Capl, {"mode": "truncated"}),
}


QUICK = {"qwen2_5_vl": ("eah", "sevi", "capl", "capl_truncated"), "instructblip": ("eah",)}
PAIRS = [("qwen2_5_vl", name) for name in SINGLE] + [("instructblip", name) for name in ("eah", "sevi", "capl")]


@pytest.mark.parametrize(
    ("family", "name"), [pytest.param(*one, marks=[pytest.mark.slow] * (one[1] not in QUICK[one[0]])) for one in PAIRS]
)
def test_single_branch_methods(family, name):
    (method, make, settings), case = SINGLE[name], load(family)
    given = {name: float(value) if name == "rho" else value for name, value in settings.items()}
    compare.assert_one_branch(case, IMAGES, method(**given), lambda: make(**settings), case.visible)
