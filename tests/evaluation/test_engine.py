"""Asking a model: questions put once, batches that do not matter, logs that survive a kill."""

import dataclasses

import pytest

from lvlm_jax import LVLM, cli
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import BENCHMARKS, Data, engine, get
from lvlm_jax.pocket.splits import write_split


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Twelve POPE questions of all splits, and their protocol."""
    folder = tmp_path_factory.mktemp("pocket") / "split"
    write_split(folder, "test", 20)
    protocol = dataclasses.replace(get("pope/strict"), max_new_tokens=4)
    questions = BENCHMARKS["pope"].read(Data(folder), protocol, need_images=True)
    return questions[:4] + questions[-8:], protocol


class Counting:
    """The pocket model, and how many conversations it was asked to answer."""

    def __init__(self):
        self.model, self.asked = LVLM.from_pretrained(cli.checkpoint("pocket")), 0

    def generate(self, messages, **options):
        self.asked += len(messages)
        return self.model.generate(messages, **options)


@pytest.fixture(scope="module")
def model():
    return Counting()


def test_answers_do_not_depend_on_the_batch(model, asked):
    questions, protocol = asked
    whole = engine.ask(model, questions, protocol, batch_size=6)
    assert list(whole) == [question.key for question in questions]
    assert whole == engine.ask(model, questions, protocol, batch_size=2)
    twice = [dataclasses.replace(question, group="again") for question in questions]
    before = model.asked
    both = engine.ask(model, [*questions, *twice], protocol, batch_size=6)
    assert model.asked - before <= 12  # the same question about the same picture is put once
    assert [both[question.key] for question in twice] == list(whole.values())


def test_a_killed_run_goes_on_where_it_was(model, asked, tmp_path):
    questions, protocol = asked
    log, record = tmp_path / "log.jsonl", {"who": "pocket"}
    whole = engine.ask(model, questions, protocol, batch_size=4, log=log, record=record)
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:6]) + lines[6][:9])  # five answers and a piece of the sixth
    before = model.asked
    assert engine.ask(model, questions, protocol, batch_size=4, log=log, record=record) == whole
    assert model.asked - before == 8  # seven questions were left, in two batches of four
    assert sorted(log.read_bytes().splitlines(keepends=True)) == sorted(lines)
    with pytest.raises(LVLMError, match=r"begun with other settings \(who: 'pocket', now 'another'\)"):
        engine.ask(model, questions, protocol, log=log, record={"who": "another"})
    log.write_text("not a log\n")
    with pytest.raises(LVLMError, match="is no log of answers"):
        engine.ask(model, questions, protocol, log=log, record=record)
