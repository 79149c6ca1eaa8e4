"""Margins of a real model: options scored under a method, in a run that resumes and whose files others read."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from lvlm_jax.evaluation import Data, get, margins, options
from lvlm_jax.evaluation.run import Options, Run
from lvlm_jax.methods import CAPL, PAI
from tests.evaluation.builders import write_lines
from tests.slow import cases


@pytest.fixture
def data(tmp_path):
    """Four questions over one or two pictures."""
    rng, rows = np.random.default_rng(1), []
    (tmp_path / "images").mkdir()
    for name in "abc":
        Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{name}.png")
    asked = (("ab", ["Yes", "No"]), ("bc", ["No", "Yes"]), ("ac", ["one", "two", "three"]), ("a", ["3", "4"]))
    for i, (images, wanted) in enumerate(asked):
        rows.append({"question_id": i, "images": [f"{name}.png" for name in images], "kind": "in_all_images",
                     "text": f"{i}?", "label": wanted[0], "options": wanted})  # fmt: skip
    write_lines(tmp_path / "questions" / "balanced.jsonl", rows)
    return Data(tmp_path)


METHODS = {"plain": (None,), "capl": (CAPL(rho=0.6),), "pai": (PAI(start_layer=1),)}


@pytest.mark.parametrize("method", cases(METHODS, slow=["capl"]))
def test_margins_are_those_of_a_generation(model, checkpoint, data, tmp_path, method):
    """Each option's tokens are forced one after the other, as `decode` takes them."""
    short = dataclasses.replace(get("pocket"), suffix="")  # fits the small model's context
    run = Run(checkpoint, "float32", short, data, tmp_path / "out", method, Options(batch_size=2, resamples=20))
    run.ask(model)
    found = run.score()
    known = margins.beside([tmp_path / "out" / "answers.jsonl"])
    assert found["figures"]["margin"]["value"] == pytest.approx(1000 * np.mean(list(known.values())), rel=1e-4)
    for question in run.questions[:3:2]:
        pictures = [{"type": "image", "image": str(path)} for path in question.images]
        text = {"type": "text", "text": run.protocol.prompt(question)}
        likely = []
        for option in question.extra["options"]:
            state, step = model.prefill([{"role": "user", "content": [*pictures, text]}], method=method, max_length=96)
            total = 0.0
            for token in options.tokens_of(model, option):
                row = np.asarray(step.combined[0], np.float64)
                total += row[token] - np.logaddexp.reduce(row)
                state, step = model.decode(state, jnp.asarray([token]))
            likely.append(max(total, options.FLOOR))
        assert known[question.key] == pytest.approx(likely[0] - max(likely[1:]), abs=2e-3)
    # Everything is known: neither asked again nor left out where a log of margins was lost.
    assert run.complete()
    (tmp_path / "out" / "margins.0.jsonl").unlink()
    assert not run.complete()


def test_an_answer_has_the_tokens_that_training_teaches(model):
    assert model.processor.tokenizer.decode(options.tokens_of(model, "Yes")) == " Yes</s>"
