"""Small sets of preference pairs that tests of training share."""

import json

import jax
import numpy as np
from PIL import Image

from lvlm_jax import models
from lvlm_jax.training import registry, settings
from lvlm_jax.training.step import loss

# (question, images, chosen, rejected): one image or two, answers of different lengths.
PAIRS = [
    ("What?", 1, "a red cat", "a dog"),
    ("Same?", 2, "no", "yes they are"),
    ("Which?", 2, "the left one", "left"),
    ("Hm?", 1, "ok", "no"),
    ("Who?", 2, "two men", "a girl"),
]


def draw(folder, count, side=28, seed=0):
    """`count` random pictures in `folder`; their names."""
    rng = np.random.default_rng(seed)
    names = [f"{index}.png" for index in range(count)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / name)
    return names


def user(question, images):
    """A user message that shows images and asks something."""
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": question}]}


def write(folder, pairs=PAIRS, side=28):
    """A file of pairs in TRL's format with pictures beside it; its path."""
    names = iter(draw(folder, sum(images for _, images, _, _ in pairs), side))
    rows = [
        {
            "images": [next(names) for _ in range(images)],
            "prompt": [user(question, images)],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for question, images, chosen, rejected in pairs
    ]
    return write_rows(folder / "pairs.jsonl", rows)


def write_rows(path, rows):
    """JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(data, **changes):
    """A run's configuration for the small model; fields of `preference` by their bare names."""
    config = settings.base(changes.get("recipe", "dpo"))
    config.data, config.batch, config.length = str(data), len(PAIRS), 95
    section = config.get("preference", {})
    for name, value in changes.items():
        place = section if name in section else config
        place.update({name: value})
    return config


def task(model, data, folder, recipe="dpo", **changes):
    """A recipe's task over those pairs."""
    given = config(data, recipe=recipe, **changes)
    settings.check(given)
    return registry.find(recipe).task(model, models.build(model.config), given, folder)


def gradient(task):
    """(trainable, frozen, batch) -> ((what is minimised, the metrics), its gradient)."""

    def total(trainable, frozen, batch):
        metrics = task.objective(trainable, frozen, batch, None)
        return loss(metrics, task.terms, {name: metrics[name].count for name in task.terms}), metrics

    return jax.jit(jax.value_and_grad(total, has_aux=True))


def values(metrics):
    return {name: float(mean.value) for name, mean in metrics.items()}
