"""What a call of the public face does once, and what it asks of methods that carry a search."""

import re
from typing import ClassVar

import pytest

from lvlm_jax import methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import branches, drivers, searches
from lvlm_jax.generation.settings import Decoding
from lvlm_jax.methods.base import frozen
from lvlm_jax.processors import inputs
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
    count(branches, "contrast_inputs", "contrast prompts")
    count(drivers, "encode_images", "towers")
    count(drivers, "full_forward", "passes")
    count(drivers, "tapped_forward", "warm-up passes")
    return taken


@pytest.mark.parametrize("call", CALLS)
def test_a_prompt_and_its_contrast_prompt_are_made_once_a_call(model, counts, call):
    """M3ID: the contrast branch reads a prompt of its own, without images, so that the tower runs once."""
    CALLS[call](model, methods.M3ID())
    contrast = 0 if call == "logits" else 1
    assert counts == {
        "prepared": 1,
        "contrast prompts": contrast,
        "towers": 1,
        "passes": 1 if call == "logits" else 0,
        "warm-up passes": 0,
    }


@pytest.mark.parametrize("call", sorted(set(CALLS) - {"beams", "generate_many", "logits"}))
def test_the_warm_up_pass_is_run_once_a_call(model, counts, call):
    """VISTA: one pass over the prompt with its image and one without it; the tower runs once."""
    CALLS[call](model, methods.VISTA(start_layer=0))
    assert counts == {"prepared": 1, "contrast prompts": 1, "towers": 1, "passes": 0, "warm-up passes": 2}


def test_the_warm_up_pass_computes_no_logits(model, monkeypatch):
    """No array of the compiled program has a logit of every token of the vocabulary for every row."""
    calls, run = [], drivers.tapped_forward

    def noted(*arguments, **options):
        calls.append((arguments, options))
        return run(*arguments, **options)

    monkeypatch.setattr(drivers, "tapped_forward", noted)
    model.prefill(PROMPT, methods.VISTA(start_layer=0))
    (arguments, options), logits = calls[0], re.compile(rf"\[\d+,\d+,{model.config.text.vocab_size}\]")
    assert not logits.search(run.lower(*arguments, **options).compile().as_text())
    assert logits.search(drivers.full_forward.lower(*arguments, **options).compile().as_text())


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


@pytest.mark.parametrize("call", CALLS)
def test_a_method_is_taken_in_words(model, call):
    with pytest.raises(LVLMError, match="there is no method 'magic'"):
        CALLS[call](model, "magic")
    with pytest.raises(LVLMError, match=r"CMAC is a class; write CMAC\(\)"):
        CALLS[call](model, methods.CMAC)


def test_a_word_is_the_method_it_names(model, mixed):
    words = model.generate(mixed, "cmac:alpha=2", max_new_tokens=6)
    assert words == model.generate(mixed, methods.CMAC(alpha=2.0), max_new_tokens=6)
    assert model.sweep(mixed, ["cmac", "cmac:alpha=2"], max_new_tokens=6)[1].tokens == words.tokens


def test_a_sweep_wants_methods(model):
    with pytest.raises(LVLMError, match="got 0 structures"):
        model.sweep(PROMPT, [])
    with pytest.raises(LVLMError, match="got None; use generate"):
        model.sweep(PROMPT, [None, None])


def test_a_search_is_named_by_its_method():
    assert searches.obstacle(methods.OPERA()).startswith("OPERA is a search of its own")
    assert searches.obstacle(methods.CMAC()) is None and searches.obstacle(None) is None
    assert searches.obstacle(None, Decoding(num_beams=2)) == "a beam search may take tokens back"
    wanted = {methods.get(name).search for name in methods.names()} - {None}
    assert wanted == set(searches.SEARCHES)
    with pytest.raises(LVLMError, match="OPERA is a search of its own and cannot be chained"):
        methods.chain(methods.CMAC(), methods.OPERA())


def test_a_search_that_there_is_not(model):
    @frozen
    class Lost(methods.OPERA):
        search: ClassVar[str] = "lost"

    with pytest.raises(LVLMError, match="Lost wants the search 'lost'; expected one of opera"):
        model.generate(PROMPT, Lost(), **NEW)


def test_answers_and_prompts_go_together(model, mixed):
    with pytest.raises(LVLMError, match="1 answers were given for 3 conversations"):
        model.attention(mixed, [[5, 6]])


@pytest.mark.parametrize("length", [40.5, "64", 0])
def test_the_length_of_a_state_is_a_number(model, mixed, length):
    with pytest.raises(LVLMError, match=f"max_length is {length!r}; expected a whole number"):
        model.prefill(mixed, max_length=length)
