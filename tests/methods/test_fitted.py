"""Methods with something fitted: against their NumPy references, and what their files are refused for."""

import numpy as np
import pytest
import safetensors.numpy

from lvlm_jax import LVLMError, methods
from lvlm_jax.methods import as_method, fitted
from lvlm_jax.methods.fitted import Fitted, Source
from tests.methods import compare
from tests.methods.compare import EDGES, MIXED
from tests.reference import field, one_branch

DEPTH, HEADS, WIDTH = 4, 4, 48
RANDOM = np.random.default_rng(7)
DIRECTIONS = RANDOM.normal(size=(DEPTH, WIDTH)).astype(np.float32)
SPACES = np.linalg.qr(RANDOM.normal(size=(DEPTH, WIDTH, 3)))[0].swapaxes(1, 2).astype(np.float32)
RATIOS = RANDOM.uniform(0.7, 1.4, (DEPTH, HEADS)).astype(np.float32)
THRESHOLDS = np.array([0.25, 0.3, 0.35, 0.4], np.float32)
LISTED = np.zeros((DEPTH, HEADS), bool)
LISTED[[0, 1, 1, 3], [2, 0, 3, 1]] = True


def of(word, **arrays):
    return Fitted(arrays, Source(word, "model", "pairs", "{}"))


CASES = {
    "vti": (methods.VTI(lambda_=9, fitted=of("vti", directions=DIRECTIONS)), field.Vti,
            {"directions": DIRECTIONS, "strength": 9}),
    "adhh": (methods.ADHH(tau=0.3, fitted=of("adhh", listed=LISTED)), field.Adhh,
             {"heads": tuple(map(tuple, np.argwhere(LISTED))), "tau": 0.3}),
    "adhh heads": (methods.ADHH(tau=0.2, heads=(1, 0, 2, 3)), field.Adhh, {"heads": ((1, 0), (2, 3)), "tau": 0.2}),
    "adaiat": (methods.AdaIAT(layers=(1, 2, 3), fitted=of("adaiat", ratios=RATIOS, thresholds=THRESHOLDS)),
               field.Adaiat, {"layers": (1, 2, 3), "ratios": RATIOS, "thresholds": THRESHOLDS}),
}  # fmt: skip


def load(model="model"):
    """The small model, as if its checkpoint had that hash."""
    case = compare.load(DEPTH, "bare")
    case.ours.hash = model
    return case


@pytest.mark.parametrize("layouts", [MIXED, pytest.param(EDGES, marks=pytest.mark.slow)], ids=["mixed", "edges"])
@pytest.mark.parametrize(("method", "make", "fields"), CASES.values(), ids=CASES)
def test_equals_the_reference(method, make, fields, layouts):
    case = load()
    compare.assert_one_branch(case, layouts, method, lambda: make(**{"layers": (0, 1, 2, 3)} | fields))


def test_nullu_edits_every_sample():
    case = load()
    main, _, _ = case.library(MIXED, methods.Nullu(rank=2, fitted=of("nullu", directions=SPACES)))
    reference = field.Nullu(layers=(2, 3), directions=SPACES[:, :2].astype(np.float64))
    for row, want in enumerate(case.references(one_branch.run, MIXED, method=reference)):
        compare.assert_close(main[row], want, f"main {row}")


def test_a_file_is_read_and_refused(tmp_path):
    path = tmp_path / "vti.safetensors"
    given = of("vti", directions=DIRECTIONS)
    fitted.write(path, given)
    for method in (methods.VTI(fitted=path), as_method(f"vti:lambda=0.5,fitted={path}")):
        np.testing.assert_array_equal(method.fitted["directions"], DIRECTIONS)
        assert method.fitted.source == given.source
    with pytest.raises(LVLMError, match="fitted for vti; expected one of lvlm fit nullu"):
        methods.Nullu(fitted=path)
    with pytest.raises(LVLMError, match="fitted is a int"):
        methods.VTI(fitted=3)
    with pytest.raises(LVLMError, match="nothing. cannot be read"):
        methods.VTI(fitted=tmp_path / "nothing")
    safetensors.numpy.save_file({"directions": DIRECTIONS}, path)
    with pytest.raises(LVLMError, match="no file of lvlm fit"):
        methods.VTI(fitted=path)
    path.write_bytes(b"no tensors")
    with pytest.raises(LVLMError, match="cannot read"):
        methods.VTI(fitted=path)


def test_another_models_file_is_refused():
    case = load("another")
    with pytest.raises(LVLMError, match="vti was fitted for the checkpoint model.* fit it anew"):
        case.ours.prefill(case.inputs(MIXED), methods.chain(methods.VAF(layers=1), CASES["vti"][0]))


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (methods.VTI(), "VTI needs something fitted: lvlm fit vti"),
        (methods.ADHH(heads=(1, 2, 3)), "heads has 3 numbers"),
        (methods.ADHH(heads=(1, 99)), "heads 0 to 3"),
    ],
)
def test_what_is_missing_is_named(method, message):
    case = load()
    with pytest.raises(LVLMError, match=message):
        case.ours.prefill(case.inputs(MIXED), method)
