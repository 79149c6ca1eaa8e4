"""Preference pairs: both answers of each prompt once, whatever kills the run; filters, splits and figures by hand."""

import dataclasses
import json

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.training.data import ladder, pairs
from lvlm_jax.training.data.pair_files import read_pairs
from lvlm_jax.training.data.pair_filters import (
    REASONS,
    Candidate,
    Filters,
    balance,
    hold_out,
    normalised,
    overlap,
    sift,
    statistics,
)
from lvlm_jax.training.data.prompts import Prompt, read_prompts
from tests.training.pair_sets import write_rows
from tests.training.stand_in import PLAN, StandIn, prompt

RECORD = {"model": "stand-in", "seed": 5}


@pytest.fixture
def prompts(tmp_path):
    """Seven prompts about one to three pictures, not in the order in which they are asked."""
    return [prompt(tmp_path, name, images=count) for name, count in zip("abcdefg", (2, 1, 3, 1, 2, 2, 1), strict=True)]


def run(prompts, log, model, batch_size=2, plan=PLAN, record=RECORD):
    return pairs.answer(prompts, plan, lambda: model, log, record, batch_size)


def test_each_prompt_is_answered_under_both_methods(prompts, tmp_path):
    model = StandIn()
    said = run(prompts, tmp_path / "log", model)
    assert set(said) == set("abcdefg")
    assert said["c"].chosen.text == "cross What is c?" and said["c"].rejected.text == "truncated What is c?"
    assert (said["c"].chosen.tokens, said["c"].chosen.finish_reason) == (4, "stop")
    # Prompts with equally many pictures are asked together, and the last batch is filled up.
    assert ["".join(text[-2] for text in batch) for batch in model.batches] == ["bd", "ga", "ef", "cc"]
    assert [call["method"] for call in model.calls] == [PLAN.chosen.method, PLAN.rejected.method] * 4
    assert {(call["temperature"], call["top_p"], call["max_new_tokens"]) for call in model.calls} == {(0.0, 1.0, 7)}


def test_samples_have_seeds_of_their_own_that_batches_do_not_change(prompts, tmp_path):
    side = pairs.Side(None, 0.7)
    plan = dataclasses.replace(PLAN, chosen=side, rejected=side)
    found = [run(prompts, tmp_path / str(size), StandIn(), size, plan, {"size": size}) for size in (1, 3)]
    assert found[0] == found[1]
    texts = [answer.text for said in found[0].values() for answer in (said.chosen, said.rejected)]
    assert len({text.split()[-1] for text in texts}) == 14
    other = run(prompts, tmp_path / "other", StandIn(), 3, dataclasses.replace(plan, seed=6))
    assert other["a"].chosen.text != found[0]["a"].chosen.text


def test_killed_at_any_call_a_log_loses_and_doubles_nothing(prompts, tmp_path):
    whole = run(prompts, tmp_path / "whole", StandIn())
    content = (tmp_path / "whole").read_bytes()
    for call in range(8):
        log, model = tmp_path / f"killed_{call}", StandIn()
        with pytest.raises(KeyboardInterrupt):
            run(prompts, log, StandIn(killed_at=call))
        assert run(prompts, log, model) == whole
        assert len(model.batches) == 4 - call // 2
        assert sorted(log.read_bytes().splitlines()) == sorted(content.splitlines())
    assert run(prompts, log, None) == whole  # everything is there: no model is asked
    with pytest.raises(LVLMError, match="begun with other settings \\(seed: 5, now 6\\)"):
        run(prompts, tmp_path / "whole", StandIn(), record=RECORD | {"seed": 6})
    assert (tmp_path / "whole").read_bytes() == content


def test_a_prompt_that_cannot_be_answered_is_named_and_tried_again(prompts, tmp_path, capsys):
    said = run([*prompts, prompt(tmp_path, "h", "too long?")], tmp_path / "log", StandIn(), batch_size=8)
    assert set(said) == set("abcdefg") and "prompt h: the prompt has 99 tokens" in capsys.readouterr().err
    said = run([*prompts, prompt(tmp_path, "h", "short?")], tmp_path / "log", StandIn())
    assert said["h"].chosen.text == "cross short?"


def test_candidates_know_what_was_corrected_and_what_was_cut(tmp_path):
    asked = [prompt(tmp_path, text[-1], text) for text in ("endless a", "b", "c", "too long d")]
    said = run(asked, tmp_path / "log", StandIn())
    found = pairs.candidates(asked, said, {"a": "Cross endless a.", "b": "The truth.", "c": "cross c"})
    # A full stop is no correction.
    assert [(one.prompt.id, one.chosen, one.rejected, one.corrected, one.unfinished) for one in found] == [
        ("a", "Cross endless a.", "truncated endless a", False, True),
        ("b", "The truth.", "truncated b", True, False),
        ("c", "cross c", "truncated c", False, False),
    ]


