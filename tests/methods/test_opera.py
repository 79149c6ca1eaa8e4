"""OPERA against its plain NumPy form: answers, their scores, and every way back, on a small LLaVA."""

import dataclasses

import numpy as np
import pytest

from lvlm_jax import LVLM
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import opera as driver
from lvlm_jax.methods import CMAC, OPERA, chain
from tests import checkpoints
from tests.checkpoints import IMAGE
from tests.reference import llava
from tests.reference.opera import Opera

VOCABULARY = 120
LAYOUTS = [(4, IMAGE, 3), (2, IMAGE, 1, IMAGE, 6)]
CLEAR = 1e-4  # the closest choice of every run below is further from a tie than rounding reaches
SMALL = dict(beams=2, candidates=5, threshold=2, sigma=8.0, alpha=0.5, variant="paper")


class Case:
    """One checkpoint, in transformers for the reference and in the library, and two prompts."""

    def __init__(self, folder):
        theirs = checkpoints.make_llava(
            folder, seed=21, text={"num_key_value_heads": 2}, vision={"image_size": 14}
        )
        self.hf_config = theirs.config
        self.weights, self.config = llava.from_torch(theirs)
        self.model = LVLM.from_pretrained(folder)
        self.inputs = checkpoints.random_inputs(theirs.config, seed=22, layouts=LAYOUTS)

    def alone(self, row):
        return checkpoints.select(self.hf_config, self.inputs, row)

    def reference(self, row, settings, limit, stop=()):
        sample = self.alone(row)
        search = Opera(
            self.weights, self.config, sample["input_ids"][0], sample["pixel_values"], settings, stop
        )
        return search.answer(limit), search


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("opera"))


@pytest.fixture
def ways_back(monkeypatch):
    """Fills up with the ways back of every sample that is answered."""
    ways, search = [], driver.search

    def noted(*arguments):
        found, taken = search(*arguments)
        ways.append(taken)
        return found, taken

    monkeypatch.setattr(driver, "search", noted)
    return ways


RUNS = {
    "two beams": (SMALL, 14, (), True),
    "one beam, the place before": (SMALL | dict(beams=1, candidates=4, sigma=4.0, max_rollbacks=1), 14, (), True),
    "stop tokens": (SMALL, 14, (90, 71), False),
    "window": (SMALL | dict(window=4, sigma=4.0, threshold=1), 14, (), True),
    "authors' code": (dict(beams=2, candidates=5, threshold=2, window=6), 24, (), True),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "limit", "stop", "goes_back"), RUNS.values(), ids=RUNS)
def test_answers_and_ways_back_are_those_of_the_reference(case, ways_back, settings, limit, stop, goes_back):
    out = case.model.generate(case.inputs, OPERA(**settings), max_new_tokens=limit, stop_token_ids=list(stop))
    for row in range(len(LAYOUTS)):
        answer, search = case.reference(row, settings, limit, stop)
        assert search.margin > CLEAR
        assert ways_back[row] == search.ways_back
        assert out.tokens[row] == list(answer.tokens)
        np.testing.assert_allclose(out.logprobs[row], answer.logprobs, rtol=0, atol=1e-4)
        assert out.finish_reason[row] == ("stop" if answer.tokens[-1] in stop else "length")
    assert bool(sum(ways_back, [])) or not goes_back
    if stop:
        assert "stop" in out.finish_reason


def test_a_batch_equals_its_samples_alone(case, ways_back):
    together = case.model.generate(case.inputs, OPERA(**SMALL), max_new_tokens=14)
    for row in range(len(LAYOUTS)):
        alone = case.model.generate(case.alone(row), OPERA(**SMALL), max_new_tokens=14)
        assert alone.tokens[0] == together.tokens[row]
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[row], rtol=0, atol=1e-4)
    assert ways_back[:2] == ways_back[2:] and ways_back[0] != ways_back[1]


@pytest.mark.parametrize(("variant", "candidates"), [("paper", 5), ("code", VOCABULARY)])
def test_without_penalty_and_ways_back_it_is_beam_search(case, variant, candidates):
    method = OPERA(alpha=0.0, beams=2, candidates=candidates, threshold=10**6, variant=variant)
    out = case.model.generate(case.inputs, method, max_new_tokens=14)
    beams = case.model.generate(case.inputs, max_new_tokens=14, num_beams=2)
    assert out.tokens == beams.tokens
    for mine, theirs in zip(out.logprobs, beams.logprobs, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)
    acting = dataclasses.replace(method, alpha=np.float32(20.0))
    assert case.model.generate(case.inputs, acting, max_new_tokens=14).tokens != beams.tokens


def test_other_strengths_compile_nothing_and_huge_products_stay_finite(case):
    def programs():
        return [program._cache_size() for program in (driver.step, driver.replay, driver.take)]

    case.model.generate(case.inputs, OPERA(**SMALL), max_new_tokens=14)
    before = programs()
    out = case.model.generate(case.inputs, OPERA(**SMALL | dict(alpha=2.0, sigma=1e6)), max_new_tokens=13)
    assert programs() == before
    assert np.isfinite(np.concatenate(out.logprobs)).all() and [len(row) for row in out.tokens] == [13, 13]


@pytest.mark.parametrize(
    ("settings", "message"), [({"beams": 0}, "beams is 0"), ({"candidates": 1.5}, "candidates is 1.5")]
)
def test_settings_are_checked(settings, message):
    with pytest.raises(LVLMError, match=message):
        OPERA(**settings)


def test_what_the_search_cannot_do_is_said(case):
    def generate(method=None, **settings):
        return case.model.generate(case.inputs, method or OPERA(), **settings)

    with pytest.raises(LVLMError, match="does not sample"):
        generate(temperature=1.0)
    with pytest.raises(LVLMError, match="OPERA's beams 5"):
        generate(num_beams=3)
    with pytest.raises(LVLMError, match="cannot be chained"):
        generate(chain(CMAC(), OPERA()))
    with pytest.raises(LVLMError, match="cannot be streamed"):
        next(case.model.stream(case.alone(0), OPERA()))
    with pytest.raises(LVLMError, match="cannot be swept"):
        case.model.sweep(case.inputs, [OPERA(), OPERA(alpha=2.0)])
