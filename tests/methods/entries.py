"""What the tests of all methods know about each: settings under which it acts in a small model, and neutral ones."""

import dataclasses

import numpy as np
import pytest

from lvlm_jax import methods
from lvlm_jax.methods.fitted import Fitted, Source
from tests.checkpoints import IMAGE
from tests.slow import named

# Two images, none, one that opens the prompt, one inside: all in one bucket of columns and of last rows.
LAYOUTS = [(4, IMAGE, 3, IMAGE, 5), (9,), (IMAGE, 6), (3, IMAGE, 7)]
HASH = "of the model of these tests"
NO_CUT = 1e-30  # a plausibility β that cuts nothing

FUSION = "statistics of the logits make the compiler fuse their product otherwise"
TWO_BRANCHES = "a second branch is multiplied along with the first"


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the tests must know about a method.

    Attributes:
        fields: settings under which it acts in a model of `depth` layers and images of four tokens.
        neutral: strengths, on top of them, that leave greedy decoding.
        kinked: fields whose formula has a kink or a jump near by, and where; their slope is taken over less.
        inexact: why the main branch is not bit-equal to no method under neutral strengths; empty where it is.
        depth: layers of the model.
        logits: whether neutral strengths give back the very logits, not only their order.
        fitted: arrays of a file of `lvlm fit`, drawn at random, by their axes: layers, heads, channels, ranks; layers
            and channels of the tower.
    """

    fields: dict
    neutral: dict
    kinked: dict = dataclasses.field(default_factory=dict)
    inexact: str = ""
    depth: int = 2
    logits: bool = True
    fitted: dict = dataclasses.field(default_factory=dict)


# Methods of the field whose mechanisms others stand for in the quick suite.
SLOW = set("adaiat adhh causalmm dab damro farsight iat memvr nolan nullu only ritual sparc spin vhr vti".split())


ENTRIES = {
    "adaiat": Entry(
        {"layers": (0, 1), "alpha": 0.8}, {"alpha": 0}, inexact=FUSION, fitted={"ratios": "LH", "thresholds": "L"}
    ),
    "adhh": Entry({"heads": (0, 0, 0, 1, 1, 2, 1, 3), "tau": 0.05}, {"tau": 1.1}, inexact=FUSION),
    "avisc": Entry({"lambda_": 0.0}, {"alpha": 0, "beta": NO_CUT}, inexact=TWO_BRANCHES),
    "capl": Entry({}, {"sigma": 0}),
    "causalmm": Entry({}, {"gamma": 0, "beta": NO_CUT}, inexact=TWO_BRANCHES),
    "clva": Entry(
        {"noise_layers": 1, "rho": 0.5},
        {"a": 0, "b": 0},
        kinked={"lambda_": "relu(p - λ n) starts where λ = p / n"},
        inexact=FUSION,
        depth=3,
    ),
    "cmac": Entry(
        {"alpha": 1.0},
        {"alpha": 0, "beta": NO_CUT, "gamma": 1},
        kinked={"gamma": "M is a comparison of calibrated logits"},
        inexact=TWO_BRANCHES,
    ),
    "damro": Entry({"tokens": 1}, {"alpha": 0, "beta": NO_CUT}, inexact=TWO_BRANCHES),
    "dab": Entry({}, {"alpha": 0}, inexact=FUSION),
    "deco": Entry({"layers": (0, 1)}, {"alpha": 0}),
    "dola": Entry({"layers": (0, 1)}, {"beta": 1}, logits=False),
    "eah": Entry({}, {"beta": 1e9}),
    "farsight": Entry({}, {"sigma": 1e9}, inexact=FUSION),
    "iat": Entry({"start_layer": 0, "end_layer": None, "alpha": 0.4}, {"alpha": 0}),
    "icd": Entry({"tokens": (5, 7, 11)}, {"alpha": 0, "beta": NO_CUT}, inexact=TWO_BRANCHES),
    "m3id": Entry({}, {"decay": 0}, inexact=TWO_BRANCHES),
    "memvr": Entry({"layers": (0,), "tau": 0.1, "rho": 0.4}, {"rho": 0}, inexact=FUSION),
    "middle_layers": Entry({"start_layer": 0, "end_layer": None}, {"alpha": 0}, inexact=FUSION),
    "nolan": Entry({}, {"kappa": 0}, inexact=TWO_BRANCHES),
    "nullu": Entry({}, {"alpha": 0}, inexact=FUSION, fitted={"directions": "LRE"}),
    "only": Entry({"tau": 1.0}, {"alpha_complement": 0, "alpha_contrast": 0, "beta": NO_CUT}, inexact=FUSION),
    "pai": Entry({"start_layer": 1}, {"alpha": 0, "gamma": 1, "beta": NO_CUT}, inexact=TWO_BRANCHES, logits=False),
    "ritual": Entry({}, {"alpha": 0, "beta": NO_CUT}, inexact=TWO_BRANCHES),
    "sevi": Entry(
        {"start_layer": 0, "cicd": True, "kappa": 0.6, "alpha_max": 1.3},
        {"omega": 0, "alpha_max": 0, "beta": NO_CUT},
        kinked={"alpha_max": "a minimum of itself and what the divergence asks for"},
        inexact=TWO_BRANCHES,
    ),
    "sid": Entry({"start_layer": 1, "keep": 2}, {"alpha": 0, "beta": NO_CUT}, inexact=TWO_BRANCHES),
    "sparc": Entry({"selected_layer": 0, "tau": 0.02, "alpha": 3.0}, {"alpha": 1}, inexact=FUSION),
    "spin": Entry({"rho": 0.5}, {"scale": 1}, inexact=FUSION),
    "vaf": Entry({"start_layer": 0, "end_layer": None}, {"enhance": 1, "suppress": 1}),
    "var": Entry({"layers": (0, 1), "tau": 1.7, "p": 0.2, "rho": 0.9}, {"p": 1}, inexact=FUSION),
    "vcd": Entry({}, {"alpha": 0, "beta": NO_CUT}, inexact=TWO_BRANCHES),
    "vhr": Entry({"layers": (0, 1)}, {"alpha": 1}, inexact=FUSION),
    "vti": Entry(
        {"lambda_": 5.0, "lambda_image": 5.0},
        {"lambda_": 0, "lambda_image": 0},
        inexact="outputs are scaled to length 1 and back",
        fitted={"directions": "LE", "vision_directions": "TW"},
    ),
    "vista": Entry(
        {"layers": (0, 1)}, {"lambda_": 0, "gamma": 0}, inexact="hidden states are scaled to length 1 and back"
    ),
}

# Not a rule for single steps but a search of its own, with tests of its own.
SEARCHES = {"opera"}


def each_method(quick=None):
    """Runs a test for every method; quick are those in some words, or all that are not in SLOW."""
    chosen = set(methods.names()) - SLOW if quick is None else set(quick.split())
    names = [name for name in methods.names() if name not in SEARCHES]
    return pytest.mark.parametrize("name", named(names, set(names) - chosen))


def build(name, neutral=False, **sizes):
    """The method with the settings of its entry, for a model of these sizes, by default that of the tests here."""
    entry, random = ENTRIES[name], np.random.default_rng(45)
    sizes = {"L": entry.depth, "H": 4, "E": 32, "R": 3, "T": 2, "W": 16} | sizes
    settings = entry.fields | (entry.neutral if neutral else {})
    if entry.fitted:
        shapes = {array: [sizes[letter] for letter in letters] for array, letters in entry.fitted.items()}
        arrays = {array: random.uniform(0.3, 1.7, shape).astype(np.float32) for array, shape in shapes.items()}
        settings = settings | {"fitted": Fitted(arrays, Source(name, HASH, "pairs", "{}"))}
    return methods.get(name)(**settings)


def strengths(method):
    """Its numeric fields, by name."""
    return {
        field.name: getattr(method, field.name)
        for field in dataclasses.fields(method)
        if "low" in field.metadata and getattr(method, field.name) is not None
    }  # fmt: skip
