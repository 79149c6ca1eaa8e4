"""OPERA against its NumPy reference: answers, their scores, and every rollback, on a small LLaVA."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from lvlm_jax import LVLM
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import opera as driver
from lvlm_jax.methods import CMAC, OPERA, chain
from tests import checkpoints
from tests.checkpoints import IMAGE
from tests.reference import llava
from tests.reference.opera import Opera, mode, place_of_notes
from tests.slow import cases

VOCABULARY = 120
LAYOUTS = [(4, IMAGE, 3), (2, IMAGE, 1, IMAGE, 6)]
CLEAR = 1e-4  # the closest choice of every run below is further from a tie than rounding reaches
CODE = dict(beams=2, candidates=5, threshold=2, max_rollbacks=2)
SMALL = dict(beams=2, candidates=5, threshold=2, sigma=8.0, alpha=0.5, variant="paper")


class Case:
    """One checkpoint, in transformers for the reference and in the library, and two prompts."""

    def __init__(self, folder):
        theirs = checkpoints.make_llava(folder, seed=21, text={"num_key_value_heads": 2}, vision={"image_size": 14})
        self.hf_config = theirs.config
        self.weights, self.config = llava.from_torch(theirs)
        self.model = LVLM.from_pretrained(folder)
        self.inputs = checkpoints.random_inputs(theirs.config, seed=22, layouts=LAYOUTS)

    def alone(self, row):
        return checkpoints.select(self.hf_config, self.inputs, row)

    def reference(self, row, settings, limit, stop=()):
        sample = self.alone(row)
        search = Opera(self.weights, self.config, sample["input_ids"][0], sample["pixel_values"], settings, stop)
        return search.answer(limit), search


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("opera"))


@pytest.fixture
def ways_back(monkeypatch):
    """Collects the rollbacks of every sample that is answered."""
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
    "authors' code": (CODE | dict(window=6, sigma=8.0), 22, (), True),
    "authors' code, two places": (CODE | dict(window=4, sigma=50.0), 22, (), True),
    "authors' code without a way back": (CODE | dict(sigma=50.0), 22, (), False),
}  # fmt: skip


SLOW = ("one beam, the place before", "authors' code, two places", "authors' code without a way back")


@pytest.mark.parametrize(("settings", "limit", "stop", "goes_back"), cases(RUNS, SLOW))
def test_answers_and_ways_back_are_those_of_the_reference(case, ways_back, settings, limit, stop, goes_back):
    out = case.model.generate(case.inputs, OPERA(**settings), max_new_tokens=limit, stop_token_ids=list(stop))
    for row in range(len(LAYOUTS)):
        answer, search = case.reference(row, settings, limit, stop)
        assert search.margin > CLEAR
        assert ways_back[row] == search.ways_back
        assert out.tokens[row] == list(answer.tokens)
        np.testing.assert_allclose(out.logprobs[row], answer.logprobs, rtol=0, atol=1e-4)
        assert out.finish_reason[row] == ("stop" if answer.tokens[-1] in stop else "length")
    assert bool(sum(ways_back, [])) == goes_back or stop
    if goes_back and settings.get("variant") != "paper":
        assert max(map(len, ways_back)) == 2
    if stop:
        assert "stop" in out.finish_reason


# Columns c of a made search, one line per token: of three candidates of beam 0, and of beam 1.
MADE = [
    [[0, 0, 0], [0, 0, 0]],
    [[0, 1, 1], [1, 1, 0]],
    [[2, 1, 0], [1, 2, 2]],  # all differ: the smallest counts
    *[[[3, 3, 2], [3, 2, 3]]] * 8,
    [[11, 11, 3], [11, 3, 11]],
    [[11, 11, 3], [3, 11, 11]],
    [[11, 11, 12], [3, 3, 11]],
    [[11, 3, 11], [11, 11, 11]],
]


def made_history(method, parents, steps):
    """What `noted` keeps of the steps of MADE; beams continue those in `parents`, each with its first candidate."""
    columns = jnp.zeros((2, len(MADE)), jnp.int32)
    for newest, candidates in enumerate(MADE[:steps]):
        columns = method.noted(
            columns, jnp.asarray(candidates), jnp.asarray(parents), 3 * jnp.asarray(parents), jnp.int32(newest)
        )
    return np.asarray(columns)[:, :steps]


def test_the_code_notes_one_column_per_beam_and_step():
    """The mode of all candidates, in the beam's place, whichever beams go on; the paper keeps those of the tokens.

    The place to go back to is that of the newest columns, if each beam has noted it at least `threshold` times. Column
    3 is the most frequent of all, and blocks nothing.
    """
    modes = [[mode(beam) for beam in step] for step in MADE]
    for parents in ([0, 1], [1, 0], [0, 0]):
        history = made_history(OPERA(**CODE), parents, len(MADE))
        np.testing.assert_array_equal(history.T, modes)
    paper = made_history(OPERA(**CODE | dict(variant="paper")), [1, 1], len(MADE))
    np.testing.assert_array_equal(paper.T, [[beams[1][0]] * 2 for beams in MADE])
    # Beam 1 notes 11, 11, 3, 11: s is 11 after each but the third, where 3 and 11 are tied and 3 is below 10.
    for threshold, back in ((2, {12: 11, 14: 11}), (3, {14: 11}), (4, {}), (5, {})):
        method, places = OPERA(**CODE | dict(threshold=threshold)), {}
        for step in range(len(MADE)):
            history = made_history(method, [1, 0], step + 1)
            place = method.recurring(history, np.ones(2, bool))
            assert place == place_of_notes(history.T.tolist(), threshold)
            places |= {step: place} if place is not None else {}
        assert places == back


def test_ways_back_of_made_histories():
    """Back to the place, at most `max_rollbacks` times, then to the place before it, then no more."""
    method = OPERA(**CODE | dict(max_rollbacks=1))
    history, alive = made_history(method, [0, 1], 15), [np.ones(2, bool)] * 20
    rollbacks = driver.Rollbacks(method)
    for target, pairs in ((11, [(0, 7), (1, 9)]), (10, [(0, 5), (1, 5)])):
        assert rollbacks.target(history, alive[:16]) == target
        rollbacks.note(target, pairs)
    assert rollbacks.banned == {10: [(0, 5), (1, 5)]}  # what was banned further on may be chosen again
    assert rollbacks.target(history, alive[:16]) is None
    np.testing.assert_array_equal(rollbacks.tokens(10), [[5, -1], [-1, 5]])
    for variant, second in (("code", 10), ("paper", None)):  # an earlier place may follow a later one in the code alone
        rollbacks = driver.Rollbacks(OPERA(**CODE | dict(variant=variant, threshold=1)))
        assert rollbacks.target(np.array([[12] * 18] * 2), alive) == 12
        rollbacks.note(12, [(0, 1), (1, 2)])
        assert rollbacks.target(np.array([[10] * 18] * 2), alive) == second


def test_scores_are_float16_under_code():
    """In float16, 1e-7 p is 0 below 3e-8, and columns that differ by 1e-4 are equal, so that the first is chosen."""
    products = jnp.log(jnp.asarray([[0.1, 0.2, 0.05], [3e4, 3.0003e4, 1.0], [3e4, 3.1e4, 1.0]]))
    method = OPERA(**CODE)
    over_trust, columns = method.over_trust(products, jnp.int32(11), jnp.zeros(3))
    np.testing.assert_array_equal(columns, [0, 0, 1])
    expected = [0.0, float(np.float16(3e-3)), float(np.float16(3.1e-3))]
    np.testing.assert_allclose(over_trust, expected, rtol=1e-3)
    _, columns = OPERA(**CODE | dict(window=11)).over_trust(products, jnp.int32(11), jnp.zeros(3))
    np.testing.assert_array_equal(columns, [1, 1, 1])  # the window begins at column 1, even where all is 0


def test_samples_alone_and_other_strengths(case, ways_back, all_programs_kept):
    """A batch equals its samples alone; other strengths compile nothing, and huge products stay finite."""
    together = case.model.generate(case.inputs, OPERA(**SMALL), max_new_tokens=14)
    for row in range(len(LAYOUTS)):
        alone = case.model.generate(case.alone(row), OPERA(**SMALL), max_new_tokens=14)
        assert alone.tokens[0] == together.tokens[row]
        np.testing.assert_allclose(alone.logprobs[0], together.logprobs[row], rtol=0, atol=1e-4)
    assert ways_back[:2] == ways_back[2:] and ways_back[0] != ways_back[1]

    def programs():
        return [program._cache_size() for program in (driver.step, driver.replay, driver.take)]

    before = programs()
    out = case.model.generate(case.inputs, OPERA(**SMALL | dict(alpha=2.0, sigma=1e6)), max_new_tokens=13)
    assert programs() == before
    assert np.isfinite(np.concatenate(out.logprobs)).all() and [len(row) for row in out.tokens] == [13, 13]


@pytest.mark.parametrize(
    ("variant", "candidates"), [("paper", 5), pytest.param("code", VOCABULARY, marks=pytest.mark.slow)]
)
def test_without_penalty_and_ways_back_it_is_beam_search(case, variant, candidates):
    method = OPERA(alpha=0.0, beams=2, candidates=candidates, threshold=10**6, variant=variant)
    out = case.model.generate(case.inputs, method, max_new_tokens=14)
    beams = case.model.generate(case.inputs, max_new_tokens=14, num_beams=2)
    assert out.tokens == beams.tokens
    for mine, theirs in zip(out.logprobs, beams.logprobs, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)
    acting = dataclasses.replace(method, alpha=np.float32(20.0))
    assert case.model.generate(case.inputs, acting, max_new_tokens=14).tokens != beams.tokens


def test_what_the_search_cannot_do_is_said(case):
    for ask, message in (
        (lambda: case.model.generate(case.inputs, OPERA(), temperature=1.0), "has no sampling"),
        (lambda: case.model.generate(case.inputs, OPERA(), num_beams=3), "OPERA's beams 5"),
        (lambda: case.model.generate(case.inputs, chain(CMAC(), OPERA())), "cannot be chained"),
        (lambda: next(case.model.stream(case.alone(0), OPERA())), "cannot be streamed"),
        (lambda: case.model.sweep(case.inputs, [OPERA(), OPERA(alpha=2.0)]), "cannot be swept"),
    ):
        with pytest.raises(LVLMError, match=message):
            ask()
