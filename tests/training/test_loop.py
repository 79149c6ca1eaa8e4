import json
import os
import shutil
import signal

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from lvlm_jax.errors import LVLMError
from lvlm_jax.training import loop
from lvlm_jax.training.losses import Mean

TARGET = np.linspace(-1, 1, 6).reshape(3, 2).astype(np.float32)


def objective(params, batch):
    error = batch["inputs"] @ (params["layer"]["kernel"] - TARGET)
    loss = jnp.mean(error**2)
    return loss, {"error": Mean(jnp.sum(jnp.abs(error)), jnp.float32(error.size))}


def source(step):
    return {"inputs": np.random.default_rng(step).normal(size=(4, 3)).astype(np.float32)}


def task(source=source):
    return loop.Task("line", objective, source, lambda params: objective(params, {"inputs": jnp.eye(3)})[1])


def settings(**changes):
    optimizer = dict(
        steps=30, warmup=3, peak=0.1, final=0.1, clip=1.0, beta1=0.9, beta2=0.99, weight_decay=0.0
    )
    return ConfigDict(
        optimizer | dict(log_every=5, evaluate_every=10, save_every=10, workers=0, keep=2) | changes
    )


def start():
    return {"layer": {"kernel": jnp.zeros((3, 2))}}


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def stopping_at(step, number=signal.SIGTERM):
    """A source that sends this process a signal while the batch of `step` is made."""

    def stopping(index):
        if index == step:
            os.kill(os.getpid(), number)
        return source(index)

    return stopping


def test_the_loss_falls_and_is_logged(tmp_path):
    params = loop.train(task(), start(), settings(steps=200), tmp_path)
    np.testing.assert_allclose(params["layer"]["kernel"], TARGET, atol=0.05)
    logged = records(tmp_path)
    assert [r["step"] for r in logged if "objective" in r] == list(range(5, 201, 5))
    assert [r["step"] for r in logged if "val/error" in r] == list(range(10, 201, 10))
    assert logged[-1]["val/error"] < 0.05 < logged[0]["error"]


def test_a_logged_mean_is_that_of_its_steps(tmp_path):
    loop.train(task(), start(), settings(peak=0.0, steps=10), tmp_path)
    errors = [np.abs(source(step)["inputs"] @ TARGET).mean() for step in range(5)]
    np.testing.assert_allclose(records(tmp_path)[0]["error"], np.mean(errors), rtol=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_leaves_with_code_0_and_goes_on_as_if_nothing_happened(tmp_path, number):
    whole = loop.train(task(), start(), settings(), tmp_path / "whole_run")
    with pytest.raises(SystemExit) as stop:
        loop.train(task(stopping_at(16, number)), start(), settings(), tmp_path / "halves")
    assert stop.value.code == 0
    assert (tmp_path / "halves" / "line" / "17").is_dir()
    resumed = loop.train(task(), start(), settings(), tmp_path / "halves")
    np.testing.assert_array_equal(resumed["layer"]["kernel"], whole["layer"]["kernel"])
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_finished_run_is_left_as_it_is(tmp_path):
    first = loop.train(task(), start(), settings(), tmp_path)
    before = records(tmp_path)
    again = loop.train(task(lambda step: pytest.fail("a step was made")), start(), settings(), tmp_path)
    np.testing.assert_array_equal(again["layer"]["kernel"], first["layer"]["kernel"])
    assert records(tmp_path) == before


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_last_good_checkpoint(tmp_path):
    def poisoned(step):
        batch = source(step)
        return {"inputs": batch["inputs"] * np.float32(np.nan)} if step == 13 else batch

    with pytest.raises(
        LVLMError, match=r"step 14 of line is nan; the last good checkpoint is that of step 10"
    ):
        loop.train(task(poisoned), start(), settings(), tmp_path)
    assert sorted(path.name for path in (tmp_path / "line").iterdir() if path.is_dir()) == ["10"]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    loop.train(task(), start(), settings(save_every=5), tmp_path)
    kept = {path.name for path in (tmp_path / "line").iterdir() if path.is_dir()}
    assert kept == {"25", "30"}


def test_an_unreadable_newest_checkpoint_is_passed_over(tmp_path):
    whole = loop.train(task(), start(), settings(), tmp_path)
    for file in (tmp_path / "line" / "30").rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(b"")
    resumed = loop.train(task(), start(), settings(), tmp_path)
    np.testing.assert_array_equal(resumed["layer"]["kernel"], whole["layer"]["kernel"])
    assert records(tmp_path)[-1]["step"] == 30 and sum(r["step"] == 25 for r in records(tmp_path)) == 2


def test_checkpoints_of_another_model_are_an_error(tmp_path):
    loop.train(task(), start(), settings(steps=10), tmp_path)
    shutil.move(tmp_path / "line", tmp_path / "other")
    other = loop.Task("other", objective, source, lambda params: {})
    with pytest.raises(LVLMError, match="use another --workdir"):
        loop.train(other, {"layer": {"kernel": jnp.zeros((5, 2))}}, settings(), tmp_path)
