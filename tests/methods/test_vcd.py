"""VCD through the public face against its NumPy reference."""

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.vcd import VCD
from tests.methods import compare
from tests.methods.compare import EDGES, MIXED
from tests.reference import vcd


def noise_of(method, shape, index):
    """The noise itself: what the method makes of black pictures."""
    noisy = method.contrast_pixels(jnp.zeros(shape), jnp.asarray(index))
    return np.asarray(noisy, np.float64) / np.sqrt(1 - vcd.kept_share(int(method.noise_step)))


def reference(method):
    """The reference with the library's noise; everything else is its own."""

    def run(weights, config, ids, pixels, tokens, **settings):
        noise = None if pixels is None else noise_of(method, pixels.shape, np.arange(len(pixels)))
        return vcd.run(weights, config, ids, pixels, tokens, noise, **settings)

    return run


@pytest.mark.parametrize(
    ("settings", "strengths"),
    [
        ({}, {}),
        ({"beta": 0.2}, {"beta": 0.2}),
        ({"alpha": 2.5, "step": 999}, {"alpha": 2.5, "noise_step": 999, "seed": 7}),
    ],
    ids=["default", "pope", "strong"],
)
def test_equals_the_reference(settings, strengths):
    method = VCD(**strengths)
    factor = 1 + 2 * float(method.alpha)
    compare.assert_contrastive(compare.load(2, "bare"), method, reference(method), factor, MIXED, **settings)


def test_images_at_the_edges_of_the_prompt():
    compare.assert_contrastive(compare.load(2, "bare"), VCD(), reference(VCD()), 3, EDGES)


def test_presets():
    assert VCD.preset("pope") == VCD(alpha=1.0, beta=0.2) and VCD.preset("default") == VCD()


def test_noise_is_gaussian_and_belongs_to_seed_and_place():
    shape = (3, 3, 60, 60)
    noise = noise_of(VCD(), shape, [0, 1, 0])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    np.testing.assert_array_equal(noise[0], noise[2])  # first pictures of two samples
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(noise[0].ravel(), noise_of(VCD(seed=1), shape, [0, 1, 0])[0].ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("step", [0, 1, 499, 500, 999])
def test_the_picture_fades_with_the_step(step):
    picture = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 8, 8)).astype(np.float32))
    method, index = VCD(noise_step=step), jnp.zeros(1, jnp.int32)
    difference = method.contrast_pixels(picture, index) - method.contrast_pixels(0 * picture, index)
    np.testing.assert_allclose(difference, np.sqrt(vcd.kept_share(step)) * picture, rtol=0, atol=2e-6)


def test_schedule():
    """Facts about the published schedule: hardly any noise after the first step, mostly noise after the last."""
    assert vcd.kept_share(0) == pytest.approx(1 - 2.2338e-5, abs=1e-8)
    assert 0.55 < vcd.kept_share(500) < 0.8 and 0.05 < vcd.kept_share(999) < 0.1


@pytest.mark.parametrize("wrong", [{"noise_step": 1000}, {"noise_step": -1}, {"alpha": -0.1}, {"beta": 2}])
def test_impossible_strengths_are_refused(wrong):
    with pytest.raises(LVLMError, match=next(iter(wrong))):
        VCD(**wrong)
