"""A run: the questions it asks, and its record."""

import dataclasses

from lvlm_jax.evaluation import Data, get
from lvlm_jax.evaluation.rescore import rescore
from lvlm_jax.evaluation.run import Run
from lvlm_jax.generation.questions import VICUNA
from tests.evaluation.fakes import Oracle
from tests.refusals import refused


def test_the_system_prompt_is_the_protocols(tmp_path, world):
    """The system prompt precedes every question and is recorded; a run with another system prompt is another run."""
    heard, data = [], Data(world, groups=("random",))

    class Hearing(Oracle):
        def generate(self, messages, **settings):
            heard.extend(messages)
            return super().generate(messages, **settings)

    def run(system, out="out"):
        one = Run("o", "float32", dataclasses.replace(get("pope/strict"), system=system), data, tmp_path / out)
        one.ask(Hearing())
        return one.score()["record"]["protocol"]["system"]

    assert run(VICUNA) == VICUNA
    assert {message[0]["role"] for message in heard} == {"system"}
    assert heard[0][0]["content"] == [{"type": "text", "text": VICUNA}]
    refused("system", run, "")
    heard.clear()
    assert run("", "plain") == "" and [message["role"] for message in heard[0]] == ["user"]
    # Scored again, the record says what was sent.
    again = rescore(get("pope/strict"), data, [str(tmp_path / "out" / "answers.jsonl")], resamples=10)
    assert again["record"]["protocol"]["system"] == VICUNA


def test_a_limit_asks_the_first_of_every_split(tmp_path, world):
    one = Run("oracle", "float32", get("pope/strict"), Data(world, limit=3), tmp_path)
    assert [question.id for question in one.questions] == [1, 2, 3] * 3
    one.ask(Oracle())
    record = one.score()["record"]
    assert (record["questions"], record["limit"]) == (9, 3)
    whole = Run("oracle", "float32", get("pope/strict"), Data(world), tmp_path)
    refused("limit|images|questions", whole.ask, Oracle())
