"""Flow alignment's data, and its task from files to a student that is closer to the teacher."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import chex
import jax
import numpy as np
import pytest

from lvlm_jax import models
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.sevi import SEVI
from lvlm_jax.training import settings
from lvlm_jax.training.data import flow_data
from lvlm_jax.training.objectives import flow_alignment
from lvlm_jax.weights import lora
from tests.training import pair_sets

QUESTIONS = ("What is it?", "Which one?", "Who?")
ANSWERS = ("a red cat", "the left one", "two men")
SEVI_ALL = SEVI(omega=2.0, kappa=0.4, start_layer=0)


def write(folder, answers=(None,) * 3, name="prompts.jsonl"):
    """A file of prompts about a picture each, with answers where they are not None."""
    rows = [
        {"id": f"row {index}", "images": [picture], "prompt": question} | ({"answer": answer} if answer else {})
        for index, (picture, question, answer) in enumerate(
            zip(pair_sets.draw(folder, 3), QUESTIONS, answers, strict=True)
        )
    ]
    return pair_sets.write_rows(folder / name, rows)


class Speaker:
    """A stand-in for a model, which answers with the question's last word and keeps what it was asked."""

    folder = Path(__file__).parent
    params = {"language_model": {"embed_tokens": {"embedding": np.zeros(1, np.float32)}}}

    def __init__(self, size=20):
        self.size, self.asked = size, []  # tokens of each prompt

    def prepare(self, conversations):
        texts = [conversation[-1]["content"][-1]["text"] for conversation in conversations]
        return SimpleNamespace(lengths=np.full(len(texts), self.size), texts=texts)

    def generate(self, prepared, method, max_new_tokens):
        self.asked.append((prepared.texts, method, max_new_tokens))
        return SimpleNamespace(text=[text.split()[-1] for text in prepared.texts])


def read(path, speaker, method=SEVI_ALL, longest=60, batch_size=2):
    found = flow_data.read(path, speaker, method, longest, batch_size, path.parent / "answers")
    return {row.id: [part["text"] for part in row.messages[-1]["content"]] for row in found}


def test_missing_answers_are_generated_once_under_the_teachers_edit(tmp_path):
    path, speaker = write(tmp_path, (None, "the left one", None)), Speaker()
    want = {"row 0": ["it?"], "row 1": ["the left one"], "row 2": ["Who?"]}
    assert read(path, speaker) == want
    assert speaker.asked == [(["Who?", "What is it?"], SEVI_ALL, 60 - 32)]  # prompts take whole steps of 16
    assert read(path, speaker) == want and len(speaker.asked) == 1
    for changed in ({"method": SEVI(omega=3.0)}, {"longest": 70}):
        assert read(path, speaker, **changed) == want
    assert len(speaker.asked) == 3 and len(list((tmp_path / "answers").iterdir())) == 3


def test_answers_that_a_kill_has_left_over_are_not_generated_again(tmp_path):
    path, speaker = write(tmp_path), Speaker()
    read(path, speaker, batch_size=1)
    (log,) = (tmp_path / "answers").iterdir()
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]) + '{"id": "row')
    speaker.asked.clear()
    assert len(read(path, speaker, batch_size=1)) == 3
    assert [texts for texts, _, _ in speaker.asked] == [["Which one?"], ["What is it?"]]


def test_pairs_and_conversations_come_with_their_answers(tmp_path):
    speaker = Speaker()
    pairs = read(pair_sets.write(tmp_path), speaker)
    assert list(pairs.values()) == [[chosen] for _, _, chosen, _ in pair_sets.PAIRS]
    talk = {"images": ["0.png"], "messages": [pair_sets.user("Hm?", 1), {"role": "assistant", "content": "ok"}]}
    assert read(pair_sets.write_rows(tmp_path / "talks.jsonl", [talk]), speaker) == {"1": ["ok"]}
    assert not speaker.asked


