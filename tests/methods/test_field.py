"""Methods of 2024 to 2026 that need nothing fitted, through the public face against their NumPy references."""

import numpy as np
import pytest

from lvlm_jax import methods
from tests.checkpoints import IMAGE
from tests.methods import compare
from tests.methods.compare import EDGES, MIXED
from tests.reference import causalmm, field, field_contrast, one_branch

DEPTH = 4
CASE = (DEPTH, "bare")
ALL = tuple(range(DEPTH))

# Method -> its settings, its reference, the fields of that, and the prompts.
ONE_BRANCH = {
    "spin": (methods.SPIN(rho=0.7), field.Spin, {"layers": ALL, "rho": 0.7}, MIXED),
    "spin code": (methods.SPIN(rho=0.5, layers=(1, 2), variant="code"), field.Spin,
                  {"layers": (1, 2), "rho": 0.5, "variant": "code"}, EDGES),
    "dab": (methods.DAB(), field.Dab, {"layers": ALL}, MIXED),
    "dab decode": (methods.DAB(alpha=2, tau=0.4, layers=(0, 3), decode=True), field.Dab,
                   {"layers": (0, 3), "alpha": 2, "tau": 0.4, "decode": True}, EDGES),
    "iat": (methods.IAT(start_layer=1, end_layer=3), field.Iat, {"layers": (1, 2)}, MIXED),
    "farsight": (methods.FarSight(), field.FarSight, {"layers": ALL}, MIXED),
    "sparc": (methods.SPARC(alpha=3, tau=0.2, selected_layer=1), field.Sparc,
              {"layers": ALL, "alpha": 3, "tau": 0.2, "selected": 1}, MIXED),
    "var": (methods.VAR(start_layer=1, p=0.2, tau=2.2), field.Var, {"layers": (1, 2), "p": 0.2, "tau": 2.2}, MIXED),
    "var dims": (methods.VAR(layers=(0, 2), dims=(5, 7, 11), tau=1.2, rho=0.9), field.Var,
                 {"layers": (0, 2), "dims": (5, 7, 11), "tau": 1.2, "rho": 0.9}, EDGES),
    "memvr": (methods.MemVR(layers=(0, 1, 2), tau=0.6, rho=0.4), field.MemVR,
              {"layers": (0, 1, 2), "tau": 0.6, "rho": 0.4}, MIXED),
}  # fmt: skip


def reference(make, fields):
    """A new reference, which may need the model's weights."""
    case = compare.load(*CASE)
    model = {"model": (case.weights, case.config)} if "model" in make.__dataclass_fields__ else {}
    return make(**fields, **model)


# What further variants and strengths show, at ten seconds more.
SLOW = ("spin code", "dab decode", "var dims", "farsight", "iat")


@pytest.mark.parametrize(
    ("method", "make", "fields", "layouts"),
    [pytest.param(*case, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, case in ONE_BRANCH.items()],
)
def test_one_branch(method, make, fields, layouts):
    compare.assert_one_branch(compare.load(*CASE), layouts, method, lambda: reference(make, fields))


@pytest.mark.parametrize(
    ("method", "run", "settings", "factor", "cuts", "layouts"),
    [
        (methods.NoLan(), field_contrast.nolan, {}, 4.2, False, MIXED),
        (methods.AvisC(lambda_=0.2), field_contrast.avisc, {"lambda_": 0.2}, 3, True, MIXED),
        pytest.param(
            methods.AvisC(gamma=0.9, lambda_=0, alpha=2, beta=0.3), field_contrast.avisc,
            {"gamma": 0.9, "lambda_": 0, "alpha": 2, "beta": 0.3}, 5, True, EDGES, marks=pytest.mark.slow,
        ),
        (methods.DAMRO(tokens=3), field_contrast.damro, {"keep": 3}, 5, True, MIXED),
        pytest.param(
            methods.DAMRO(tokens=1, alpha=1, beta=0.2), field_contrast.damro, {"keep": 1, "alpha": 1, "beta": 0.2}, 3,
            True, EDGES, marks=pytest.mark.slow,
        ),
        (methods.CausalMM(), causalmm.run, {}, 3, True, MIXED),
        pytest.param(
            methods.CausalMM(gamma=1, beta=0.2, seed=7), causalmm.run, {"gamma": 1, "beta": 0.2, "seed": 7}, 5,
            True, EDGES, marks=pytest.mark.slow,
        ),
    ],
    ids=["nolan", "avisc", "avisc strong", "damro", "damro one", "causalmm", "causalmm seed"],
)  # fmt: skip
def test_two_branches(method, run, settings, factor, cuts, layouts):
    compare.assert_contrastive(compare.load(*CASE), method, run, factor, layouts, cuts, **settings)


@pytest.mark.parametrize(
    ("tau", "layouts"), [pytest.param(0.2, MIXED, marks=pytest.mark.slow), (1.2, EDGES)], ids=["contrast", "both"]
)
def test_only(tau, layouts):
    case = compare.load(*CASE)
    main, _, combined = case.library(layouts, methods.ONLY(tau=tau))
    ways = set()
    paths = [reference(field.Only, {"layers": ALL}) for _ in layouts]
    each = iter(paths)
    wanted = case.references(lambda *sample: one_branch.run(*sample, next(each)), layouts)
    for row, (want, path, layout) in enumerate(zip(wanted, paths, layouts, strict=True)):
        compare.assert_close(main[row], want, f"main {row}")
        if IMAGE not in layout:
            np.testing.assert_array_equal(combined[row], main[row])
            continue
        joined, distance, clear = field.only_combined(want, path.sides, tau)
        assert path.margin > 2e-6 and clear > 1e-4
        compare.assert_combined(combined[row], joined, distance, 5)
        ways |= set(np.isclose(joined, 2 * want - (np.stack(path.sides) + 0.5 * want)).any(-1))
    assert ways == ({True} if tau == 0.2 else {True, False})


@pytest.mark.parametrize(
    ("layers", "alpha", "layouts"), [(None, 2.0, MIXED), pytest.param((0, 2), 0.3, EDGES, marks=pytest.mark.slow)]
)
def test_vhr(layers, alpha, layouts):
    case = compare.load(*CASE)
    method = methods.VHR(layers=layers, alpha=alpha)
    main, _, combined = case.library(layouts, method)
    plain, _, _ = case.library(layouts, None)
    edited = (1, 2, 3) if layers is None else layers
    for row, (want, margin) in enumerate(case.references(field_contrast.vhr, layouts, layers=edited, alpha=alpha)):
        assert margin > 1e-7
        compare.assert_close(main[row], want, f"main {row}")
        np.testing.assert_array_equal(combined[row], main[row])
        assert (np.abs(want - plain[row]).max() > 0.05) == (IMAGE in layouts[row])


def test_published_layers():
    def edited(method, phase="decode"):
        return [layer for layer in range(32) if method.active(layer, 32, phase)]

    assert edited(methods.IAT()) == list(range(5, 18))
    assert methods.VAR().edited(32) == tuple(range(2, 31))
    assert methods.VHR().edited(32) == (1, *range(18, 32))
    assert [layer for layer in range(32) if methods.MemVR().judged(layer, 32)] == list(range(7, 17))
    assert edited(methods.SPARC(), "prefill") == [20] and edited(methods.DAB()) == []
