"""RITUAL through the public face against its NumPy reference, and its transforms against SciPy, Pillow and colorsys."""

import colorsys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from lvlm_jax import methods
from lvlm_jax.methods import transforms
from lvlm_jax.pixels import CLIP
from tests.methods import compare
from tests.methods.compare import EDGES, MIXED
from tests.reference.branch import Branch, cut, has_image, logits

PICTURE = np.random.default_rng(0).normal(size=(3, 24, 18)).astype(np.float32)
KEY = jax.random.key(0)


def reference(weights, config, ids, pixels, tokens, change, alpha=3.0, beta=0.1):
    """main, contrast, combined, distances to the cut, each [1 + len(tokens), V]."""
    main = logits(weights, config, Branch(weights, config).run(ids, pixels, tokens)[:, -1])
    if not has_image(config, ids):
        return main, main, main, np.full_like(main, np.inf)
    changed = np.stack([np.asarray(change(picture, index)) for index, picture in enumerate(pixels)])
    contrast = logits(weights, config, Branch(weights, config).run(ids, changed, tokens)[:, -1])
    return main, contrast, *cut(main, main + alpha * contrast, beta)


@pytest.mark.parametrize(
    ("settings", "layouts"),
    [({}, MIXED), pytest.param({"seed": 3, "only": "crop", "alpha": 1.0, "beta": 0.3}, EDGES, marks=pytest.mark.slow)],
    ids=["default", "crop"],
)
def test_equals_the_reference(settings, layouts):
    method = methods.RITUAL(**settings)
    fields = {name: value for name, value in settings.items() if name in ("alpha", "beta")}
    case = compare.load(2, "bare")
    compare.assert_contrastive(case, method, reference, 4, layouts, change=method.contrast_image, **fields)


def test_transforms():
    given = jnp.asarray(PICTURE)
    np.testing.assert_array_equal(transforms.flip(KEY, given), PICTURE[:, :, ::-1])
    np.testing.assert_array_equal(transforms.flip_down(KEY, given), PICTURE[:, ::-1])
    square = PICTURE[:, :18]
    np.testing.assert_allclose(
        transforms.turned(jnp.asarray(square), jnp.float32(np.pi / 2)), np.rot90(square, axes=(1, 2)), atol=1e-5
    )
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


def test_colours():
    """A mean grey of 0.4: each step by hand, the turn of hue by colorsys."""
    mean, deviation = (np.array(part)[:, None, None] for part in CLIP)
    values = np.random.default_rng(1).uniform(0.1, 0.9, (3, 4, 5))
    given = jnp.asarray((values - mean) / deviation, jnp.float32)
    got = transforms.recoloured(given, *map(jnp.float32, (0.8, 1.3, 0.6, 0.2))) * deviation + mean
    luma = np.array(transforms.LUMA)
    want = 0.8 * values
    want = np.clip(1.3 * want - 0.3 * np.tensordot(luma, want, 1).mean(), 0, 1)
    want = np.clip(0.6 * want + 0.4 * np.tensordot(luma, want, 1), 0, 1)
    for place in np.ndindex(4, 5):
        hue, saturation, value = colorsys.rgb_to_hsv(*want[:, *place])
        want[:, *place] = colorsys.hsv_to_rgb((hue + 0.2) % 1, saturation, value)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_picture_is_drawn_by_seed_and_number():
    method = methods.RITUAL()
    given = jnp.asarray(PICTURE)
    drawn = {(seed, index): np.asarray(methods.RITUAL(seed=seed).contrast_image(given, index))
             for seed in range(6) for index in range(3)}  # fmt: skip
    assert len({one.tobytes() for one in drawn.values()}) > 8
    np.testing.assert_array_equal(drawn[0, 2], method.contrast_image(given, 2))
    assert all(one.shape == PICTURE.shape and np.isfinite(one).all() for one in drawn.values())
    for name, change in transforms.ALL.items():
        for seed in range(5):
            assert np.isfinite(change(jax.random.key(seed), given)).all(), name
