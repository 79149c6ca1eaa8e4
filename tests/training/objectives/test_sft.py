"""Supervised fine-tuning as a task: what is learned, and that it is learned."""

import jax
import numpy as np
import pytest

from tests.reference import llava
from tests.reference.preference import sequence_logits
from tests.training import pair_sets
from tests.training.pair_sets import user, write_rows


@pytest.fixture
def talks(tmp_path):
    """A file of conversations over two images, without one, and over one in two turns."""
    names = pair_sets.draw(tmp_path, 3)

    def said(text):
        return {"role": "assistant", "content": [{"type": "text", "text": text}]}

    rows = [
        {"images": names[:2], "messages": [user("Same?", 2), said("no")]},
        {"messages": [user("Hello", 0), said("good day")]},
        {"images": names[2:], "messages": [user("Hm?", 1), said("ok"), user("Yes?", 0), said("a cat")]},
    ]
    return write_rows(tmp_path / "talks.jsonl", rows)


def test_the_loss_is_the_mean_over_the_tokens_of_every_answer(talks, model, torch_model, fresh, tmp_path):
    task = pair_sets.task(model, talks, tmp_path, "sft", batch=3)
    batch = task.source(0)
    found = jax.jit(task.objective)(*fresh, batch, None)
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


def test_a_file_of_pairs_gives_its_chosen_answers(model, data, tmp_path):
    task = pair_sets.task(model, data, tmp_path, "sft")
    batch, decode = task.source(0)["answer"], model.processor.tokenizer.decode
    texts = {decode(tokens[answers]) for tokens, answers in zip(batch["tokens"], batch["answers"], strict=True)}
    assert texts == {f" {chosen}</s>" for _, _, chosen, _ in pair_sets.PAIRS}
    assert task.evaluate is None
