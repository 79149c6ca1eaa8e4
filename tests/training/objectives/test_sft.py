"""Supervised fine-tuning as a task: what is learned, and that it is learned."""

import jax
import numpy as np
import pytest

from lvlm_jax import models
from lvlm_jax.training.objectives import sft
from lvlm_jax.weights import lora
from tests.reference import llava
from tests.reference.preference import sequence_logits
from tests.training import pair_sets
from tests.training.pair_sets import config, user, write_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Conversations over two images, without one, and over one in two turns."""
    folder = tmp_path_factory.mktemp("talks")
    names = pair_sets.draw(folder, 3)

    def said(text):
        return {"role": "assistant", "content": [{"type": "text", "text": text}]}

    rows = [
        {"images": names[:2], "messages": [user("Same?", 2), said("no")]},
        {"messages": [user("Hello", 0), said("good day")]},
        {"images": names[2:], "messages": [user("Hm?", 1), said("ok"), user("Yes?", 0), said("a cat")]},
    ]
    return write_rows(folder / "talks.jsonl", rows)


@pytest.fixture(scope="module")
def task(model, data, tmp_path_factory):
    settings = config(data, recipe="sft", batch=3, validation=str(data))
    return sft.task(model, models.build(model.config), settings, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def gradient(task):
    def total(trainable, frozen, batch):
        metrics = task.objective(trainable, frozen, batch, None)
        return metrics["loss"].value, metrics

    return jax.jit(jax.grad(total, has_aux=True))


@pytest.fixture
def adapters(model):
    return lora.attach(model.params, 4, 8.0, lora.TARGETS, 0.0, jax.random.key(0))


def test_the_loss_is_the_mean_over_the_tokens_of_every_answer(task, gradient, torch_model, adapters):
    batch = task.source(0)
    _, found = gradient(*adapters, batch)
    weights, settings = llava.from_torch(torch_model)
    images, losses, right = iter(batch["images"]), [], []
    for row in range(3):
        sequence = {name: array[row] for name, array in batch["answer"].items()}
        ids = sequence["tokens"][sequence["image_id"] >= 0]
        pixels = [next(images) for _ in range(max(sequence["image_id"].max(), 0))]
        logits = sequence_logits(weights, settings, ids, pixels)
        for place in np.flatnonzero(sequence["answers"]):
            z = logits[place - 1]
            losses.append(np.log(np.exp(z - z.max()).sum()) + z.max() - z[ids[place]])
            right.append(z.argmax() == ids[place])
    assert task.terms == {"loss": 1.0}
    spoken = [" no</s>", " good day</s>", " ok</s>", " a cat</s>"]
    assert found["loss"].count == len(losses) == sum(len(text) - len("</s>") + 1 for text in spoken)
    np.testing.assert_allclose(found["loss"].value, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"].value, np.mean(right), rtol=1e-6)


def test_a_file_of_pairs_gives_its_chosen_answers(model, tmp_path):
    settings = config(pair_sets.write(tmp_path), recipe="sft")
    task = sft.task(model, models.build(model.config), settings, tmp_path)
    batch = task.source(0)["answer"]
    decode = model.processor.tokenizer.decode
    texts = {decode(tokens[answers]) for tokens, answers in zip(batch["tokens"], batch["answers"], strict=True)}
    assert texts == {f" {chosen}</s>" for _, _, chosen, _ in pair_sets.PAIRS}
    assert task.evaluate is None
