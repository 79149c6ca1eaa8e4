"""What may stand in a method's fields: every strength and every switch of every method, and what is refused by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lvlm_jax import methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import CAPL, CLVA, CMAC, EAH, ICD, OPERA, SEVI, SID, VAF, VCD, DoLa
from lvlm_jax.methods.depth import layer_range
from lvlm_jax.methods.sid import LeastAttended

FIELDS = [
    pytest.param(methods.get(name), field, id=f"{name}-{field.name}")
    for name in methods.names()
    for field in dataclasses.fields(methods.get(name))
    if "data" not in field.metadata
]
STRENGTHS = [one for one in FIELDS if "low" in one.values[1].metadata]
SWITCHES = [one for one in FIELDS if "static" in one.values[1].metadata]


@pytest.mark.parametrize(("cls", "field"), STRENGTHS)
def test_a_strength_is_one_finite_number_in_its_range(cls, field):
    name, low, high = f"{cls.__name__}: {field.name}", field.metadata["low"], field.metadata["high"]
    value = float(np.clip(0.5, low, high))
    for given in (value, np.float32(value), np.float64(value), np.array(value), np.array(value, np.float16)):
        kept = getattr(cls(**{field.name: given}), field.name)
        assert type(kept) is np.float32 and kept == np.float32(given)
    array = jnp.asarray(value)
    assert getattr(cls(**{field.name: array}), field.name) is array
    whole = getattr(cls(**{field.name: jnp.asarray(max(int(value), 1))}), field.name)
    assert whole.dtype == jnp.float32 and whole == max(int(value), 1)
    wrong = ["0.5", {}, True, np.bool_(True), 1j, object(), torch.tensor(0.5), jnp.asarray(True),
             np.nan, np.inf, -np.inf, 1e39, 10**400, -(10**5000), np.float64(1e300), np.array(np.nan),
             np.ones((2, 1, 1)), np.ones(0), jnp.asarray(jnp.nan), jnp.asarray(jnp.inf)]  # fmt: skip
    if field.metadata["per"] == "model":  # others take a value for each layer
        wrong += [[0.5], (0.5,), np.ones(2), jnp.ones(3), jnp.ones((1,)), jax.ShapeDtypeStruct((2,), jnp.float32)]
    wrong += [None] * (field.default is not None)
    wrong += [low - 1, np.float32(low - 1), jnp.asarray(low - 1)] * bool(np.isfinite(low))
    wrong += [high + 1, jnp.asarray(high + 1)] * bool(np.isfinite(high) and high < 2**20)
    for given in wrong:
        with pytest.raises(LVLMError, match=f"^{name} (is|has shape) .*expected a number") as refused:
            cls(**{field.name: given})
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 250


@pytest.mark.parametrize(("cls", "field"), SWITCHES)
def test_a_switch_is_of_its_kind(cls, field):
    """A field takes its default, and refuses other objects, NaN and infinity in one line."""
    default = getattr(cls(), field.name)
    assert getattr(cls(**{field.name: default}), field.name) == default
    for given in (object(), float("nan"), float("inf"), {}, 1j, b"low", ("a",), cls):
        with pytest.raises(LVLMError, match=f"^{cls.__name__}: {field.name} is .*expected") as refused:
            cls(**{field.name: given})
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CMAC(alpha=None), "CMAC: alpha is None; expected a number >= 0"),
        (lambda: CMAC(gamma="two"), "CMAC: gamma is 'two'; expected a number >= 1e-06 or None"),
        (lambda: VCD(beta=2), r"VCD: beta is 2; expected a number in \[0, 1\]"),
        (lambda: VCD(alpha=1e39), r"alpha is 1e\+39; expected a number >= 0 within float32 \(up to 3.4e\+38\)"),
        (lambda: VCD(alpha=jnp.arange(3.0)), r"alpha has shape \(3,\); .* give sweep one method for each, or build"),
        (lambda: VCD(alpha=-(10**5000)), "alpha is a very long int; expected a number >= 0"),
        (lambda: SEVI(start_layer="low"), "SEVI: start_layer is 'low'; expected a whole number or a number with a"),
        (lambda: SEVI(start_layer=True), "SEVI: start_layer is True; expected a whole number"),
        (lambda: SEVI(layers=(1, 2.5)), r"SEVI: layers is \(1, 2.5\); expected a tuple of whole numbers or None"),
        (lambda: SEVI(cicd=1), "SEVI: cicd is 1; expected one of True, False"),
        (lambda: DoLa(layers=None), "DoLa: layers is None; expected a text or a tuple of whole numbers"),
        (lambda: ICD(tokens="12"), "ICD: tokens is '12'; expected a tuple of whole numbers or None"),
        (lambda: OPERA(candidates=5.0), "OPERA: candidates is 5.0; expected a whole number"),
        (lambda: EAH(variant="codes"), "EAH: variant is 'codes'; expected one of 'paper', 'code'"),
        (lambda: CAPL(tile=2.0), "CAPL: tile is 2.0; expected a whole number or None"),
        (lambda: CAPL(tile=0), "tile is 0; expected a whole number >= 1"),
        (lambda: OPERA(beams=0), "beams is 0"),
        (lambda: OPERA(candidates=1.5), "candidates is 1.5"),
        (lambda: VCD(noise_step=1000), "noise_step"),
        (lambda: DoLa(layers="middle"), "'low', 'high'"),
        (lambda: DoLa(layers="high").exits(2), "none of this model's 2 layers"),
        (lambda: VAF().active(0, 4, "prefill"), "9 to 15"),
        (lambda: CLVA().active(0, 3, "prefill"), "CLVA in"),
        (lambda: CLVA(start_layer=12).active(0, 32, "prefill"), "CLVA in"),
        (lambda: LeastAttended(3, 0, None, None).active(0, 4, "prefill"), "start_layer of at least 1"),
        (lambda: layer_range(9, 15, None, 4), "layers from 9 to 15 are none of this model's 4 layers"),
        (lambda: layer_range(10**12, 10**13, None, 4), "layers from 1000000000000 to 10000000000000 are none"),
        (lambda: layer_range(-(10**12), -1, None, 4), "are none"),
        (lambda: layer_range(1e300, None, None, 4), "are none"),
        (lambda: layer_range(0, None, 8, 4), r"layers \[8\] are none"),
        (lambda: layer_range(0, None, range(8, 10**12), 4), r"layers range\(8, 1000000000000\) are none"),
        (lambda: SEVI.preset("bold"), "SEVI has no preset 'bold'; expected one of focused, balanced"),
        (lambda: VAF.preset("bold"), "VAF has no preset 'bold'; it has no presets"),
    ],
)
def test_what_is_wrong_is_said(make, message):
    with pytest.raises(LVLMError, match=message):
        make()


def test_switches_are_kept_in_one_form():
    """Lists, arrays and NumPy's numbers are structure like Python's own, so they compile the same program."""
    expected = jax.tree.structure(VAF(layers=(1, 2), start_layer=3))
    for layers in ([1, 2], np.array([1, 2]), (np.int64(1), np.int32(2))):
        assert jax.tree.structure(VAF(layers=layers, start_layer=np.int64(3))) == expected
    assert VAF(layers=3).layers == (3,) and EAH(layer=np.float32(0.5)).layer == 0.5
    assert SEVI(cicd=np.bool_(True)).cicd is True and CLVA(anchor_start=0).anchor_start == 0.0


def test_strengths_are_traced_swept_and_differentiated():
    """The constructor accepts tracers; unflattening accepts whatever JAX puts into the leaves."""

    def cut(alpha):
        return CMAC(alpha=alpha, beta=alpha / 4).alpha * 2

    np.testing.assert_allclose(jax.jit(jax.vmap(jax.grad(cut)))(jnp.arange(3.0)), [2.0, 2.0, 2.0])
    assert CMAC(alpha=jax.ShapeDtypeStruct((), jnp.float32)).alpha.shape == ()
    method = CMAC()
    for leaf in (None, object(), "name", jnp.ones(5), np.nan, jax.sharding.PartitionSpec()):
        assert jax.tree.map(lambda _, leaf=leaf: leaf, method).alpha is leaf
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(method)]
    assert names == [".alpha", ".beta", ".gamma", ".noise_seed"]


@pytest.mark.parametrize(
    ("start", "end", "layers", "expected"),
    [
        (2, None, None, (2, 3, 4, 5, 6, 7)),
        (2, 4, None, (2, 3)),
        (0.25, 0.5, None, (2, 3)),
        (np.float32(0.25), np.float32(0.5), None, (2, 3)),
        (0.5, 7, None, (4, 5, 6)),
        (0.0, 1.0, None, tuple(range(8))),
        (6, 99, None, (6, 7)),
        (2, 4, (1, 5, 99), (1, 5)),
        (2, 4, (5, 1), (5, 1)),
        (2, 4, 3, (3,)),
        (-(10**12), 10**12, None, tuple(range(8))),
        (6, 10**400, None, (6, 7)),
        (0.25, 1e300, None, (2, 3, 4, 5, 6, 7)),
        (0, None, range(-3, 10**12, 5), (2, 7)),
        (0, None, (10**12, 3), (3,)),
    ],
)
def test_layers_are_numbers_or_shares_of_the_depth(start, end, layers, expected):
    assert layer_range(start, end, layers, 8) == expected


@pytest.mark.parametrize("bound", [10**12, -(10**12), 1e12])
def test_bounds_far_out_of_the_model_answer_at_once(bound):
    assert VAF(start_layer=-abs(bound), end_layer=abs(bound)).active(7, 8, "decode")
    assert SEVI(end_layer=abs(bound)).active(7, 8, "decode") and not SEVI().active(3, 8, "decode")
    with pytest.raises(LVLMError, match="CLVA in 8 layers"):
        CLVA(anchor_start=0, anchor_end=abs(bound), noise_layers=1).active(0, 8, "prefill")
    with pytest.raises(LVLMError, match="none of this model's 8 layers|start_layer of at least 1"):
        SID(start_layer=bound, end_layer=abs(bound)).branches()[1].active(0, 8, "prefill")
