"""A run: what it asks, and what its record says of that."""

import dataclasses

import pytest

from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import Data, get
from lvlm_jax.evaluation.rescore import rescore
from lvlm_jax.evaluation.run import Run
from lvlm_jax.generation.questions import VICUNA
from lvlm_jax.pocket.splits import write_split
from tests.evaluation.fakes import Oracle


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_split(folder, "test", 12)
    return folder


def test_the_system_prompt_is_the_protocols(tmp_path, world):
    """It goes before every question, stands in the record, and a run with another one is another run."""
    heard = []

    class Hearing(Oracle):
        def generate(self, messages, **settings):
            heard.extend(messages)
            return super().generate(messages, **settings)

    def run(system, out="out"):
        protocol = dataclasses.replace(get("pope/strict"), system=system)
        one = Run("oracle", "float32", protocol, Data(world, groups=("random",)), tmp_path / out)
        one.ask(Hearing())
        return one.score()

    assert run(VICUNA)["record"]["protocol"]["system"] == VICUNA
    assert {message[0]["role"] for message in heard} == {"system"}
    assert heard[0][0]["content"] == [{"type": "text", "text": VICUNA}]
    with pytest.raises(LVLMError, match="system"):
        run("")
    heard.clear()
    assert run("", "plain")["record"]["protocol"]["system"] == ""
    assert [message["role"] for message in heard[0]] == ["user"]
    # Scored again, the record says what was sent.
    files = [str(tmp_path / "out" / "answers.jsonl")]
    again = rescore(get("pope/strict"), Data(world, groups=("random",)), files, resamples=10)
    assert again["record"]["protocol"]["system"] == VICUNA


def test_a_limit_asks_the_first_of_every_split(tmp_path, world):
    data = Data(world, limit=3)
    one = Run("oracle", "float32", get("pope/strict"), data, tmp_path)
    assert [question.id for question in one.questions] == [1, 2, 3] * 3
    one.ask(Oracle())
    found = one.score()
    assert (found["record"]["questions"], found["record"]["limit"]) == (9, 3)
    with pytest.raises(LVLMError, match="limit|images|questions"):
        Run("oracle", "float32", get("pope/strict"), Data(world), tmp_path).ask(Oracle())
