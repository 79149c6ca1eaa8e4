"""The attention function itself against NumPy: stages, their order, chains."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.attention import Block, Chain, Context, LayerCache, attend
from lvlm_jax.attention.attend import LayerEdits
from lvlm_jax.errors import LVLMError
from tests.attention.toys import Cap, Identity, Scale, Shift

BATCH, HEADS, KEY_HEADS, ROWS, SIZE = 2, 4, 2, 6, 8
# One sample with an image in columns 2 and 3, one with two columns of padding.
IMAGE_ID = np.array([[0, 0, 1, 1, 0, 0], [-1, -1, 0, 0, 0, 0]], np.int32)
EXPLICIT = 3


@pytest.fixture(scope="module")
def arrays():
    generator = np.random.default_rng(0)
    query = generator.normal(size=(BATCH, HEADS, ROWS, SIZE)).astype(np.float32) * 2
    key, value = generator.normal(size=(2, BATCH, KEY_HEADS, ROWS, SIZE)).astype(np.float32)
    return query, key, value


def run(arrays, transform, layer=0, carry=None):
    """Outputs [B, H, T, D] of one layer of two, and the carry after it; the last three rows are explicit."""
    query, key, value = map(jnp.asarray, arrays)
    context = Context(
        image_id=jnp.asarray(IMAGE_ID),
        positions=jnp.broadcast_to(jnp.arange(ROWS, dtype=jnp.int32), (BATCH, ROWS)),
        first_row=jnp.int32(0),
        image_end=jnp.asarray([4, 0], jnp.int32),
        explicit_rows=EXPLICIT,
    )
    carry = transform.begin(context, jnp.zeros((BATCH, ROWS, 4))) if transform and carry is None else carry
    columns = LayerCache(None, (Block(key, value),))

    def layer_outputs(query, columns, context, carry):
        edits = LayerEdits((transform,), (carry,), layer, 2)
        outputs, carries, _ = attend((query,), columns, (context,), None, edits)
        return outputs[0], carries[0]

    return jax.jit(layer_outputs)(query, columns, context, carry)


def expected(arrays, logits=lambda z: z, hide=None, weights=lambda w: w, values=lambda o: o):
    """The outputs and the carry in float64 NumPy; each edit applies to the explicit rows."""
    query, key, value = (array.astype(np.float64) for array in arrays)
    key, value = (np.repeat(array, HEADS // KEY_HEADS, axis=1) for array in (key, value))
    z = np.einsum("bhtd,bhsd->bhts", query, key) / np.sqrt(SIZE)
    seen = np.tril(np.ones((ROWS, ROWS), bool)) & (IMAGE_ID >= 0)[:, None, None, :]
    seen = np.broadcast_to(seen, z.shape).copy()
    first = ROWS - EXPLICIT
    z[:, :, first:] = logits(z[:, :, first:])
    if hide:
        seen[:, hide[0], first:, hide[1]] = False
    powers = np.where(seen, np.exp(z), 0)
    total = powers.sum(-1, keepdims=True)
    w = powers / np.where(total > 0, total, 1)
    w[:, :, first:] = weights(w[:, :, first:])
    mixed = np.einsum("bhts,bhsd->bhtd", w, value)
    mixed[:, :, first:] = values(mixed[:, :, first:])
    return mixed


def assert_equal_where_alive(got, want):
    """Rows of padding (the second sample's first two) are not compared."""
    np.testing.assert_allclose(got[0], want[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(got[1, :, 2:], want[1, :, 2:], rtol=0, atol=1e-5)
    assert np.isfinite(got).all()


@pytest.mark.parametrize("transform", [None, Identity()], ids=["plain", "identity"])
def test_attention_without_edits(arrays, transform):
    outputs, _ = run(arrays, transform)
    assert_equal_where_alive(outputs, expected(arrays))


def test_stages_edit_the_explicit_rows_only(arrays):
    outputs, carry = run(arrays, Chain((Cap(0.5), Shift(2.0))))
    edits = {"hide": (0, 1), "weights": lambda w: w / 2, "values": lambda output: output + 2}
    want = expected(arrays, logits=lambda z: np.minimum(z, 0.5), **edits)
    assert_equal_where_alive(outputs, want)
    assert np.abs(want - expected(arrays))[:, :, -EXPLICIT:].min() > 0.01
    # What `observe` saw are weights before their edit: each explicit row sums to 1.
    assert float(carry[0]) == pytest.approx(BATCH * HEADS * EXPLICIT, abs=1e-3)


def test_a_chain_applies_its_members_in_order(arrays):
    first, _ = run(arrays, Chain((Scale(3.0), Cap(0.5))))
    second, _ = run(arrays, Chain((Cap(0.5), Scale(3.0))))
    edits = {"hide": (0, 1), "weights": lambda w: w / 2}
    assert_equal_where_alive(first, expected(arrays, logits=lambda z: np.minimum(3 * z, 0.5), **edits))
    assert_equal_where_alive(second, expected(arrays, logits=lambda z: 3 * np.minimum(z, 0.5), **edits))
    assert np.abs(first - second).max() > 0.1
    twice, _ = run(arrays, Chain((Cap(0.5), Cap(0.4))))  # two may edit the mask
    edits["weights"] = lambda w: w / 4
    assert_equal_where_alive(twice, expected(arrays, logits=lambda z: np.minimum(z, 0.4), **edits))


def test_members_of_a_chain_carry_their_own_and_act_in_their_layers(arrays):
    chain = Chain((Scale(2.0), Scale(0.5, layers=range(1, 2)), Identity()))
    outputs, carry = run(arrays, chain)
    assert [int(count) for count in carry[:2]] == [1, 0] and carry[2] == ()
    assert_equal_where_alive(outputs, expected(arrays, logits=lambda z: 2 * z))
    outputs, carry = run(arrays, chain, layer=1, carry=carry)
    assert [int(count) for count in carry[:2]] == [2, 1]
    assert_equal_where_alive(outputs, expected(arrays))  # twice and half


def test_what_a_chain_asks_for_and_refuses():
    """A chain edits as many rows as the member that needs most; at most one member may replace the values."""
    for one, other, widest in (("last", "post_image", "post_image"), ("all", "last", "all"), ("last", "last", "last")):
        assert Chain((Scale(1.0, rows=one), Identity(other))).rows == widest
    with pytest.raises(LVLMError, match="Shift and Identity cannot be chained"):
        Chain((Shift(1.0), Scale(2.0), Identity()))
    assert Chain((Shift(1.0), Scale(2.0))).members[0].amount == 1.0
