"""Parts of methods that act on images, words and logits, against libraries, formulas and published facts."""

import colorsys
import dataclasses
from importlib import resources

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from lvlm_jax import LVLM, methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import ICD, SEVI, VCD, VISTA, transforms
from lvlm_jax.methods.base import WarmUp
from lvlm_jax.methods.icd import DISTURBANCE
from lvlm_jax.methods.sevi import built_in_picture, jensen_shannon
from lvlm_jax.methods.vista import unit
from lvlm_jax.pixels import CLIP
from tests import small
from tests.methods.compare import stream
from tests.methods.test_two_branches import VARIANTS, noise_of
from tests.reference import contrast, sevi


def test_vcds_noise_is_gaussian_and_belongs_to_seed_and_place():
    shape = (3, 3, 60, 60)
    noise = noise_of(VCD(), shape, [0, 1, 0])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    np.testing.assert_array_equal(noise[0], noise[2])  # first pictures of two samples
    for other in (noise[1], noise_of(VCD(seed=1), shape, [0, 1, 0])[0]):
        assert abs(np.corrcoef(noise[0].ravel(), other.ravel())[0, 1]) < 0.05


def test_vcds_picture_fades_with_the_step():
    """Facts about the published schedule: hardly any noise after the first step, mostly noise after the last."""
    picture = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32))
    index = jnp.zeros(1, jnp.int32)
    for step in (0, 1, 499, 500, 999):
        method = VCD(noise_step=step)
        difference = method.contrast_pixels(picture, index) - method.contrast_pixels(0 * picture, index)
        np.testing.assert_allclose(difference, np.sqrt(contrast.kept_share(step)) * picture, rtol=0, atol=2e-6)
    assert contrast.kept_share(0) == pytest.approx(1 - 2.2338e-5, abs=1e-8)
    assert 0.55 < contrast.kept_share(500) < 0.8 and 0.05 < contrast.kept_share(999) < 0.1


def test_icds_text_takes_the_place_of_a_system_message_or_stands_behind_the_first_token(model):
    """The sentence replaces the system prompt; without one it comes first, after BOS."""
    assert DISTURBANCE == (
        "You are a confused objects detector to provide a fuzzy overview or impression of the image."
    )
    bare = small.conversation("Is it red?", seed=1)
    conversations = [[{"role": "system", "content": "Be brief. "}, *bare], bare]

    def ids(text):
        return model.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    begun = LVLM(model.params, dataclasses.replace(model.config, bos_token_id=1), model.folder)
    for ours, method, words in (
        (model, ICD(tokens=tuple(ids("Confused? "))), ids("Confused? ")),
        (begun, ICD(prompt="Confused?"), ids("Confused?")),
    ):
        prompt = ours.prepare(conversations)
        _, step = ours.prefill(prompt, method)
        for row in range(2):
            valid = prompt.tokens[row][prompt.image_id[row] >= 0]
            first = int(valid[0] == 1)  # <s>
            span = (first, first + len(ids("Be brief."))) if row == 0 else None
            disturbed = contrast.disturbed(valid.tolist(), words, span, ours.config.bos_token_id)
            given = {"input_ids": np.array([disturbed]), "pixel_values": prompt.pixels[row : row + 1]}
            np.testing.assert_allclose(step.contrast[row], ours.logits(given)[0, -1], rtol=0, atol=1e-4)
            assert np.abs(np.asarray(step.main[row] - step.contrast[row])).max() > 0.05
        assert np.abs(np.asarray(step.contrast[0] - step.contrast[1])).max() > 0.05


PICTURE = np.random.default_rng(0).normal(size=(3, 24, 18)).astype(np.float32)


