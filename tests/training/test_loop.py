import dataclasses
import json
import os
import pathlib
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from lvlm_jax import config_files
from lvlm_jax.errors import LVLMError
from lvlm_jax.training.monitor import Answer
from tests.training import line


def stopping_at(step, number=signal.SIGTERM):
    """A source that sends this process a signal while the batch of `step` is made."""

    def stopping(index):
        if index == step:
            os.kill(os.getpid(), number)
        return line.source(index)

    return stopping


def saved(workdir):
    return {path.name for path in (workdir / "line").iterdir()}


def test_the_loss_falls_and_is_logged(tmp_path):
    kernel = line.train(line.task(), tmp_path, steps=200)
    np.testing.assert_allclose(kernel, line.TARGET, atol=0.05)
    logged = line.records(tmp_path)
    assert [r["step"] for r in logged if "objective" in r] == list(range(5, 201, 5))
    assert [r["step"] for r in logged if "val/error" in r] == list(range(0, 201, 10))
    assert logged[-1]["val/error"] < 0.05 < logged[1]["error"]
    np.testing.assert_allclose(logged[0]["val/error"], np.abs(line.TARGET).mean(), rtol=1e-5)  # before the first step
    assert {"gradient_norm", "learning_rate", "seconds_per_step", "tokens_per_second"} <= logged[2].keys()


def test_means_of_steps_and_the_rate_that_was_used_are_logged_and_what_was_given_stays(tmp_path):
    trainable, frozen = line.start()
    line.train(line.task(), tmp_path, begin=(trainable, frozen), peak=1e-7, warmup=0, steps=10)
    assert not np.any(trainable["layer"]["kernel"]) and np.array_equal(frozen["layer"]["target"], line.TARGET)
    errors = [np.abs(line.source(step)["inputs"] @ line.TARGET).mean() for step in range(10)]
    cosine = [1e-7 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * step / 10))) for step in (4, 9)]
    first, second = (record for record in line.records(tmp_path) if "objective" in record)
    np.testing.assert_allclose([first["error"], second["error"]], np.reshape(errors, (2, 5)).mean(1), rtol=1e-5)
    np.testing.assert_allclose([first["learning_rate"], second["learning_rate"]], cosine, rtol=1e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_leaves_with_code_0_and_goes_on_as_if_nothing_happened(tmp_path, number):
    whole, halves = tmp_path / "whole_run", tmp_path / "halves"
    kernel = line.train(line.task(), whole)
    with pytest.raises(SystemExit) as stop:
        line.train(line.task(stopping_at(16, number)), halves)
    assert stop.value.code == 0 and "17" in saved(halves)
    np.testing.assert_array_equal(line.train(line.task(), halves), kernel)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    # Stopped in the middle of five steps that make one line of the log: their mean is none the less that of five.
    assert line.curve(halves) == line.curve(whole)


@pytest.mark.parametrize("log_every", [1, 5])
def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, log_every):
    def poisoned(step):
        batch = line.source(step)
        return batch | {"inputs": batch["inputs"] * np.float32(np.nan if step == 13 else 1)}

    message = r"the loss of step 14 of line is nan \(rows 13 to 16\); the last good checkpoint is that of step 10"
    with pytest.raises(LVLMError, match=message):
        line.train(line.task(poisoned), tmp_path, log_every=log_every)
    assert saved(tmp_path) == {"10"}


def test_a_gradient_that_is_not_finite_stops_the_run_before_anything_is_saved(tmp_path):
    def steep(trainable, frozen, batch, key):
        metrics = line.objective(trainable, frozen, batch, key)
        root = jnp.sqrt(jnp.sum(trainable["layer"]["kernel"] ** 2))  # 0, with an infinite slope
        return metrics | {"square": metrics["square"]._replace(total=metrics["square"].total + root)}

    task = line.loop.Task("line", steep, {"square": 1.0}, line.source, None)
    message = r"the norm of the gradient of step 1 of line is nan \(batch 0\); there is no checkpoint yet"
    with pytest.raises(LVLMError, match=message):
        line.train(task, tmp_path, save_every=1)
    assert not saved(tmp_path)


def measuring(*errors):
    """A task whose evaluations find these errors, and an iterator of those that are left."""
    left = iter(errors)
    return line.task(evaluate=lambda trainable, frozen: {"error": line.Mean(next(left), 1.0)}), left


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    """The error is lowest after step 15, which is saved for this reason only."""
    task, _ = measuring(9.0, 3.0, 2.0, 1.0, 4.0, 5.0, 6.0)
    line.train(task, tmp_path, evaluate_every=5, keep=1, keep_best="val/error")
    assert saved(tmp_path) == {"15", "30"}
    for own, message in (
        (line.task(), "keep_best is 'val/loss', which is not measured; expected one of val/error"),
        (line.task(evaluate=None), "line has no validation data"),
    ):
        with pytest.raises(LVLMError, match=message):
            line.train(own, tmp_path / "other", keep_best="val/loss")


