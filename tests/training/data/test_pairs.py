"""Preference pairs: both answers of each prompt once, whatever kills the run; filters, splits and figures by hand."""

import dataclasses
import json

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.training.data import pairs
from lvlm_jax.training.data.pair_files import read_pairs
from lvlm_jax.training.data.pair_filters import (
    REASONS,
    Candidate,
    Filters,
    hold_out,
    normalised,
    overlap,
    sift,
    statistics,
)
from lvlm_jax.training.data.prompts import Prompt, read_prompts
from tests.training.stand_in import PLAN, StandIn, prompt

RECORD = {"model": "stand-in", "seed": 5}


@pytest.fixture
def prompts(tmp_path):
    """Seven prompts about one to three pictures, not in the order in which they are asked."""
    counts = {"a": 2, "b": 1, "c": 3, "d": 1, "e": 2, "f": 2, "g": 1}
    return [prompt(tmp_path, name, images=count) for name, count in counts.items()]


def run(prompts, log, model, batch_size=2, plan=PLAN, record=RECORD):
    return pairs.answer(prompts, plan, lambda: model, log, record, batch_size)


def test_each_prompt_is_answered_under_both_methods(prompts, tmp_path):
    model = StandIn()
    said = run(prompts, tmp_path / "log", model)
    assert set(said) == set("abcdefg")
    assert said["c"].chosen.text == "cross What is c?" and said["c"].rejected.text == "truncated What is c?"
    assert (said["c"].chosen.tokens, said["c"].chosen.finish_reason) == (4, "stop")
    # Prompts with equally many pictures are asked together, and the last batch is filled up.
    asked = [[text[-2] for text in batch] for batch in model.batches]
    assert asked == [["b", "d"], ["g", "a"], ["e", "f"], ["c", "c"]]
    methods = [call["method"] for call in model.calls]
    assert methods == [PLAN.chosen.method, PLAN.rejected.method] * 4
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


def test_killed_at_any_call_a_run_loses_and_doubles_nothing(prompts, tmp_path):
    whole = run(prompts, tmp_path / "whole", StandIn())
    lines = sorted((tmp_path / "whole").read_bytes().splitlines())
    for call in range(8):
        log = tmp_path / f"killed_{call}"
        with pytest.raises(KeyboardInterrupt):
            run(prompts, log, StandIn(killed_at=call))
        model = StandIn()
        assert run(prompts, log, model) == whole
        assert len(model.batches) == 4 - call // 2
        assert sorted(log.read_bytes().splitlines()) == lines
    assert run(prompts, log, None) == whole  # everything is there: no model is asked


def test_a_log_cut_anywhere_is_completed(prompts, tmp_path):
    whole = run(prompts, tmp_path / "whole", StandIn())
    content = (tmp_path / "whole").read_bytes()
    for length in range(0, len(content), 41):
        (tmp_path / "cut").write_bytes(content[:length])
        assert run(prompts, tmp_path / "cut", StandIn()) == whole
        assert sorted((tmp_path / "cut").read_bytes().splitlines()) == sorted(content.splitlines())


def test_a_prompt_that_cannot_be_answered_is_named_and_tried_again(prompts, tmp_path, capsys):
    asked = [*prompts, prompt(tmp_path, "h", "too long?")]
    said = run(asked, tmp_path / "log", StandIn(), batch_size=8)
    assert set(said) == set("abcdefg")
    assert "prompt h: the prompt has 99 tokens" in capsys.readouterr().err
    said = run([*prompts, prompt(tmp_path, "h", "short?")], tmp_path / "log", StandIn())
    assert said["h"].chosen.text == "cross short?"


def test_a_log_of_other_settings_is_left_alone(prompts, tmp_path):
    run(prompts, tmp_path / "log", StandIn())
    before = (tmp_path / "log").read_bytes()
    with pytest.raises(LVLMError, match="begun with other settings \\(seed: 5, now 6\\)"):
        run(prompts, tmp_path / "log", StandIn(), record=RECORD | {"seed": 6})
    assert (tmp_path / "log").read_bytes() == before


