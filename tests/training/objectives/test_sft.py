"""Supervised fine-tuning as a task: what is learned, and that it is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lvlm_jax import models
from lvlm_jax.errors import LVLMError
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
    spoken = [" no</s>", " good day</s>", " ok</s>", " a cat</s>"]
    assert found["loss"].count == len(losses) == sum(len(text) - len("</s>") + 1 for text in spoken)
    np.testing.assert_allclose(found["loss"].value, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"].value, np.mean(right), rtol=1e-6)


def test_a_few_steps_lower_the_loss(task, gradient, adapters):
    trainable, frozen = adapters
    optimizer = optax.adam(3e-3)
    state, update, losses = optimizer.init(trainable), jax.jit(optimizer.update), []
    for step in range(10):
        change, metrics = gradient(trainable, frozen, task.source(step))
        updates, state = update(change, state)
        trainable = jax.tree.map(jnp.add, trainable, updates)
        losses.append(float(metrics["loss"].value))
    assert losses[-1] < losses[0] - 1


def test_an_evaluation_equals_a_batch_of_everything(task, gradient, adapters):
    _, expected = gradient(*adapters, task.source(0))
    found = task.evaluate(*adapters)
    for name, mean in expected.items():
        np.testing.assert_allclose(found[name].value, mean.value, rtol=1e-5)
    assert task.name == "sft" and task.terms == {"loss": 1.0}


def test_a_file_of_pairs_gives_its_chosen_answers(model, tmp_path):
    settings = config(pair_sets.write(tmp_path), recipe="sft")
    task = sft.task(model, models.build(model.config), settings, tmp_path)
    batch = task.source(0)["answer"]
    decode = model.processor.tokenizer.decode
    texts = {
        decode(tokens[answers]) for tokens, answers in zip(batch["tokens"], batch["answers"], strict=True)
    }
    assert texts == {f" {chosen}</s>" for _, _, chosen, _ in pair_sets.PAIRS}
    assert task.evaluate is None


def test_data_must_be_given(model, tmp_path):
    with pytest.raises(LVLMError, match="data is not set"):
        sft.task(model, models.build(model.config), config("", recipe="sft"), tmp_path)
