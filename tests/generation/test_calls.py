"""The work that a public call does once, and its requirements for methods with a search."""

import re
from typing import ClassVar

import pytest

from lvlm_jax import methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import branches, decode_loop, searches
from lvlm_jax.generation.settings import Decoding
from lvlm_jax.methods.base import frozen
from lvlm_jax.processors import inputs
from tests.slow import named
from tests.small import conversation

PROMPT = conversation("What?", seed=3)
NEW = {"max_new_tokens": 2}

CALLS = {
    "generate": lambda model, method: model.generate(PROMPT, method, **NEW),
    "generate with stop strings": lambda model, method: model.generate(PROMPT, method, stop="never", **NEW),
    "beams": lambda model, method: model.generate(PROMPT, method, num_beams=2, **NEW),
    "generate_many": lambda model, method: list(model.generate_many([(PROMPT, 0)], method, **NEW)),
    "stream": lambda model, method: list(model.stream(PROMPT, method, **NEW)),
    "sweep": lambda model, method: model.sweep(PROMPT, [method, method], **NEW),
    "prefill": lambda model, method: model.prefill(PROMPT, method),
    "attention": lambda model, method: model.attention(PROMPT, [[5, 6]], method),
    "logits": lambda model, method: model.logits(PROMPT, method),
}


@pytest.fixture
def counts(monkeypatch):
    """counts[name]: how often a step of a generation was taken."""
    taken = {}

    def count(owner, name, title):
        function = getattr(owner, name)
        taken[title] = 0

        def counted(*arguments, **options):
            taken[title] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, counted)

    count(inputs, "from_messages", "prepared")
    count(branches, "make_contrast_prompt", "contrast prompts")
    count(decode_loop, "encode_images", "towers")
    count(decode_loop, "full_forward", "passes")
    count(decode_loop, "tapped_forward", "warm-up passes")
    return taken


@pytest.mark.parametrize("call", named(CALLS, slow=["beams", "generate_many", "stream", "sweep"]))
def test_prompts_towers_and_warm_up_passes_are_run_once_a_call(model, counts, call):
    """M3ID: the contrast branch reads a prompt of its own, without images, so that the tower runs once.

    VISTA: one pass over the prompt with its image and one without it; the tower runs once.
    """
    CALLS[call](model, methods.M3ID())
    full = call == "logits"
    once = {"prepared": 1, "contrast prompts": int(not full), "towers": 1, "passes": int(full), "warm-up passes": 0}
    assert counts == once
    if call not in ("beams", "generate_many", "logits"):
        counts.update(dict.fromkeys(counts, 0))
        CALLS[call](model, methods.VISTA(start_layer=0))
        assert counts == once | {"warm-up passes": 2}


def test_the_warm_up_pass_computes_no_logits(model, monkeypatch):
    """No array of the compiled program has a logit of every token of the vocabulary for every row."""
    calls, run = [], decode_loop.tapped_forward

    def noted(*arguments, **options):
        calls.append((arguments, options))
        return run(*arguments, **options)

    monkeypatch.setattr(decode_loop, "tapped_forward", noted)
    model.prefill(PROMPT, methods.VISTA(start_layer=0))
    (arguments, options), logits = calls[0], re.compile(rf"\[\d+,\d+,{model.config.text.vocab_size}\]")
    assert not logits.search(run.lower(*arguments, **options).compile().as_text())
    assert logits.search(decode_loop.full_forward.lower(*arguments, **options).compile().as_text())


def test_a_sweep_runs_the_tower_again_only_for_other_pictures(model, counts):
    strengths = [methods.VCD(alpha=alpha) for alpha in (0.5, 1.0, 2.0)]
    model.sweep(PROMPT, strengths, **NEW)
    assert counts["towers"] == 2 and counts["prepared"] == 1
    counts["towers"] = 0
    model.sweep(PROMPT, [methods.VCD(noise_step=step) for step in (0, 500, 900)], **NEW)
    assert counts["towers"] == 4


def test_a_sweep_with_one_picture_for_all_equals_one_generation_after_another(model, mixed):
    grid = [methods.VCD(alpha=alpha, noise_step=900) for alpha in (0.0, 4.0)]
    together = model.sweep(mixed, grid, max_new_tokens=8)
    assert [out.tokens for out in together] == [
        model.generate(mixed, method, max_new_tokens=8).tokens for method in grid
    ]


def test_a_method_is_taken_in_words(model, mixed):
    for call in CALLS.values():
        for given, message in (("magic", "there is no method 'magic'"), (methods.CMAC, r"class; write CMAC\(\)")):
            with pytest.raises(LVLMError, match=message):
                call(model, given)
    words = model.generate(mixed, "cmac:alpha=2", max_new_tokens=6)
    assert words == model.generate(mixed, methods.CMAC(alpha=2.0), max_new_tokens=6)
    assert model.sweep(mixed, ["cmac", "cmac:alpha=2"], max_new_tokens=6)[1].tokens == words.tokens


def test_searches_are_named_by_their_methods():
    assert searches.obstacle(methods.OPERA()).startswith("OPERA is a search")
    assert searches.obstacle(methods.CMAC()) is None and searches.obstacle(None) is None
    assert searches.obstacle(None, Decoding(num_beams=2)) == "a beam search may take tokens back"
    wanted = {methods.get(name).search for name in methods.names()} - {None}
    assert wanted == set(searches.SEARCHES)


@frozen
class Lost(methods.OPERA):
    search: ClassVar[str] = "lost"


def test_calls_that_cannot_be_answered(model, mixed):
    for ask, message in (
        (lambda: model.sweep(PROMPT, []), "got 0 structures"),
        (lambda: model.sweep(PROMPT, [None, None]), "got None; use generate"),
        (lambda: model.generate(PROMPT, Lost(), **NEW), "Lost has the search 'lost'; expected one of opera"),
        (lambda: model.attention(mixed, [[5, 6]]), "1 answers were given for 3 conversations"),
        *((lambda length=length: model.prefill(mixed, max_length=length), f"max_length is {length!r}; expected a whole")
          for length in (40.5, "64", 0)),
    ):  # fmt: skip
        with pytest.raises(LVLMError, match=message):
            ask()