def test_candidates_know_what_was_corrected_and_what_was_cut(tmp_path):
    asked = [prompt(tmp_path, name, text) for name, text in (("a", "endless a"), ("b", "b"), ("c", "c"))]
    asked.append(prompt(tmp_path, "d", "too long"))
    said = run(asked, tmp_path / "log", StandIn())
    corrected = {"a": "Cross endless a.", "b": "The truth.", "c": "cross c"}
    found = pairs.candidates(asked, said, corrected)
    assert [(one.prompt.id, one.chosen, one.rejected) for one in found] == [
        ("a", "Cross endless a.", "truncated endless a"),
        ("b", "The truth.", "truncated b"),
        ("c", "cross c", "truncated c"),
    ]
    assert [one.corrected for one in found] == [False, True, False]  # a full stop is no correction
    assert [one.unfinished for one in found] == [True, False, False]


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
    assert overlap(first, second) == pytest.approx(expected)
    assert overlap(second, first) == pytest.approx(expected)


def test_normalised():
    assert normalised(' "A  dog\nsits."') == normalised("a dog sits") == "a dog sits"
    assert normalised("3.5") != normalised("35")
    assert normalised("C++") != normalised("C")


def candidate(chosen, rejected, unfinished=False, images=("x",), corrected=False):
    asked = Prompt(tuple(images), [], "id")
    return Candidate(asked, chosen, rejected, corrected, unfinished)


LONG = "word " * 60
EXAMPLES = [
    (candidate("A dog.", "A cat."), None),
    (candidate(" \n", "A cat."), "empty"),
    (candidate("Yes.", "yes"), "equal"),
    (candidate("yes", "no", unfinished=True), "unfinished"),
    (candidate("yes", "no " * 301), "too_long"),
    (candidate("yes", "no " * 300), None),
    (candidate(LONG + "left", LONG + "right"), "near_duplicate"),  # 2 * 60 / 122 = 0.984
    (candidate("word " * 40 + "left", "word " * 40 + "right"), None),  # 2 * 40 / 82 = 0.976
]


@pytest.mark.parametrize("example, reason", EXAMPLES)
def test_filters(example, reason):
    assert Filters().reason(example) == reason
    open_to_all = Filters(near_duplicate=1.0, max_words=0, unfinished=False)
    assert open_to_all.reason(example) == (reason if reason in ("empty", "equal") else None)


def test_statistics():
    found = [
        candidate("a b c", "d", images=("1",), corrected=True),
        candidate("a", "b c", images=("1", "2")),
        candidate("e f", "g h", images=("3",)),
        *(example for example, reason in EXAMPLES if reason),
    ]
    kept, dropped = sift(found, Filters())
    assert kept == found[:3]
    assert dropped == dict.fromkeys(REASONS, 1)
    assert statistics(9, found, kept, dropped) == {
        "prompts": 9,
        "failed": 1,
        "kept": 3,
        "dropped": dropped,
        "corrected": 0.3333,
        "chosen_longer": 0.3333,
        "words": {
            "chosen": {"mean": 2.0, "median": 2.0, "largest": 3},
            "rejected": {"mean": 1.67, "median": 2.0, "largest": 2},
        },
        "images": {"1": 2, "2": 1},
    }


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
    with pytest.raises(LVLMError, match="cannot be held out.*fewest that do are 3"):
        hold_out(found[:3], 0.5)
    with pytest.raises(LVLMError, match="cannot be held out"):
        hold_out(found[:1], 0.5)


