"""Methods of one branch, through the public face against their NumPy references: prefill and cached decode steps."""

import functools

import numpy as np
import pytest
import safetensors.numpy

from lvlm_jax import LVLMError, methods
from lvlm_jax.methods import as_method, fitted
from lvlm_jax.methods.fitted import Fitted, Source
from tests.checkpoints import IMAGE
from tests.methods import compare
from tests.methods.compare import EDGES, MIXED
from tests.reference import capl, clva, contrast, eah, field, one_branch, sevi
from tests.slow import cases, named

DEPTH, HEADS, WIDTH = 4, 4, 48
BARE, ALL = (DEPTH, "bare"), tuple(range(DEPTH))
THREE = ((2, IMAGE, 3, IMAGE, 1, IMAGE, 4), (5, IMAGE, IMAGE, 2))
TRUNCATED = {"mode": "truncated"}


def check(method, reference, case, layouts, **settings):
    """Both take the same settings; a share is a decimal number for the reference. Returns the references."""
    given = {name: float(value) if name == "rho" else value for name, value in settings.items()}
    make = functools.partial(reference, **settings)
    return compare.assert_one_branch(compare.load(*case), layouts, method(**given), make)


@pytest.mark.parametrize(
    ("settings", "heads", "layouts", "case"),
    [
        ({"beta": 0.02}, [0, None, 2], MIXED, (3,)),
        ({"beta": 0.05}, [0, None, 3], MIXED, (3,)),
        ({"beta": 0.12}, [0, None, 0], MIXED, (3,)),  # a tie in the last sample
        ({"beta": 0.2}, [None, None, 3], MIXED, (3,)),  # no sinks in the first
        # Where nothing happens to a sample with images, head 0 is its best.
        ({"beta": 0.015, "variant": "code"}, [1, None, None], MIXED, (3,)),
        ({"beta": 0.06, "variant": "code"}, [None, None, 3], MIXED, (3,)),
        ({"beta": 0.12, "variant": "code"}, [None, None, 2], MIXED, (3,)),
        ({"beta": 0.05, "layer": 0}, None, MIXED, (3,)),
        ({"beta": 0.05}, None, EDGES, (3,)),
        ({"beta": 0.05, "variant": "code"}, None, EDGES, (3,)),
        ({"beta": 0.06}, None, [(4, IMAGE, 3, IMAGE, 6), (3, IMAGE, 11)], (3, "mistral_window")),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_eah(settings, heads, layouts, case):
    """`heads` is h* of each sample, None where nothing happens."""
    references = check(methods.EAH, eah.Eah, case, layouts, **{"layer": 1} | settings)
    assert any(len(set(reference.sinks)) > 1 for reference in references)  # the choice among heads matters
    best = [one.sinks.index(max(one.sinks)) if one.applied else None for one in references]
    assert heads is None or best == heads


def test_head_zero_counts_in_the_papers_eah_only():
    """With a vanishing β all heads tie, the first is taken, and the code then does nothing."""
    check(methods.EAH, eah.Eah, (3,), MIXED, beta=0.0, layer=1)
    compare.assert_plain(compare.load(3), MIXED, methods.EAH(beta=0.0, layer=1, variant="code"))


SEVI = {
    "focused": ({}, (5,), MIXED),
    "mild": ({"omega": 0.5, "start_layer": 1, "kappa": 0.35}, (5,), MIXED),
    "all_layers": ({"omega": 4.0, "start_layer": 0, "kappa": 0.5}, (5,), MIXED),
    "edges": ({"omega": 2.0, "start_layer": 1, "kappa": 0.4}, (5,), EDGES),
    "window": ({"omega": 2.0, "start_layer": 0, "kappa": 0.4}, (3, "mistral_window"), MIXED),
    "code_qwen": ({"omega": 2.0, "start_layer": 0, "kappa": 0.5, "variant": "code-qwen"}, (5,), MIXED),
}


@pytest.mark.parametrize(("settings", "case", "layouts"), cases(SEVI, slow=["mild", "edges", "window"]))
def test_sevi(settings, case, layouts):
    references = check(methods.SEVI, sevi.Sevi, case, layouts, **settings)
    if settings and layouts == MIXED and len(case) == 1:  # both stages are met
        assert set().union(*(reference.stages for reference in references)) == {"text", "global"}


CAPL = {
    **{f"rho {rho}": ({"rho": rho}, keep, MIXED) for rho, keep in
       (("0.95", 8), ("0.9", 8), ("0.4", 3), ("0.01", 1), ("1", 9))},
    # Nine tokens an image: whole tiles and a rest. "A tile" longer than the image is the image.
    "tile 4": ({"rho": "0.6", "tile": 4}, 2 + 2 + 1, MIXED),
    "tile 3": ({"rho": "0.6", "tile": 3}, 1 + 1 + 1, MIXED),
    "tile 100": ({"rho": "0.6", "tile": 100}, 5, MIXED),
    "layers": ({"layers": (1, 2)}, None, MIXED),
    "mistral_window": ({"rho": "0.6"}, None, MIXED),
    "edges": ({"sigma": 0.8, "rho": "0.5"}, None, EDGES),
    "three images": ({"sigma": 0.8, "rho": "0.5"}, None, THREE),
    "truncated": (TRUNCATED, None, MIXED),
    "truncated edges": (TRUNCATED, None, EDGES),
    "truncated three": (TRUNCATED, None, THREE),
    "code-qwen": (TRUNCATED | {"variant": "code-qwen"}, None, MIXED),
    "code-qwen edges": (TRUNCATED | {"variant": "code-qwen"}, None, EDGES),
    "code-qwen three": (TRUNCATED | {"variant": "code-qwen"}, None, THREE),
}  # fmt: skip
SLOW_CAPL = ["tile 3", "tile 100", "layers", "edges", "truncated edges", "truncated three", "code-qwen"]
SLOW_CAPL += ["code-qwen edges"]


@pytest.mark.parametrize("name", cases({name: (name,) for name in CAPL}, SLOW_CAPL))
def test_capl(name):
    """`keep` is how many tokens of an image are selected."""
    (settings, keep, layouts), window = CAPL[name], [name] * (name == "mistral_window")
    references = check(methods.CAPL, capl.Capl, (3, *window), layouts, **settings)
    assert keep is None or [len(reference.chosen) for reference in references] == [2 * keep, 0, keep]


@pytest.mark.parametrize("mode", named(["cross", "truncated"], slow=["truncated"]))
def test_capl_leaves_a_single_image_alone(mode):
    """In the paper's variants, that is."""
    compare.assert_plain(compare.load(3), [(3, IMAGE, 11), (9,)], methods.CAPL(mode=mode))


# Of seven layers 0 to 2 are noise, 3 and 4 candidates, 5 and 6 edited; of four 0 to 2 are noise, 2 candidate, 3 edited.
CLVA = {
    "strong": ({"lambda_": 0.4, "rho": "0.7", "a": 3.0}, MIXED, (7,)),
    "no_gate": ({"gate": False}, MIXED, (7,)),
    "no_anchors": ({"a": 0.0, "gate": False}, MIXED, (7,)),
    "no_suppression": ({"b": 0.0}, MIXED, (7,)),
    "edges": ({"rho": "0.5", "a": 2.0}, EDGES, (7,)),
    "window": ({"rho": "0.5", "a": 2.0}, MIXED, (7, "mistral_window")),  # decoding leaves the images behind
    "overlap": ({"rho": "0.3", "a": 2.0}, MIXED, (4,)),
}


@pytest.mark.parametrize(("settings", "layouts", "case"), cases(CLVA, slow=["edges", "window"]))
def test_clva(settings, layouts, case):
    check(methods.CLVA, clva.Clva, case, layouts, **{"rho": "0.1"} | settings)


def test_clva_finds_anchors_in_all_candidates_and_drifts_of_all_sizes():
    references = check(methods.CLVA, clva.Clva, (7,), MIXED, rho="0.3")
    assert set().union(*(reference.anchor_layers for reference in references)) == {3, 4}
    drifts = [drift for reference in references for drift in reference.drifts]
    assert min(drifts) == 0 and max(drifts) > 0.2


RANDOM = np.random.default_rng(7)
DIRECTIONS = RANDOM.normal(size=(DEPTH, WIDTH)).astype(np.float32)
VISION = np.random.default_rng(8).normal(size=(3, 32)).astype(np.float32)
SPACES = np.linalg.qr(RANDOM.normal(size=(DEPTH, WIDTH, 3)))[0].swapaxes(1, 2).astype(np.float32)
RATIOS = RANDOM.uniform(0.7, 1.4, (DEPTH, HEADS)).astype(np.float32)
THRESHOLDS = np.array([0.25, 0.3, 0.35, 0.4], np.float32)
LISTED = np.zeros((DEPTH, HEADS), bool)
LISTED[[0, 1, 1, 3], [2, 0, 3, 1]] = True
UPPER, STRONG = {"start_layer": 1, "end_layer": 3}, {"enhance": 1.6, "suppress": 0.3}


def of(word, **arrays):
    return Fitted(arrays, Source(word, "model", "pairs", "{}"))


VTI = methods.VTI(lambda_=9, lambda_image=7, fitted=of("vti", directions=DIRECTIONS, vision_directions=VISION))
# Method -> its settings, its reference, the fields of that (all layers unless it says which), and where.
LATE = {
    "vaf": (methods.VAF(**UPPER, **STRONG), field.Vaf, {"layers": (1, 2)} | STRONG, MIXED, (4,)),
    "vaf edges": (methods.VAF(**UPPER, **STRONG), field.Vaf, {"layers": (1, 2)} | STRONG, EDGES, (4,)),
    "vaf window": (methods.VAF(layers=(1, 2)), field.Vaf, {"layers": (1, 2)}, MIXED, (3, "mistral_window")),
    "middle": (methods.MiddleLayers(**UPPER), field.MiddleLayers, {"layers": (1, 2)}, MIXED, (4,)),
    "middle edges": (methods.MiddleLayers(**UPPER, alpha=1.5), field.MiddleLayers, {"layers": (1, 2), "alpha": 1.5},
                     EDGES, (4,)),
    "middle window": (methods.MiddleLayers(layers=(1, 2), alpha=1.5), field.MiddleLayers,
                      {"layers": (1, 2), "alpha": 1.5}, MIXED, (3, "mistral_window")),
}  # fmt: skip
FIELD = {
    "spin": (methods.SPIN(rho=0.7), field.Spin, {"rho": 0.7}, MIXED),
    "spin code": (methods.SPIN(rho=0.5, layers=(1, 2), variant="code"), field.Spin,
                  {"layers": (1, 2), "rho": 0.5, "variant": "code"}, EDGES),
    "dab": (methods.DAB(), field.Dab, {}, MIXED),
    "dab decode": (methods.DAB(alpha=2, tau=0.4, layers=(0, 3), decode=True), field.Dab,
                   {"layers": (0, 3), "alpha": 2, "tau": 0.4, "decode": True}, EDGES),
    "iat": (methods.IAT(start_layer=1, end_layer=3), field.Iat, {"layers": (1, 2)}, MIXED),
    "farsight": (methods.FarSight(), field.FarSight, {}, MIXED),
    "sparc": (methods.SPARC(alpha=3, tau=0.2, selected_layer=1), field.Sparc, {"alpha": 3, "tau": 0.2, "selected": 1},
              MIXED),
    "var": (methods.VAR(start_layer=1, p=0.2, tau=2.2), field.Var, {"layers": (1, 2), "p": 0.2, "tau": 2.2}, MIXED),
    "var dims": (methods.VAR(layers=(0, 2), dims=(5, 7, 11), tau=1.2, rho=0.9), field.Var,
                 {"layers": (0, 2), "dims": (5, 7, 11), "tau": 1.2, "rho": 0.9}, EDGES),
    "memvr": (methods.MemVR(layers=(0, 1, 2), tau=0.6, rho=0.4), field.MemVR,
              {"layers": (0, 1, 2), "tau": 0.6, "rho": 0.4}, MIXED),
    "vti": (VTI, field.Vti, {"directions": DIRECTIONS, "strength": 9, "vision": VISION, "strength_image": 7}, MIXED),
    "adhh": (methods.ADHH(tau=0.3, fitted=of("adhh", listed=LISTED)), field.Adhh,
             {"heads": tuple(map(tuple, np.argwhere(LISTED))), "tau": 0.3}, MIXED),
    "adhh heads": (methods.ADHH(tau=0.2, heads=(1, 0, 2, 3)), field.Adhh, {"heads": ((1, 0), (2, 3)), "tau": 0.2},
                   EDGES),
    "adaiat": (methods.AdaIAT(layers=(1, 2, 3), fitted=of("adaiat", ratios=RATIOS, thresholds=THRESHOLDS)),
               field.Adaiat, {"layers": (1, 2, 3), "ratios": RATIOS, "thresholds": THRESHOLDS}, MIXED),
}  # fmt: skip
# What further variants and strengths show, at ten seconds more; and fitted methods at the edges.
SLOW = ("spin code", "dab decode", "var dims", "farsight", "iat", "middle edges", "vaf edges", "vaf window")
AT_EDGES = {f"{name} edges": (*FIELD[name][:3], EDGES) for name in ("vti", "adhh", "adaiat")}


def bare(model="model"):
    """The small model, as if its checkpoint had that hash."""
    case = compare.load(*BARE)
    case.ours.hash = model
    return case


def reference(make, fields):
    """A new reference, which may need the model's weights."""
    case = compare.load(*BARE)
    model = {"model": (case.weights, case.config)} if "model" in make.__dataclass_fields__ else {}
    return make(**{"layers": ALL} | fields, **model)


CASES = LATE | {name: (*case, BARE) for name, case in (FIELD | AT_EDGES).items()}


@pytest.mark.parametrize(("method", "make", "fields", "layouts", "where"), cases(CASES, [*SLOW, *AT_EDGES]))
def test_field(method, make, fields, layouts, where):
    bare()
    compare.assert_one_branch(compare.load(*where), layouts, method, lambda: reference(make, fields))


def test_nullu_edits_every_sample():
    case = bare()
    main, _, _ = case.library(MIXED, methods.Nullu(rank=2, fitted=of("nullu", directions=SPACES)))
    edit = field.Nullu(layers=(2, 3), directions=SPACES[:, :2].astype(np.float64))
    for row, want in enumerate(case.references(one_branch.run, MIXED, method=edit)):
        compare.assert_close(main[row], want, f"main {row}")


@pytest.mark.parametrize(
    ("tau", "layouts"), [pytest.param(0.2, MIXED, marks=pytest.mark.slow), (1.2, EDGES)], ids=["contrast", "both"]
)
def test_only(tau, layouts):
    case, ways = compare.load(*BARE), set()
    main, _, combined = case.library(layouts, methods.ONLY(tau=tau))
    paths = [reference(field.Only, {}) for _ in layouts]
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
    case = compare.load(*BARE)
    main, _, combined = case.library(layouts, methods.VHR(layers=layers, alpha=alpha))
    plain, _, _ = case.library(layouts, None)
    edited = (1, 2, 3) if layers is None else layers
    for row, (want, margin) in enumerate(case.references(contrast.vhr, layouts, layers=edited, alpha=alpha)):
        assert margin > 1e-7
        compare.assert_close(main[row], want, f"main {row}")
        np.testing.assert_array_equal(combined[row], main[row])
        assert (np.abs(want - plain[row]).max() > 0.05) == (IMAGE in layouts[row])


def test_a_fitted_file_is_read_and_refused(tmp_path):
    path, given = tmp_path / "vti.safetensors", VTI.fitted
    fitted.write(path, given)
    for method in (methods.VTI(fitted=path), as_method(f"vti:lambda=0.5,fitted={path}")):
        np.testing.assert_array_equal(method.fitted["directions"], DIRECTIONS)
        assert method.fitted.source == given.source
    with pytest.raises(LVLMError, match="fitted for vti; expected one of lvlm fit nullu"):
        methods.Nullu(fitted=path)
    fitted.write(path, of("vti", directions=DIRECTIONS))  # as versions without the vision tower wrote it
    assert methods.VTI(fitted=path).tower_edit() is None
    for words in ("vti:lambda_image=0.5", "vti:lambda_image=0.9,lambda=0.9"):
        with pytest.raises(LVLMError, match="no directions for the vision tower; fit it again .* lambda_image to 0"):
            as_method(f"{words},fitted={path}")
    bad = {"text": b"no tensors", "other": safetensors.numpy.save({"directions": DIRECTIONS})}
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    for file, message in (
        (3, "fitted is a int"),
        (tmp_path / "nothing", "nothing. cannot be read"),
        (tmp_path / "other", "not a file of lvlm fit"),
        (tmp_path / "text", "cannot read"),
    ):
        with pytest.raises(LVLMError, match=message):
            methods.VTI(fitted=file)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (methods.chain(methods.VAF(layers=1), VTI), "vti was fitted for the checkpoint model.* fit it again"),
        (methods.VTI(), "VTI needs a fitted file: lvlm fit vti"),
        (methods.ADHH(heads=(1, 2, 3)), "heads has 3 numbers"),
        (methods.ADHH(heads=(1, 99)), "heads 0 to 3"),
    ],
)
def test_what_is_not_fitted_for_the_model_is_refused(method, message):
    case = bare("another")
    with pytest.raises(LVLMError, match=message):
        case.ours.prefill(case.inputs(MIXED), method)