def test_what_cannot_be_answered(tmp_path, monkeypatch):
    path, speaker = write(tmp_path), Speaker(size=50)
    message = "a prompt like row 1 has 50 tokens, which leaves no room for an answer in a row of 60"
    with pytest.raises(LVLMError, match=message):
        read(path, speaker)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(LVLMError, match="3 prompts have no answer, and several processes cannot generate them"):
        read(path, speaker)
    assert len(read(write(tmp_path, ANSWERS), speaker)) == 3
    with pytest.raises(LVLMError, match=r"prompt row 1: answer is 7; expected a text"):
        read(write(tmp_path, ("a", 7, "b")), speaker)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Three answered prompts to train on, other ones to judge by."""
    folders = [tmp_path_factory.mktemp(name) for name in ("training", "validation")]
    config = settings.base("flow_alignment")
    config.data = str(write(folders[0], ANSWERS))
    config.validation = str(write(folders[1], ANSWERS[::-1]))
    config.batch, config.steps, config.length = 3, 30, 95
    config.flow.update(dict(omega=2.0, kappa=0.4, start_layer=0.0, mu=1.0))
    return config


def task(model, config, folder, validation=True, **fields):
    config = config.copy_and_resolve_references()
    config.flow.update(fields)
    config.validation *= validation
    return flow_alignment.task(model, models.build(model.config), config, folder)


def test_an_evaluation_measures_how_much_closer_the_student_is_than_the_base(model, config, tmp_path):
    """On answers of its own; a fresh adapter changes nothing: the student is the base."""
    own = task(model, config, tmp_path)
    trainable, frozen = lora.attach_adapters(model.params, 8, 16.0, lora.TARGETS, 0.0, jax.random.key(0))
    moved = jax.tree.map(lambda leaf: leaf + 0.02, trainable)
    fresh, other = (
        {name: float(mean.value) for name, mean in own.evaluate(adapters, frozen).items()}
        for adapters in (trainable, moved)
    )
    np.testing.assert_allclose([fresh["answer_kl"], 1], [fresh["base_answer_kl"], fresh["closer"]], rtol=1e-4)
    assert fresh["base_answer_kl"] == other["base_answer_kl"] > 0.05 and fresh["attention_kl_1"] > 0.05
    assert abs(other["closer"] - 1) > 1e-3
    np.testing.assert_allclose(other["closer"], other["base_answer_kl"] / other["answer_kl"], rtol=1e-4)


def test_the_task_of_a_config(model, config, tmp_path):
    own = task(model, config, tmp_path)
    assert own.terms == {"attention_kl": 1.0, "answer_kl": 1.0} and own.source.steps(2) == 2
    assert set(own.describe(0).split(", ")) == {"row 0", "row 1", "row 2"}
    assert [int(own.source(step)["stage"][0]) for step in (0, 14, 15, 29)] == [1, 1, 2, 2]
    whole = {"weight": np.ones((2, 4), np.float32)}  # in two parts
    for stage, want in (("1", [1] * 5), ("2", [2] * 5), ("both", [1, 1, 1, 2, 2])):
        staged = flow_data.Staged(lambda step: whole | {"number": step}, stage, 5)
        assert [staged(step)["stage"].tolist() for step in range(5)] == [[[one] * 4] * 2 for one in want]
        assert [staged(step)["number"] for step in range(5)] == list(range(5))
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(own.source))(3), own.source(3))
    assert task(model, config, tmp_path, validation=False).evaluate is None
    assert task(model, config, tmp_path, mu=0.0).terms == {"attention_kl": 1.0}
    for fields, message in (
        (dict(omega=-1.0), "omega is -1.0; expected a number"),
        (dict(start_layer=1.0), "layers from 1.0 to None are none of this model's 2 layers"),
    ):
        with pytest.raises(LVLMError, match=message):
            task(model, config, tmp_path, **fields)