@pytest.mark.parametrize(
    "first, second, expected",
    [
        ("the dog sits", "the dog sits", 1.0),
        ("The dog, sits!", "the DOG sits", 1.0),
        ("a b c d", "a x c d", 2 * 3 / 8),
        ("a dog left of a cat", "a cat left of a dog", 2 * 4 / 12),  # a, left, of, a
        ("one two", "three", 0.0),
        ("a b", "a b c d e f", 2 * 2 / 8),
        ("?", "a", 0.0),
    ],
)
def test_overlap(first, second, expected):
    assert overlap(first, second) == overlap(second, first) == pytest.approx(expected)


def test_normalised():
    assert normalised(' "A  dog\nsits."') == normalised("a dog sits") == "a dog sits"
    assert normalised("3.5") != normalised("35") and normalised("C++") != normalised("C")


def candidate(chosen, rejected, unfinished=False, images=("x",), corrected=False):
    return Candidate(Prompt(tuple(images), [], "id"), chosen, rejected, corrected, unfinished)


EXAMPLES = [
    (candidate("A dog.", "A cat."), None),
    (candidate(" \n", "A cat."), "empty"),
    (candidate("Yes.", "yes"), "equal"),
    (candidate("yes", "no", unfinished=True), "unfinished"),
    (candidate("yes", "no " * 301), "too_long"),
    (candidate("yes", "no " * 300), None),
    (candidate("word " * 60 + "left", "word " * 60 + "right"), "near_duplicate"),  # 2 * 60 / 122 = 0.984
    (candidate("word " * 40 + "left", "word " * 40 + "right"), None),  # 2 * 40 / 82 = 0.976
]


@pytest.mark.parametrize("example, reason", EXAMPLES)
def test_filters(example, reason):
    assert Filters().reason(example) == reason
    open_to_all = Filters(near_duplicate=1.0, max_words=0, unfinished=False)
    assert open_to_all.reason(example) == (reason if reason in ("empty", "equal") else None)


def test_statistics():
    good = [
        candidate("a b c", "d", images=("1",), corrected=True),
        candidate("a", "b c", images=("1", "2")),
        candidate("e f", "g h", images=("3",)),
    ]
    found = [*good, *(example for example, reason in EXAMPLES if reason)]
    kept, dropped = sift(found, Filters())
    assert kept == good and dropped == dict.fromkeys(REASONS, 1)
    chosen, rejected = ({"mean": mean, "median": 2.0, "largest": most} for mean, most in ((2.0, 3), (1.67, 2)))
    assert statistics(9, found, kept, dropped) == {
        "prompts": 9, "failed": 1, "kept": 3, "dropped": dropped, "corrected": 0.3333, "chosen_longer": 0.3333,
        "words": {"chosen": chosen, "rejected": rejected}, "images": {"1": 2, "2": 1},
    }  # fmt: skip


def test_held_out_pairs_share_no_picture(tmp_path):
    # 0-1-2 hang together through the pictures b and c, 3-4 through the encoded picture.
    pictures = [("a", "b"), ("b", "c"), ("c",), (b"png",), (b"png", "e"), ("f",), ("g",), ("h",), ("i",), ("j",)]
    paths = [[name if isinstance(name, bytes) else tmp_path / name for name in names] for names in pictures]
    found = [candidate(str(index), "x", images=names) for index, names in enumerate(paths)]
    drawn = set()
    for seed in range(8):
        training, validation = hold_out(found, 0.3, seed)
        held = [int(one.chosen) for one in validation]
        assert sorted(held + [int(one.chosen) for one in training]) == list(range(10))
        assert len(held) == 3 and held == sorted(held)
        assert held == [0, 1, 2] or not {0, 1, 2} & set(held)
        assert len({3, 4} & set(held)) != 1
        assert hold_out(found, 0.3, seed) == (training, validation)
        drawn.add(tuple(held))
    assert len(drawn) > 2
    for few, message in ((found[:3], "cannot be held out.*smallest group has 3"), (found[:1], "cannot be held out")):
        with pytest.raises(LVLMError, match=message):
            hold_out(few, 0.5)


def test_pairs_are_written_with_statistics_and_record(prompts, tmp_path):
    said = run(prompts, tmp_path / "log", StandIn())
    found = pairs.candidates(prompts, said, {key: f"{key} is here" for key in said})
    figures = pairs.write(tmp_path, found, len(prompts), RECORD, Filters(), holdout=0.3)
    training, validation = (read_pairs(tmp_path / name) for name in ("pairs.jsonl", "validation.jsonl"))
    assert len(training) == figures["training"] == 5 and len(validation) == figures["validation"] == 2
    assert figures == json.loads((tmp_path / "statistics.json").read_text())
    (pair,) = (pair for pair in (*training, *validation) if pair.id == "c")
    assert (pair.chosen, pair.rejected) == ("c is here", "truncated What is c?")
    assert pair.images == prompts[2].images and pair.prompt == prompts[2].messages
    assert json.loads((tmp_path / "pairs.jsonl").read_text().split("\n")[0])["images"][0] == "a_0.png"
    record = json.loads((tmp_path / "pairs.jsonl.run.json").read_text())
    assert record["model"] == "stand-in" and record["filters"]["max_words"] == 300
    pairs.write(tmp_path, found, len(prompts), RECORD, Filters())
    assert not (tmp_path / "validation.jsonl").exists() and len(read_pairs(tmp_path / "pairs.jsonl")) == 7
    with pytest.raises(LVLMError, match="none of 7 prompts became a pair \\(too_long 7\\)"):
        pairs.write(tmp_path, found, len(prompts), RECORD, Filters(max_words=2))
    assert len(read_pairs(tmp_path / "pairs.jsonl")) == 7


