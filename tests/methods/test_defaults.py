"""Where methods act by default and by their presets, as published; ties, and shares of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.attention import Context
from lvlm_jax.methods import CAPL, CLVA, EAH, SEVI, SID, VISTA, DeCo, DoLa, per_image
from lvlm_jax.methods.sid import LeastAttended
from tests.methods import compare
from tests.methods.compare import MIXED, row, site
from tests.reference import exits

NOWHERE, ALL = [], list(range(6))
# Method, depth, and layers in which it acts in prefill and in decoding.
LAYERS = [
    (methods.VAF(), 32, [9, 10, 11, 12, 13, 14], [9, 10, 11, 12, 13, 14]),
    (methods.MiddleLayers(), 32, list(range(5, 19)), list(range(5, 19))),
    (EAH(), 32, [1], NOWHERE),
    (EAH(variant="code"), 32, [15], NOWHERE),
    (EAH(layer=0.5), 32, [16], NOWHERE),
    (CAPL(), 6, [0, 2, 4], NOWHERE),
    (CAPL(mode="truncated"), 6, ALL, NOWHERE),
    (CLVA(), 32, None, [0, 1, 2, *range(10, 20), *range(21, 32)]),
    (SEVI.preset("balanced"), 12, None, [8, 9, 10, 11]),
    (methods.IAT(), 32, None, list(range(5, 18))),
    (methods.SPARC(), 32, [20], None),
    (methods.DAB(), 32, None, NOWHERE),
]


@pytest.mark.parametrize(("method", "depth", "prefill", "decode"), LAYERS, ids=lambda one: getattr(one, "label", ""))
def test_layers(method, depth, prefill, decode):
    for phase, want in (("prefill", prefill), ("decode", decode)):
        if want is not None:
            assert [layer for layer in range(depth) if method.active(layer, depth, phase)] == want


def test_ranges_of_layers():
    assert methods.VAR().edited(32) == tuple(range(2, 31)) and methods.VHR().edited(32) == (1, *range(18, 32))
    assert [layer for layer in range(32) if methods.MemVR().judged(layer, 32)] == list(range(7, 17))
    for depth, candidates, edited in ((32, (10, 20), (21, 32)), (10, (3, 7), (7, 10)), (40, (12, 25), (26, 40))):
        assert list(CLVA().candidates(depth)) == list(range(*candidates))
        assert CLVA().edited(depth) == tuple(range(*edited))


@pytest.mark.parametrize(
    ("method", "by_depth"),
    [
        (DeCo(), {32: tuple(range(20, 29)), 8: (5, 6), 4: (2, 3), 2: (1,)}),
        (DeCo(layers=(3,)), {32: (3,)}),
        (DoLa(layers="low"), {32: tuple(range(0, 16, 2)), 5: (0, 2)}),
        (DoLa(layers="high"), {32: tuple(range(16, 32, 2)), 5: (4,)}),
        *((DoLa(layers=name), {depth: tuple(exits.buckets(depth)[name]) for depth in (3, 7, 8, 27, 40)})
          for name in ("low", "high")),
        (DoLa(layers="low"), {2: tuple(exits.buckets(2)["low"])}),
        (VISTA(), {32: (26, 27, 28, 29, 30, 31), 8: (6, 7), 4: (3,)}),
        (VISTA(variant="paper"), {32: (27, 28, 29, 30, 31)}),
    ],
)  # fmt: skip
def test_exits(method, by_depth):
    assert {depth: method.exits(depth) for depth in by_depth} == by_depth


def test_presets():
    for cls, name, fields in (
        (CAPL, "glm-4.1v", {"rho": 0.9}),
        (CAPL, "internvl2.5", {"tile": 256}),
        (CAPL, "qwen2.5-vl", {"tile": None}),
        (SID, "pope", {"keep": 100}),
        (SID, "chair", {"keep": 50}),
        (methods.VCD, "pope", {"alpha": 1.0, "beta": 0.2}),
        (methods.VCD, "default", {}),
        (methods.M3ID, "paper", {"variant": "paper"}),
        (methods.M3ID, "port", {"variant": "port", "beta": 0.1}),
        (VISTA, "llava-1.5/chair", {"lambda_": 0.17, "gamma": 0.3}),
        (VISTA, "llava-1.5/pope", {"lambda_": 0.01, "gamma": 0.3}),
        (VISTA, "llava-1.5/mmhal", {"lambda_": 0.1, "gamma": 0.3}),
        (SEVI, "balanced", {"omega": 0.5, "start_layer": 8}),
        (SEVI, "focused", {}),
        (SEVI, "focused+cicd", {"cicd": True}),
    ):  # fmt: skip
        preset, wanted = cls.preset(name), cls(**fields)
        assert fields or preset == wanted
        assert [getattr(preset, field) for field in fields] == [getattr(wanted, field) for field in fields], name
    assert len(SEVI().branches()) == 1 and len(SEVI(cicd=True).branches()) == 2
    assert methods.M3ID().variant == "paper"
    assert float(EAH().beta) == np.float32(0.002) and float(EAH(variant="code").beta) == np.float32(0.0008)


def test_of_equal_tokens_the_earlier_is_selected():
    image_id = jnp.array([[-1, 0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 0]])
    norms = jnp.array([9, 9, 1, 2, 2, 2, 9, 3, 5, 3, 3, 9], jnp.float32)
    context = Context(
        image_id=image_id,
        positions=jnp.arange(12)[None],
        first_row=jnp.zeros((), jnp.int32),
        image_end=jnp.array([11]),
        image_count=3,  # more than there are
    )
    selected = CAPL(rho=0.5).begin(context, jnp.sqrt(norms)[None, :, None])
    np.testing.assert_array_equal(np.flatnonzero(selected[0]), [3, 4, 7, 8])
    weights = row([0.5, 0.1, 0.1, 0.05, 0.1, 0.15])
    image = [0, 1, 1, 1, 1, 0]
    here = site(np.log(weights), image, layer=1, carry=jnp.asarray([image], bool))
    kept = LeastAttended(3, 2, None, None).observe(here, jnp.asarray(weights)[None])
    np.testing.assert_array_equal(kept, [[False, True, True, True, False, False]])


def test_a_share_is_rounded_down_as_in_decimal_numbers():
    counts = np.array([1, 7, 9, 10, 20, 50, 64, 100, 144, 200, 256, 576, 1000, 2880])
    inside = jnp.asarray(np.arange(2880)[None, None, :] < counts[:, None, None])  # a sample for each count
    for hundredths in (95, 90, 10, 70, 7, 29, 58):
        got = per_image.share(np.float32(hundredths / 100), inside)[:, 0]
        np.testing.assert_array_equal(got, np.maximum(counts * hundredths // 100, 1))


@pytest.mark.slow
def test_gradients_of_clva_are_finite_where_a_map_is_zero():
    """Samples without an image, images without anchors."""
    case = compare.load(7)
    prepared = case.ours.prepare(case.inputs(MIXED[:2]))

    def total(method):
        return (case.ours.logits(prepared, method=method)[:, -1] ** 2).sum()

    gradients = jax.grad(total, allow_int=True)(CLVA(rho=0.3))
    assert all(np.isfinite(leaf).all() for leaf in map(np.asarray, jax.tree.leaves(gradients)))
    assert np.abs(gradients.a) > 0
