"""Asking a model: answers do not depend on batches, the tower runs once per image, logs survive a kill."""

import dataclasses
import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lvlm_jax import methods
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import Question, engine, get
from lvlm_jax.evaluation.engine import Work
from lvlm_jax.evaluation.pictures import Pictures
from lvlm_jax.evaluation.shares import Share
from lvlm_jax.generation import decode_loop
from lvlm_jax.methods.base import OTHER_PICTURES
from tests import small
from tests.evaluation.fakes import Oracle
from tests.refusals import refused

PROTOCOL = dataclasses.replace(get("pope/strict"), suffix="", max_new_tokens=4)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Twenty questions about seven images, one about two of them, one about none; lengths of two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(7)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(path)
    asked = [((paths[i % 7],), f"Is it {'so ' * (i % 3)}{i}?") for i in range(18)]
    asked += [((paths[1], paths[5]), "Are they?"), ((), "Is it?")]
    return [Question(i, images, text, "yes", "random") for i, (images, text) in enumerate(asked)]


def ask(questions, model=None, protocol=PROTOCOL, **work):
    return engine.ask(model or Oracle(), questions, protocol, work=Work(**work))


@pytest.fixture
def tower(monkeypatch):
    """The number of images in each run of the tower."""
    seen, run = [], decode_loop.encode_images
    monkeypatch.setattr(decode_loop, "encode_images", lambda *given: seen.append(len(given[2])) or run(*given))
    return seen


def test_answers_do_not_depend_on_the_batch(model, questions, tower):
    """Answers do not depend on the encoder of the images, and every image is encoded once."""
    questions = questions[:18]  # those about one picture: fewer programs
    whole = ask(questions, model, batch_size=16)
    assert list(whole) == [question.key for question in questions] and tower == [7]
    assert whole == ask(questions, model, batch_size=1) and tower == [7] + [1] * 7
    for question in questions[:3]:
        picture = {"type": "image", "image": str(question.images[0])}
        messages = [{"role": "user", "content": [picture, {"type": "text", "text": question.text}]}]
        assert model.generate(messages, max_new_tokens=4).text[0].strip() == whole[question.key].text


@pytest.mark.parametrize(
    "method",
    [
        methods.VCD(),  # other pixels
        pytest.param(methods.ICD(tokens=(5, 6, 7)), marks=pytest.mark.slow),  # words before the prompt
        methods.VISTA(layers=(0, 1)),  # the prompt without pictures, before it begins
    ],
    ids=lambda method: method.label,
)
def test_methods_take_encoded_pictures(model, method, tower):
    conversations = [small.conversation("Which of them?", seed=1), small.conversation("Is it so?", seed=2)]
    plain = model.generate(conversations, method, max_new_tokens=4)
    before = len(tower)
    messages = small.encoded(model, conversations)
    assert model.generate(messages, method, max_new_tokens=4) == plain
    assert len(tower) - before == 1 + (method.contrast_prompt() in OTHER_PICTURES)
    whole, laid_out = model.prepare(conversations), model.prepare(messages)
    for name in ("tokens", "image_id", "pixels"):
        np.testing.assert_array_equal(getattr(laid_out, name), getattr(whole, name))
    images = [messages[0][0]["content"][0], conversations[0][0]["content"][0]]
    message = "1 of 2 images are encoded; encode all images of a batch, or none"
    refused(message, model.prepare, [{"role": "user", "content": [*images, {"type": "text", "text": "Same?"}]}])


def test_questions_with_the_same_prompt_are_put_once(questions):
    twice = [*questions, *(dataclasses.replace(question, group="popular") for question in questions)]

    def by_split(found):
        return [[found[group, str(i)] for i in range(20)] for group in ("random", "popular")]

    oracle = Oracle()
    random, popular = by_split(ask(twice, oracle, batch_size=5))
    assert oracle.asked == 20 and random == popular
    drawn = dataclasses.replace(PROTOCOL, temperature=1.0)
    found = ask(twice, oracle, drawn, batch_size=5)
    random, popular = by_split(found)
    assert oracle.asked == 60 and random != popular  # drawn answers differ
    assert found == ask(twice[::-1], protocol=drawn, batch_size=16)  # by key, not by place
    assert found != ask(twice, protocol=drawn, batch_size=16, seed=1)


