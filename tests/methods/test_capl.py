"""CAPL's cross-image and truncated attention against the NumPy reference."""

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.attention import Context
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import per_image
from lvlm_jax.methods.capl import CAPL
from tests.checkpoints import IMAGE
from tests.methods import compare
from tests.methods.compare import EDGES, MIXED
from tests.reference import capl

DEPTH = 3
THREE = [(2, IMAGE, 3, IMAGE, 1, IMAGE, 4), (5, IMAGE, IMAGE, 2)]


def check(layouts, variety="qwen2_tied_two_feature_layers", **settings):
    exact = {**settings, "rho": settings.get("rho", "0.95")}
    given = {**settings, "rho": float(exact["rho"])}
    return compare.assert_one_branch(compare.load(DEPTH, variety), layouts, CAPL(**given), lambda: capl.Capl(**exact))


@pytest.mark.parametrize("rho", ["0.95", "0.9", "0.4", "0.01", "1"])
def test_cross_image_attention(rho):
    references = check(MIXED, rho=rho)
    keep = {"0.95": 8, "0.9": 8, "0.4": 3, "0.01": 1, "1": 9}[rho]
    assert [len(reference.chosen) for reference in references] == [2 * keep, 0, keep]


@pytest.mark.parametrize("layouts", [EDGES, THREE], ids=["edges", "three_images"])
def test_cross_image_attention_between_other_layouts(layouts):
    check(layouts, sigma=0.8, rho="0.5")


@pytest.mark.parametrize(("tile", "keep"), [(4, (2, 2, 1)), (3, (1, 1, 1)), (100, (5,))])
def test_the_share_is_taken_in_each_tile(tile, keep):
    """Nine tokens an image: whole tiles and a rest. "A tile" longer than the image is the image."""
    references = check(MIXED, rho="0.6", tile=tile)
    assert [len(reference.chosen) for reference in references] == [2 * sum(keep), 0, sum(keep)]


def test_impossible_tiles_are_refused():
    with pytest.raises(LVLMError, match="tile is 0; expected a whole number >= 1"):
        CAPL(tile=0)


def test_explicit_layers():
    check(MIXED, layers=(1, 2))


def test_sliding_window():
    check(MIXED, variety="mistral_window", rho="0.6")


@pytest.mark.parametrize("variant", ["paper", "code-qwen"])
@pytest.mark.parametrize("layouts", [MIXED, EDGES, THREE], ids=["mixed", "edges", "three_images"])
def test_truncated_attention(layouts, variant):
    check(layouts, mode="truncated", variant=variant)


@pytest.mark.parametrize("mode", ["cross", "truncated"])
def test_a_single_image_is_left_alone(mode):
    """In the paper's variants, that is."""
    compare.assert_plain(compare.load(DEPTH), [(3, IMAGE, 11), (9,)], CAPL(mode=mode))


def test_layers_and_phases():
    cross, truncated = CAPL(), CAPL(mode="truncated")
    assert [layer for layer in range(6) if cross.active(layer, 6, "prefill")] == [0, 2, 4]
    assert [layer for layer in range(6) if truncated.active(layer, 6, "prefill")] == [0, 1, 2, 3, 4, 5]
    assert not any(method.active(0, 6, "decode") for method in (cross, truncated))
    assert float(CAPL.preset("glm-4.1v").rho) == pytest.approx(0.9)
    assert CAPL.preset("internvl2.5").tile == 256 and CAPL.preset("qwen2.5-vl").tile is None


def test_of_equal_norms_the_earlier_token_is_selected():
    image_id = jnp.array([[-1, 0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 0]])
    norms = [9, 9, 1, 2, 2, 2, 9, 3, 5, 3, 3, 9]
    embeddings = jnp.sqrt(jnp.array(norms, jnp.float32))[None, :, None]
    context = Context(
        image_id=image_id,
        positions=jnp.arange(12)[None],
        first_row=jnp.zeros((), jnp.int32),
        image_end=jnp.array([11]),
        image_count=3,  # more than there are
    )
    selected = CAPL(rho=0.5).begin(context, embeddings)
    np.testing.assert_array_equal(np.flatnonzero(selected[0]), [3, 4, 7, 8])


@pytest.mark.parametrize("rho", ["0.95", "0.9", "0.1", "0.7", "0.07", "0.29", "0.58"])
def test_the_share_is_rounded_down_as_in_decimal_numbers(rho):
    counts = np.array([1, 7, 9, 10, 20, 50, 64, 100, 144, 200, 256, 576, 1000, 2880])
    inside = jnp.asarray(np.arange(2880)[None, None, :] < counts[:, None, None])  # a sample for each count
    got = per_image.share(np.float32(rho), inside)[:, 0]
    hundredths = round(float(rho) * 100)
    np.testing.assert_array_equal(got, np.maximum(counts * hundredths // 100, 1))
