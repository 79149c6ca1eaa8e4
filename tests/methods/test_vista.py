"""VISTA through the public face against its NumPy reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax.methods.base import Seen
from lvlm_jax.methods.vista import VISTA, unit
from tests.checkpoints import IMAGE
from tests.methods import compare
from tests.methods.compare import EDGES, MIXED, stream
from tests.reference import vista


@pytest.mark.parametrize(
    ("settings", "fields", "layouts"),
    [
        ({"exits": (3,)}, {}, MIXED),
        ({"exits": (3,)}, {}, EDGES),
        ({"exits": (1, 3), "strength": 0.6, "gamma": 0.5}, {"layers": (1, 3), "lambda_": 0.6, "gamma": 0.5}, MIXED),
        ({"exits": (1, 2), "strength": -0.2}, {"start_layer": 1, "end_layer": 3, "lambda_": -0.2}, MIXED),
        ({"exits": (3,), "variant": "paper"}, {"variant": "paper"}, MIXED),
        (
            {"exits": (0, 2), "strength": 0.6, "gamma": 0.5, "variant": "paper"},
            {"layers": (0, 2), "lambda_": 0.6, "gamma": 0.5, "variant": "paper"},
            EDGES,
        ),
    ],
    ids=["default", "edges", "strong", "away", "paper", "strong paper"],
)
def test_equals_the_reference(settings, fields, layouts):
    case = compare.load(4, "bare")
    plain, _, _ = case.library(layouts, None)
    main, contrast, combined = case.library(layouts, VISTA(**fields))
    assert contrast is None
    for row, want in enumerate(case.references(vista.run, layouts, **settings)):
        compare.assert_close(main[row], want[0], f"main {row}")
        compare.assert_close(combined[row], want[1], f"combined {row}", 2)
        if IMAGE in layouts[row]:
            assert np.abs(main[row] - plain[row]).max(axis=-1).min() > 0.05
            assert np.abs(combined[row] - main[row]).max(axis=-1).min() > 0.05
        else:
            np.testing.assert_allclose(combined[row], plain[row], rtol=0, atol=1e-5)


def test_the_principal_component_of_one_sample():
    """The authors' program adds a unit vector to layer 0's direction, where there is one; the paper knows of none."""
    generator = np.random.default_rng(1)
    seeing, blind = (jnp.asarray(generator.normal(size=(3, 2, 4)).astype(np.float32)) for _ in range(2))
    blind = blind.at[:, 1].set(seeing[:, 1])  # the second sample has no image
    difference, seen = np.array(seeing[1:] - blind[1:]), Seen((seeing, blind))
    np.testing.assert_array_equal(VISTA(variant="paper").primed(seen).vectors, difference)
    difference[0, 0, 0] += 1
    np.testing.assert_array_equal(VISTA().primed(seen).vectors, difference)


def test_published_layers():
    assert VISTA().exits(32) == (26, 27, 28, 29, 30, 31)
    assert VISTA(variant="paper").exits(32) == (27, 28, 29, 30, 31)
    assert VISTA().exits(8) == (6, 7) and VISTA().exits(4) == (3,)


def test_presets():
    presets = {name: VISTA.preset(f"llava-1.5/{name}") for name in ("chair", "pope", "mmhal")}
    assert {name: (float(one.lambda_), float(one.gamma)) for name, one in presets.items()} == {
        "chair": (np.float32(0.17), np.float32(0.3)),
        "pope": (np.float32(0.01), np.float32(0.3)),
        "mmhal": (np.float32(0.1), np.float32(0.3)),
    }


@pytest.mark.parametrize(("variant", "stage"), [("code", "mlp"), ("paper", "residual")])
def test_norms_are_kept(variant, stage):
    """Steering turns a row and does not stretch it, in the one stage that the variant names."""
    generator = np.random.default_rng(0)
    hidden = jnp.asarray(generator.normal(size=(2, 5, 16)).astype(np.float32))
    states = generator.normal(size=(2, 4, 2, 16)).astype(np.float32)
    steering = VISTA(lambda_=0.8, variant=variant).primed(Seen(tuple(map(jnp.asarray, states)))).branches()[0]
    for name, place in {"mlp": (stream(1),), "residual": (1, 3, "decode")}.items():
        turned = getattr(steering, name)(*place, hidden)
        norms = np.linalg.norm(hidden, axis=-1)
        np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), norms, rtol=1e-5)
        assert (np.abs(turned - hidden).max() > 0.1) == (name == stage)


def test_unit_of_zero_has_no_length_and_no_gradient():
    vectors = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(unit(vectors), [[0.6, 0.8], [0.0, 0.0]], rtol=0, atol=1e-7)
    gradient = jax.grad(lambda x: unit(x)[:, 0].sum())(vectors)
    assert np.isfinite(gradient).all() and (np.asarray(gradient[1]) == 0).all()
