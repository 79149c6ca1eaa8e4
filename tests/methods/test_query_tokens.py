"""CMAC, EAH, SEVI and CAPL on InstructBLIP, whose image tokens are Q-Former queries, against the NumPy references."""

import numpy as np
import pytest
import torch

from lvlm_jax import LVLM, methods
from tests.checkpoints import IMAGE
from tests.methods.one_branch import ATOL, STEPS, run_library
from tests.methods.test_cmac import assert_combined
from tests.models.families.instructblip import INSTRUCTBLIP, QUERIES
from tests.reference import capl, cmac, eah, llava, one_branch, sevi

# Images and text tokens of each sample; the images stand first.
SAMPLES = [(2, 9), (0, 9), (1, 11)]
TEXT = {"num_hidden_layers": 3, "num_key_value_heads": 2}


def embed(weights, config, input_ids, image_tokens):
    """Embeddings [T, E] of one sample, image tokens replaced by `image_tokens` [N, E]."""
    x = weights[f"{llava.LANGUAGE}.embed_tokens.weight"][input_ids]
    is_image = np.asarray(input_ids) == config["image_token_index"]
    if is_image.any():
        x[is_image] = image_tokens
    return x


def image_ids(config, input_ids):
    """0 for text, k for a query of the k-th image."""
    is_image = np.asarray(input_ids) == config["image_token_index"]
    return np.where(is_image, (np.cumsum(is_image) - 1) // QUERIES + 1, 0)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(ours, reference weights, reference config, inputs, forced tokens, per sample its ids and image tokens)."""
    folder = tmp_path_factory.mktemp("instructblip")
    theirs = INSTRUCTBLIP.build(folder, 21, text=TEXT)
    ours = LVLM.from_pretrained(folder, dtype="float32")
    weights, config = llava.from_torch(theirs)
    weights = {
        name.replace("language_model.model.", f"{llava.LANGUAGE}.").replace(
            "language_model.lm_head", "lm_head"
        ): array
        for name, array in weights.items()
    }
    inputs = INSTRUCTBLIP.inputs(theirs.config, 22, [(*[IMAGE] * images, words) for images, words in SAMPLES])
    names = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
    with torch.no_grad():
        found = theirs.get_image_features(**{name: torch.from_numpy(inputs[name]) for name in names})
    features = iter(found.pooler_output.double().numpy())
    samples = []
    for row, (images, _) in enumerate(SAMPLES):
        own = [next(features) for _ in range(images)]
        ids = inputs["input_ids"][row, inputs["attention_mask"][row].astype(bool)]
        samples.append((ids, np.concatenate(own) if own else None))
    forced = np.random.default_rng(31).integers(3, 200, (len(SAMPLES), STEPS))
    return ours, weights, config, INSTRUCTBLIP.for_us(inputs, theirs.config, ours.config), forced, samples


def reference(case, row, method):
    """Logits [1 + steps, V] of a method's reference on one sample."""
    _, weights, config, _, forced, samples = case
    ids, tokens = samples[row]
    return one_branch.run(weights, config, ids, tokens, forced[row], method, embed=embed, image_ids=image_ids)


@pytest.mark.parametrize(
    "strengths",
    [
        pytest.param({}, id="paper"),
        pytest.param({"variant": "code", "alpha": 1.0}, id="code", marks=pytest.mark.slow),
    ],
)
def test_cmac(case, strengths):
    ours, weights, config, inputs, forced, samples = case
    settings = cmac.Settings(**strengths)
    main, contrast, combined = run_library(ours, inputs, forced, methods.CMAC(**strengths))
    for row, (ids, tokens) in enumerate(samples):
        want = cmac.run(weights, config, ids, tokens, forced[row], settings, embed=embed)
        # Were a logit this close to its threshold, float32 could decide otherwise than float64: take another seed.
        assert want.margin > 2e-6
        np.testing.assert_allclose(main[row], want.main, rtol=0, atol=ATOL, err_msg=f"main, sample {row}")
        np.testing.assert_allclose(
            contrast[row], want.contrast, rtol=0, atol=ATOL, err_msg=f"contrast, sample {row}"
        )
        assert_combined(combined[row], want.combined, want.main, settings, tokens is not None)
        moved = np.abs(want.contrast - want.main).max() > 0.01
        assert moved == (tokens is not None)


@pytest.mark.parametrize(
    ("method", "make_reference"),
    [
        (methods.EAH(beta=0.03, layer=1), lambda: eah.Eah(beta=0.03, layer=1)),
        (
            methods.SEVI(omega=2.0, start_layer=1, kappa=0.4),
            lambda: sevi.Sevi(omega=2.0, start_layer=1, kappa=0.4),
        ),
        (methods.CAPL(rho=0.6), lambda: capl.Capl(rho="0.6")),
    ],
    ids=["eah", "sevi", "capl"],
)
def test_single_branch_methods(case, method, make_reference):
    ours, _, _, inputs, forced, samples = case
    main, _, combined = run_library(ours, inputs, forced, method)
    effects = []
    for row in range(len(samples)):
        want, plain = reference(case, row, make_reference()), reference(case, row, one_branch.Plain())
        np.testing.assert_allclose(main[row], want, rtol=0, atol=ATOL, err_msg=f"sample {row}")
        np.testing.assert_array_equal(combined[row], main[row])
        effects.append(np.abs(want - plain).max())
    assert max(effects) > 0.01, f"the method changes nothing: {effects}"