@pytest.fixture
def read(tmp_path):
    prompt(tmp_path, "a", images=2)
    return lambda *rows: read_prompts(write_rows(tmp_path / "prompts.jsonl", rows))


IMAGE, SAME = {"type": "image"}, {"type": "text", "text": "Same?"}
TWO = {"images": ["a_0.png", "a_1.png"]}


def test_prompts_are_texts_or_messages(read, tmp_path):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [SAME]}]
    first, second, third = read(
        TWO | {"prompt": "Same?", "id": "x", "truth": "No."},
        TWO | {"prompt": "<image> and <image>?"},
        TWO | {"prompt": messages, "chosen": "left", "rejected": "out", "source": "here"},
    )
    assert (first.id, first.truth) == ("x", "No.") and (second.id, second.truth) == ("2", None)
    assert first.messages == [{"role": "user", "content": [IMAGE, IMAGE, SAME]}]
    assert [part.get("text") for part in second.messages[0]["content"]] == [None, " and ", None, "?"]
    assert third.messages[1]["content"] == [IMAGE, IMAGE, SAME] and third.extra == {"source": "here"}
    places = [part.get("image") for part in second.conversation()[0]["content"]]
    assert places == [tmp_path / "a_0.png", None, tmp_path / "a_1.png", None]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "Same?"}, "has no image"),
        ({"images": ["missing.png"], "prompt": "Same?"}, "'.*missing.png' does not exist"),
        (TWO, "has no prompt"),
        (TWO | {"prompt": " "}, "prompt is empty"),
        (TWO | {"prompt": "<image> Same?"}, "1 image placeholders and 2 images"),
        (TWO | {"prompt": [{"role": "assistant", "content": "Hi"}]}, "end with a user message"),
        (TWO | {"prompt": ["Hi"]}, "a message is 'Hi'"),
        (TWO | {"prompt": "Same?", "id": "1"}, "id 1 occurs twice"),
        (TWO | {"prompt": "Same?", "truth": 3}, "truth is 3; expected a string"),
    ],
)
def test_bad_prompts_are_named_by_their_line(read, row, message):
    with pytest.raises(LVLMError, match=f"line 2 of.*{message}|{message}"):
        read(TWO | {"prompt": "Same?"}, row)


def test_a_line_of_prompts_that_is_no_json(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("{broken")
    with pytest.raises(LVLMError, match="line 1 of .*prompts.jsonl.* is not JSON"):
        read_prompts(tmp_path / "prompts.jsonl")


def test_the_ladder_and_what_contradicting_wins(tmp_path):
    asked = prompt(tmp_path, "a", truth="Yes, there is a dog.", wrong=["yes", "No, there is no dog."])
    for answer, samples, expected in (
        ("No.", ["no"], ("No.", "answer")),
        ("yes", ["Yes.", "No!"], ("No!", "sample")),
        ("Yes, there is a dog", ["", "yes"], ("No, there is no dog.", "option")),
    ):
        assert ladder.rejected(asked, answer, samples, seed=1) == expected
    bare = prompt(tmp_path, "b", truth="two")
    assert ladder.rejected(bare, "Two.", ["two"], 1) == ("Two.", "answer")  # none is wrong, and filters drop it
    assert [ladder.negated(own, "Yes, a dog.", "No.") for own in ("no", "Yes", "yes, a dog", "two")] == [1, 0, 0, 0.5]
    found = [dataclasses.replace(candidate("yes", "no"), own=own) for own in ("no", "no", "yes", None)]
    assert ladder.explained(found) == pytest.approx(2 / 3, abs=1e-4) and ladder.explained(found[3:]) is None
    ladder.refuse_negation(0.5, 3, 0.5)
    with pytest.raises(LVLMError, match="66.7 % of 3 pairs are won by a policy that only contradicts the model"):
        ladder.refuse_negation(2 / 3, 3, 0.5)


def test_balance_is_within_kinds_and_numbers_of_pictures():
    def one(kind, answer, images=("x",), number=0):
        return Candidate(Prompt(tuple(images), [], f"{number}", {"kind": kind, "answer_type": answer}), answer, "-")

    many = [one("open", str(number)) for number in range(9)] + [one("open", "0")]
    found = [*(one("a", "yes", number=n) for n in range(5)), one("a", "no"), one("a", "yes", "xy"), *many]
    kept = balance(found, seed=1)
    assert [each.chosen for each in kept if each.prompt.extra["kind"] == "a"] == ["yes", "no", "yes"]
    assert [each for each in kept if each.prompt.extra["kind"] == "open"] == many  # too many answers to balance
    assert balance(found, seed=1) == kept
    ids = {seed: next(each.prompt.id for each in balance(found, seed)) for seed in range(12)}
    assert len(set(ids.values())) > 1