def test_a_run_ends_early_where_nothing_gets_better_and_stays_ended(tmp_path):
    """Training ends after two evaluations without a lower error, even if it is stopped between them."""
    task, left = measuring(9.0, 3.0, 2.0, 4.0, 2.5, 1.0)
    early = dict(evaluate_every=5, keep_best="val/error", patience=2)
    with pytest.raises(SystemExit):
        line.train(dataclasses.replace(task, source=stopping_at(16)), tmp_path, **early)
    first = line.train(task, tmp_path, **early)
    assert line.records(tmp_path)[-1] == {"stage": "line", "step": 20, "val/error": 2.5}
    np.testing.assert_array_equal(line.train(task, tmp_path, **early), first)
    assert next(left) == 1.0 and {"10", "20"} <= saved(tmp_path)


def test_records_also_go_to_a_function_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("told = []\ndef log(step, values):\n    told.append((step, values))\n")
    monkeypatch.chdir(tmp_path)
    line.train(line.task(), tmp_path / "run", logger="mine:log")
    told = config_files.user_module("mine:log", "logger").told
    records = [{"stage": "line", "step": step} | values for step, values in told]
    assert records == line.records(tmp_path / "run")
    with pytest.raises(LVLMError, match="wandb"):
        line.train(line.task(), tmp_path / "other", logger="wandb")


def test_answers_are_logged_with_the_share_that_is_right(tmp_path):
    said = [
        Answer("7", "What?", "a cat", "A cat."),
        Answer("8", "Who?", "nobody", "a cat", np.zeros((4, 4, 3), np.uint8)),
    ]
    line.train(line.task(answer=lambda trainable, frozen: said), tmp_path, steps=10)
    first = line.records(tmp_path)[0]
    assert first["step"] == 0 and first["val/answers_right"] == 0.5
    assert first["answers"][1] == {"id": "8", "text": "a cat", "truth": "nobody"}
    tags = {tag for _, tag, _ in events(tmp_path / "tensorboard" / "line")}
    assert {"answers/7/text_summary", "answers/8", "val/answers_right"} <= tags


def events(folder):
    """(step, name, value) of every scalar, in the order of the files' times; TensorBoard's record format."""
    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, place = path.read_bytes(), 0
        while place < len(data):
            size = int.from_bytes(data[place : place + 8], "little")
            event = Event.FromString(data[place + 12 : place + 12 + size])
            place += 16 + size
            if event.session_log.status:
                found = [entry for entry in found if entry[0] < event.step]
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_shows_what_the_log_says(tmp_path):
    """A run is killed after logging step 12 and resumes from step 10: neither log has a step twice."""

    def killed(step):
        if step == 13:
            raise KeyError("killed")
        return line.source(step)

    with pytest.raises(KeyError):
        line.train(line.task(killed), tmp_path, log_every=1)
    assert line.records(tmp_path)[-1]["step"] == 12
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"stage": "line", "st')
    line.train(line.task(), tmp_path, log_every=1)
    logged = line.records(tmp_path)
    assert [r["step"] for r in logged if "objective" in r] == list(range(1, 31))
    shown = [(r["step"], name, np.float32(r[name])) for r in logged for name in r.keys() - {"step", "stage"}]
    assert sorted(events(tmp_path / "tensorboard" / "line")) == sorted(shown)


def test_only_records_of_the_own_task_are_taken_back(tmp_path):
    line.train(line.task(name="before"), tmp_path, steps=10)
    (tmp_path / "log.jsonl").open("a").write(json.dumps({"stage": "line", "step": 7}) + "\n")
    line.train(line.task(), tmp_path, steps=10)
    stages = [(record["stage"], record["step"]) for record in line.records(tmp_path)]
    assert stages == [(stage, step) for stage in ("before", "line") for step in (0, 5, 10, 10)]


def test_a_full_disk_under_the_log(tmp_path, monkeypatch):
    opened = pathlib.Path.open

    def full(path, mode="r", *arguments, **options):
        if path.name == "log.jsonl" and mode == "a":
            raise OSError(28, "No space left on device")
        return opened(path, mode, *arguments, **options)

    monkeypatch.setattr(pathlib.Path, "open", full)
    with pytest.raises(LVLMError, match="cannot be written: No space left on device"):
        line.train(line.task(), tmp_path)


def test_dropout_differs_between_steps_and_repeats_with_the_seed(tmp_path):
    def noisy(trainable, frozen, batch, key):
        return line.objective(trainable, frozen, batch, key) | {"noise": line.Mean(jax.random.normal(key), 1.0)}

    def noises(name, seed):
        task = line.loop.Task("line", noisy, {"square": 1.0}, line.source, None)
        line.train(task, tmp_path / name, steps=4, log_every=1, seed=seed)
        return [record["noise"] for record in line.records(tmp_path / name)]

    first = noises("a", 1)
    assert len(set(first)) == 4
    assert first == noises("b", 1) and not set(first) & set(noises("c", 2))