def test_rituals_transforms():
    """Against SciPy and Pillow."""
    given, key = jnp.asarray(PICTURE), jax.random.key(0)
    np.testing.assert_array_equal(transforms.flip(key, given), PICTURE[:, :, ::-1])
    np.testing.assert_array_equal(transforms.flip_down(key, given), PICTURE[:, ::-1])
    square = PICTURE[:, :18]
    turned = transforms.turned(jnp.asarray(square), jnp.float32(np.pi / 2))
    np.testing.assert_allclose(turned, np.rot90(square, axes=(1, 2)), atol=1e-5)
    black = -np.array(CLIP.mean) / CLIP.deviation
    want = [
        scipy.ndimage.rotate(one, 30, reshape=False, order=0, cval=dark)
        for one, dark in zip(PICTURE, black, strict=True)
    ]
    same = np.isclose(transforms.turned(given, jnp.float32(np.deg2rad(30))), want, atol=1e-5)
    # On the border SciPy is black where the nearest pixel is half one away, and two pixels may be as near.
    assert same.mean() > 0.94 and same[:, 7:-7, 5:-5].mean() > 0.98
    kernel = np.exp(-0.5 * ((np.arange(13) - 6) / 1.7) ** 2)
    want = PICTURE
    for axis in (1, 2):
        want = scipy.ndimage.correlate1d(want, kernel / kernel.sum(), axis=axis, mode="mirror")
    np.testing.assert_allclose(transforms.smoothed(given, jnp.float32(1.7)), want, atol=1e-5)
    got = transforms.enlarged(given, *map(jnp.float32, (3, 2, 12, 9)))
    part = PICTURE[:, 3:15, 2:11]
    want = [np.asarray(Image.fromarray(one).resize((18, 24), Image.Resampling.BILINEAR)) for one in part]
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_rituals_colours():
    """A mean grey of 0.4: each step by hand, the turn of hue by colorsys."""
    mean, deviation = (np.array(part)[:, None, None] for part in CLIP)
    values = np.random.default_rng(1).uniform(0.1, 0.9, (3, 4, 5))
    given = jnp.asarray((values - mean) / deviation, jnp.float32)
    got = transforms.recoloured(given, *map(jnp.float32, (0.8, 1.3, 0.6, 0.2))) * deviation + mean
    luma, want = np.array(transforms.LUMA), 0.8 * values
    want = np.clip(1.3 * want - 0.3 * np.tensordot(luma, want, 1).mean(), 0, 1)
    want = np.clip(0.6 * want + 0.4 * np.tensordot(luma, want, 1), 0, 1)
    for place in np.ndindex(4, 5):
        hue, saturation, value = colorsys.rgb_to_hsv(*want[:, *place])
        want[:, *place] = colorsys.hsv_to_rgb((hue + 0.2) % 1, saturation, value)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_rituals_pictures_are_drawn_by_seed_and_number():
    given = jnp.asarray(PICTURE)
    drawn = {(seed, index): np.asarray(methods.RITUAL(seed=seed).contrast_image(given, index))
             for seed in range(6) for index in range(3)}  # fmt: skip
    assert len({one.tobytes() for one in drawn.values()}) > 8
    np.testing.assert_array_equal(drawn[0, 2], methods.RITUAL().contrast_image(given, 2))
    assert all(one.shape == PICTURE.shape and np.isfinite(one).all() for one in drawn.values())
    for name, change in transforms.ALL.items():
        for seed in range(5):
            assert np.isfinite(change(jax.random.key(seed), given)).all(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_cicds_strength_over_the_whole_range_of_divergence(variant):
    """From equal branches (no contrast) over small divergences (α at its bound) to opposite ones (J at its bound)."""
    generator = np.random.default_rng(3)
    main = generator.normal(size=(7, 40)) * 2
    scale = np.array([0, 0.003, 0.02, 0.1, 0.5, 2, 12])[:, None]
    other = main + scale * generator.normal(size=main.shape)
    readout = methods.Readout(jnp.float32(main), jnp.float32(other), None, jnp.ones(len(main), bool))

    def combined(method, readout):
        return method.combine(readout, ())[0]

    got = jax.jit(combined)(SEVI(cicd=True, variant=variant), readout)
    pairs = list(zip(main, other, strict=True))
    want, alphas, divergences = zip(*(sevi.combine(*rows, variant) for rows in pairs), strict=True)
    np.testing.assert_allclose(got, np.stack(want), rtol=2e-4, atol=1e-3)
    assert alphas[0] == alphas[1] == 0 and 1 <= min(alphas[5:]) < 2
    # Between 1e-4 and 0.1 only the authors' Qwen2-VL files do not contrast.
    small_ones = np.array([1e-4 < j < 0.1 for j in divergences])
    assert small_ones.any() and (np.array(alphas)[small_ones] == 0).all() == (variant == "code-qwen")
    assert variant == "code-qwen" or 3.0 in alphas
    assert variant == "paper" or max(divergences) == 1
    measured = jensen_shannon(readout.main, readout.contrast, variant)[1:5]
    np.testing.assert_allclose(measured, [sevi.divergence(*rows, variant) for rows in pairs][1:5], rtol=1e-2, atol=1e-7)

    def total(method, readout):
        logits = combined(method, readout)
        return jnp.where(jnp.isfinite(logits), logits, 0).sum()

    # Finite where branches are equal and where they are not.
    gradients = jax.grad(total, (0, 1), allow_int=True)(SEVI(cicd=True, variant=variant), readout)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients) if leaf.dtype == jnp.float32)