def test_pairs_are_written_with_statistics_and_record(prompts, tmp_path):
    said = run(prompts, tmp_path / "log", StandIn())
    found = pairs.candidates(prompts, said, {key: f"{key} is here" for key in said})
    figures = pairs.write(tmp_path, found, len(prompts), RECORD, Filters(), holdout=0.3)
    training, validation = (read_pairs(tmp_path / name) for name in ("pairs.jsonl", "validation.jsonl"))
    assert len(training) == figures["training"] == 5 and len(validation) == figures["validation"] == 2
    assert figures == json.loads((tmp_path / "statistics.json").read_text())
    by_id = {pair.id: pair for pair in (*training, *validation)}
    assert by_id["c"].chosen == "c is here" and by_id["c"].rejected == "truncated What is c?"
    assert by_id["c"].images == prompts[2].images and by_id["c"].prompt == prompts[2].messages
    assert json.loads((tmp_path / "pairs.jsonl").read_text().split("\n")[0])["images"][0] == "a_0.png"
    record = json.loads((tmp_path / "pairs.jsonl.run.json").read_text())
    assert record["model"] == "stand-in" and record["filters"]["max_words"] == 300
    pairs.write(tmp_path, found, len(prompts), RECORD, Filters())
    assert not (tmp_path / "validation.jsonl").exists() and len(read_pairs(tmp_path / "pairs.jsonl")) == 7
    with pytest.raises(LVLMError, match="none of 7 prompts became a pair \\(too_long 7\\)"):
        pairs.write(tmp_path, found, len(prompts), RECORD, Filters(max_words=2))
    assert len(read_pairs(tmp_path / "pairs.jsonl")) == 7


@pytest.fixture
def prompt_file(tmp_path):
    prompt(tmp_path, "a", images=2)

    def write(*rows):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
        return tmp_path / "prompts.jsonl"

    return write


TWO = ["a_0.png", "a_1.png"]
IMAGE = {"type": "image"}


def test_prompts_are_texts_or_messages(prompt_file, tmp_path):
    text = {"type": "text", "text": "Same?"}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [text]}]
    first, second, third = read_prompts(
        prompt_file(
            {"images": TWO, "prompt": "Same?", "id": "x", "truth": "No."},
            {"images": TWO, "prompt": "<image> and <image>?"},
            {"images": TWO, "prompt": messages, "chosen": "left", "rejected": "out", "source": "here"},
        )
    )
    assert (first.id, first.truth) == ("x", "No.") and (second.id, second.truth) == ("2", None)
    assert first.messages == [{"role": "user", "content": [IMAGE, IMAGE, text]}]
    assert [part.get("text") for part in second.messages[0]["content"]] == [None, " and ", None, "?"]
    assert third.messages[1]["content"] == [IMAGE, IMAGE, text] and third.extra == {"source": "here"}
    places = [part.get("image") for part in second.conversation()[0]["content"]]
    assert places == [tmp_path / "a_0.png", None, tmp_path / "a_1.png", None]


@pytest.mark.parametrize(
    "row, message",
    [
        ("{broken", "line 2 of .*prompts.jsonl.* is not JSON"),
        ({"prompt": "Same?"}, "has no image"),
        ({"images": ["missing.png"], "prompt": "Same?"}, "'.*missing.png' does not exist"),
        ({"images": TWO}, "has no prompt"),
        ({"images": TWO, "prompt": " "}, "prompt is empty"),
        ({"images": TWO, "prompt": "<image> Same?"}, "1 image placeholders and 2 images"),
        ({"images": TWO, "prompt": [{"role": "assistant", "content": "Hi"}]}, "end with a user message"),
        ({"images": TWO, "prompt": ["Hi"]}, "a message is 'Hi'"),
        ({"images": TWO, "prompt": "Same?", "id": "1"}, "id 1 occurs twice"),
        ({"images": TWO, "prompt": "Same?", "truth": 3}, "truth is 3; expected a string"),
    ],
)
def test_bad_prompts_are_named_by_their_line(prompt_file, row, message):
    path = prompt_file({"images": TWO, "prompt": "Same?"}, row)
    with pytest.raises(LVLMError, match=f"line 2 of.*{message}|{message}"):
        read_prompts(path)
