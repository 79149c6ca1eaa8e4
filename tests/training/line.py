"""A task small enough to train in a test: a line through points, and a second term that counts differently."""

import json

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from lvlm_jax.training import loop
from lvlm_jax.training.losses import Mean

TARGET = np.linspace(-1, 1, 6).reshape(3, 2).astype(np.float32)


def objective(trainable, frozen, batch, key):
    """`error`: absolute, `square`: what is minimised, over the rows that `counted` selects; `size` of all rows."""
    error = batch["inputs"] @ (trainable["layer"]["kernel"] - frozen["layer"]["target"])
    rows = batch["counted"][:, None]
    size = jnp.sum(trainable["layer"]["kernel"] ** 2)
    return {
        "square": Mean(jnp.sum(error**2 * rows), 2 * jnp.sum(rows)),
        "error": Mean(jnp.sum(jnp.abs(error) * rows), 2 * jnp.sum(rows)),
        "size": Mean(size * len(error), jnp.float32(len(error))),
    }


def source(step):
    rng = np.random.default_rng(step)
    inputs = rng.normal(size=(4, 3)).astype(np.float32)
    return {"inputs": inputs, "counted": np.ones(4, np.float32), "tokens": np.zeros((4, 5), np.int32)}


def evaluate(trainable, frozen):
    return objective(trainable, frozen, {"inputs": jnp.eye(3), "counted": jnp.ones(3)}, None)


def describe(step):
    return f"rows {step} to {step + 3}"


def task(source=source, name="line", **changes):
    fields = dict(terms={"square": 1.0}, evaluate=evaluate, describe=describe) | changes
    return loop.Task(name, objective, source=source, **fields)


def settings(**changes):
    optimizer = dict(steps=30, warmup=3, peak=0.1, final=0.1, clip=1.0, beta1=0.9, beta2=0.99, weight_decay=0.0)
    return ConfigDict(
        optimizer | dict(log_every=5, evaluate_every=10, save_every=10, workers=0, keep=2, accumulate=1) | changes
    )


def start(rows=3):
    """(trainable, frozen)"""
    return {"layer": {"kernel": jnp.zeros((rows, 2))}}, {"layer": {"target": jnp.asarray(TARGET)}}


def train(task, workdir, mesh=None, begin=None, **changes):
    """The trained kernel."""
    trained = loop.train(task, *(begin or start()), settings(**changes), workdir, mesh)
    return np.asarray(trained["layer"]["kernel"])


def records(workdir):
    return [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]


def curve(workdir):
    """What a log says about training, without what depends on the clock."""
    clock = ("seconds_per_step", "tokens_per_second", "mfu")
    return [{key: value for key, value in record.items() if key not in clock} for record in records(workdir)]
