"""SID through the public face against its NumPy reference."""

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.attention import Site
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.sid import SID, LeastAttended
from tests.checkpoints import IMAGE
from tests.methods import compare
from tests.methods.compare import EDGES, MIXED
from tests.reference import sid


@pytest.mark.parametrize(
    ("keep", "settings", "fields"),
    [
        (4, {}, {}),
        (1, {"alpha": 1.5, "beta": 0.3}, {"alpha": 1.5, "beta": 0.3}),
        (7, {"first_layer": 1}, {"start_layer": 1}),
    ],
    ids=["default", "one_token", "from_layer_1"],
)
@pytest.mark.parametrize("layouts", [MIXED, EDGES], ids=["mixed", "edges"])
def test_equals_the_reference(keep, settings, fields, layouts):
    method = SID(keep=keep, **fields)
    factor = 1 + 2 * float(method.alpha)
    compare.assert_contrastive(compare.load(4, "bare"), method, sid.run, factor, layouts, keep=keep, **settings)


def test_sliding_windows():
    """Image tokens that the last row cannot see take no part in the ranking."""
    case = compare.load(4, "bare_window")
    compare.assert_contrastive(case, SID(keep=3), sid.run, 2, MIXED, keep=3)


def test_few_image_tokens_are_all_kept():
    case = compare.load(4, "bare")
    main, contrast, _ = case.library(MIXED, SID())  # keeps 100
    np.testing.assert_allclose(contrast, main, rtol=0, atol=1e-5)


def test_the_choice_is_made_anew_in_every_call():
    """In the model of these tests; so a choice kept from the prompt would fail the comparison above."""
    case = compare.load(4, "bare")
    for row, want in enumerate(case.references(sid.run, MIXED, keep=4)):
        assert len(set(want[5])) > (1 if IMAGE in MIXED[row] else 0)


def test_of_equal_weights_the_earlier_tokens_are_kept():
    image = np.array([[False, True, True, True, True, False]])
    weights = np.array([0.5, 0.1, 0.1, 0.05, 0.1, 0.15], np.float32)[None, None, None]
    site = Site(
        layer=1,
        num_layers=4,
        phase="decode",
        image_id=jnp.asarray(image.astype(np.int32)),
        image_count=1,
        image=jnp.asarray(image),
        after_image=jnp.zeros((1, 6), bool),
        system=jnp.zeros((1, 6), bool),
        generated=jnp.zeros((1, 6), bool),
        row_index=jnp.asarray([5]),
        post_image=jnp.ones((1, 1), bool),
        mask=jnp.ones((1, 1, 6), bool),
        logits=jnp.log(weights),
        carry=jnp.asarray(image),
        read_values=lambda: None,
        project=lambda heads: None,
    )
    kept = LeastAttended(3, 2, None, None).observe(site, jnp.asarray(weights))
    np.testing.assert_array_equal(kept, [[False, True, True, True, False, False]])


def test_layer_zero_has_no_layer_before():
    with pytest.raises(LVLMError, match="start_layer of at least 1"):
        LeastAttended(3, 0, None, None).active(0, 4, "prefill")


def test_presets():
    assert SID.preset("pope").keep == 100 and SID.preset("chair").keep == 50