def test_prompts_about_one_picture_follow_each_other_and_stay_together(questions):
    batches = engine.plan(questions, PROTOCOL, 4)
    assert sorted(index for batch in batches for prompt in batch for index in prompt) == list(range(20))
    assert [len(batch) for batch in batches] == [4] * 5
    order = [questions[prompt[0]].images for batch in batches for prompt in batch]
    changes = sum(one != other for one, other in zip(order, order[1:], strict=False))
    assert changes == len(set(order)) - 1
    for processes in (2, 3, 30):  # their shares are disjoint and complete
        plans = [engine.plan(questions, PROTOCOL, 4, Share(k, processes)) for k in range(processes)]
        shares = [[prompt for batch in plan for prompt in batch] for plan in plans]
        assert Counter(i for share in shares for prompt in share for i in prompt) == Counter(range(20))
        owners = Counter(image for share in shares for image in {questions[prompt[0]].images for prompt in share})
        assert set(owners.values()) == {1}  # no picture is encoded by two


def test_pictures_that_do_not_fit_are_encoded_again(questions):
    paths = [question.images[0] for question in questions[:7]]
    oracle = Oracle()
    with Pictures(oracle, paths, 3, remembered=50) as pictures:  # one group of three takes 72 bytes
        first, again = ([pictures.ready([path])[0].tokens for path in paths] for _ in range(2))
        np.testing.assert_array_equal(first, again)
    assert oracle.encoded == [3] * 6
    means = [np.asarray(Image.open(path), np.float32).mean(axis=(0, 1))[None] for path in paths]
    np.testing.assert_array_equal(again, means)
    with Pictures(Oracle(), [b"no picture"], 3) as pictures, pytest.raises(LVLMError, match="of a table cannot be"):
        pictures.ready([b"no picture"])


def test_models_whose_image_tokens_depend_on_the_prompt_get_plain_pictures(questions):
    """With `tokens_per_image` None nothing is encoded in advance, and answers do not depend on batches either."""
    oracle = Oracle()
    oracle.config = SimpleNamespace(tokens_per_image=None)
    paths = [question.images[0] for question in questions[:7]]
    with Pictures(oracle, paths, 3, remembered=28 * 28 * 3) as pictures:
        for path in paths * 2:
            assert pictures.ready([path])[0].tobytes() == Image.open(path).tobytes()
    whole = ask(questions, oracle, batch_size=16)
    assert whole == ask(questions, oracle, batch_size=3) != ask(questions, batch_size=3)
    assert oracle.encoded == []


@pytest.fixture
def work(tmp_path):
    return {"batch_size": 4, "folder": tmp_path, "record": {"who": "oracle"}}


def test_a_killed_run_goes_on_where_it_was(questions, tmp_path, work):
    def answered():
        lines = (tmp_path / "log.0.jsonl").read_bytes().splitlines(keepends=True)
        return [line for line in lines if b'"batch"' not in line]

    whole, lines = ask(questions, **work), answered()
    assert len(lines) == 1 + 20
    (tmp_path / "log.0.jsonl").write_bytes(b"".join(lines[:6]) + lines[6][:9])  # five answers and a piece of another
    oracle = Oracle()
    assert ask(questions, oracle, **work) == whole
    assert oracle.asked == 16  # the second batch of four was not whole, so it is put again as it was
    assert sorted(answered()) == sorted(lines)
    ask(questions, oracle, **work)
    assert oracle.asked == 16


def test_a_picture_that_cannot_be_read_stops_the_run_and_loses_nothing(questions, tmp_path, work):
    path, content = tmp_path / "broken.png", questions[4].images[0].read_bytes()
    path.write_bytes(content[:200])
    asked = [*questions, Question("last", (path,), "Is it?", "yes", "random")]
    refused(r"image '.*broken.png' cannot be decoded", ask, asked, **work)
    path.write_bytes(content)
    oracle = Oracle()
    assert len(ask(asked, oracle, **work)) == 21 and oracle.asked < 21


def test_logs_of_other_runs_are_not_mixed_in(questions, tmp_path, work):
    ask(questions, **work)
    other = work | {"record": {"who": "another"}}
    refused(r"begun with other settings \(who: 'oracle', now 'another'\)", ask, questions, **other)
    refused(r"log.0.jsonl' was begun with other settings", ask, questions, **other, share=Share(1, 2))
    log = tmp_path / "log.0.jsonl"
    whole = log.read_text()
    answer = json.loads(whole.splitlines()[1])
    cost = json.loads(whole.splitlines()[-1])["batch"]
    for row, message in (
        (answer, "a second time"),
        ([1], "a JSON list, not an object"),
        (answer | {"id": "999"}, "random 999, which is not a question of this run"),
        (answer | {"tokens": math.inf}, "its tokens is inf"),
        ({"batch": cost | {"seconds": math.inf}}, "its seconds is inf"),
    ):
        log.write_text(whole + json.dumps(row) + "\n")
        refused(f"^line {whole.count(chr(10)) + 1} of .*{message}", ask, questions, **work)
    log.write_text("not a log\n")
    refused("is not a log of answers", ask, questions, **work)