def test_cicds_picture():
    picture = built_in_picture(24, 32)
    assert picture.shape == (3, 24, 32) and picture.dtype == np.float32
    with resources.files("lvlm_jax.pocket").joinpath("sample.png").open("rb") as file:
        raw = np.asarray(Image.open(file).convert("RGB").resize((32, 24), Image.BICUBIC), float) / 255
    np.testing.assert_allclose(picture[1], (raw[..., 1] - 0.4578275) / 0.26130258, atol=1e-5)
    np.testing.assert_array_equal(SEVI(cicd=True).contrast_picture(24, 32), picture)
    given = np.random.default_rng(6).normal(size=(3, 8, 12)).astype(np.float32)
    method = SEVI(cicd=True, other_image=given)
    np.testing.assert_array_equal(method.contrast_picture(8, 12), given)
    smaller = method.contrast_picture(4, 6)
    assert smaller.shape == (3, 4, 6) and smaller.dtype == np.float32
    np.testing.assert_allclose(smaller.mean((1, 2)), given.mean((1, 2)), atol=0.1)
    with pytest.raises(LVLMError, match=r"\(8, 12\); expected \[3, height, width\]"):
        SEVI(cicd=True, other_image=given[0]).contrast_picture(4, 4)


def test_decos_candidates():
    """Probabilities in another order than the vocabulary's; 0.8 is reached by two tokens, the third is not needed."""

    def candidates(probabilities, top_p, most):
        main = jnp.log(jnp.asarray(probabilities, jnp.float32))
        readout = methods.Readout(main, None, jnp.zeros((1, *main.shape)), None)
        method = methods.DeCo(top_p=np.float32(top_p), candidates=most, layers=(0,))
        return np.isfinite(method.combine(readout, None)[0])

    order = np.array([2, 0, 3, 1])
    shares = np.array([[0.5, 0.3125, 0.125, 0.0625]], np.float32)[:, order]
    for top_p, most, count in (
        (0.9, 20, 3), (0.8, 20, 2), (0.9, 2, 2), (0.0, 20, 1), (1.0, 1, 1), (1.0, 20, 4), (0.2, 20, 1),
    ):  # fmt: skip
        np.testing.assert_array_equal(candidates(shares, top_p, most)[0], order < count)
    # The rest is lost in rounding: 1 + 1e-9 is 1 in float32.
    assert candidates([[1.0, 1e-9, 1e-12]], 1.0, 20).all()
    equal = candidates([[0.2, 0.3, 0.2, 0.3]], 0.7, 20)  # of tokens alike the first is taken
    np.testing.assert_array_equal(equal, [[True, True, False, True]])


def test_vistas_principal_component_of_one_sample():
    """The authors' program adds a unit vector to layer 0's direction if there is one; the paper does not."""
    generator = np.random.default_rng(1)
    seeing, blind = (jnp.asarray(generator.normal(size=(3, 2, 4)).astype(np.float32)) for _ in range(2))
    blind = blind.at[:, 1].set(seeing[:, 1])  # the second sample has no image
    difference, seen = np.array(seeing[1:] - blind[1:]), WarmUp((seeing, blind))
    np.testing.assert_array_equal(VISTA(variant="paper").after_warm_up(seen).vectors, difference)
    difference[0, 0, 0] += 1
    np.testing.assert_array_equal(VISTA().after_warm_up(seen).vectors, difference)


@pytest.mark.parametrize(("variant", "stage"), [("code", "mlp"), ("paper", "residual")])
def test_vista_keeps_norms(variant, stage):
    """Steering turns a row and does not stretch it, in the one stage that the variant names."""
    generator = np.random.default_rng(0)
    hidden = jnp.asarray(generator.normal(size=(2, 5, 16)).astype(np.float32))
    states = generator.normal(size=(2, 4, 2, 16)).astype(np.float32)
    steering = VISTA(lambda_=0.8, variant=variant).after_warm_up(WarmUp(tuple(map(jnp.asarray, states)))).branches()[0]
    for name, place in {"mlp": (stream(1),), "residual": (1, 3, "decode")}.items():
        turned = getattr(steering, name)(*place, hidden)
        norms = np.linalg.norm(hidden, axis=-1)
        np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), norms, rtol=1e-5)
        assert (np.abs(turned - hidden).max() > 0.1) == (name == stage)
    vectors = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])  # zero has no length and no gradient
    np.testing.assert_allclose(unit(vectors), [[0.6, 0.8], [0.0, 0.0]], rtol=0, atol=1e-7)
    gradient = jax.grad(lambda x: unit(x)[:, 0].sum())(vectors)
    assert np.isfinite(gradient).all() and (np.asarray(gradient[1]) == 0).all()
