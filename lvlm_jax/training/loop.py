"""The training loop: one task, one jitted step, logs, checkpoints, and a clean stop."""

import contextlib
import dataclasses
import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lvlm_jax import parallel
from lvlm_jax.errors import LVLMError
from lvlm_jax.journal.record import differences
from lvlm_jax.training import checkpoints, optimizer, placement
from lvlm_jax.training.data import workers as data
from lvlm_jax.training.losses import Mean
from lvlm_jax.training.monitor import Answer, Monitor, Pace, flops_per_token, logger, padding, token_count
from lvlm_jax.training.step import Metrics, Objective, State, make_step


@dataclasses.dataclass(frozen=True)
class Task:
    """The parameters, data and objective of a training, and its evaluation.

    Attributes:
        name: name of the task, of its folder of checkpoints, and of its records in the log.
        objective: (trainable, frozen, batch, key) -> metrics; pure.
        terms: the metrics to minimise, with their weights; see `step.loss`.
        source: step number, from 0 -> batch, a pytree of NumPy arrays; picklable. With `accumulate` > 1 every array has
            a leading axis of that size. If the run is given in epochs, it has a method `steps(epochs)`.
        evaluate: (trainable, frozen) -> metrics on held-out data; None without held-out data.
        describe: step number, from 0 -> description of its batch, for error messages.
        answer: (trainable, frozen) -> answers to held-out prompts; None without such prompts.
    """

    name: str
    objective: Objective
    terms: Mapping[str, float]
    source: Callable[[int], Any]
    evaluate: Callable[[Any, Any], Metrics] | None
    describe: Callable[[int], str] | None = None
    answer: Callable[[Any, Any], Sequence[Answer]] | None = None


class Stop:
    """A context in which SIGTERM and SIGINT only request a stop, so that the loop can save first.

    Several processes stop after the same step: JAX's preemption service, which watches for SIGTERM, chooses the step.
    """

    def __enter__(self) -> "Stop":
        self._requested = False
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        self._before = {number: signal.signal(number, self._ask) for number in numbers}
        return self

    def _ask(self, number: int, frame: Any) -> None:
        self._requested = True

    def is_due(self, step: int) -> bool:
        """Whether to stop after `step`; every process calls it once per step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._requested

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Tally:
    """Sums of metrics since the last line of the log, as Python numbers, which JSON stores exactly."""

    def __init__(self, sums: Mapping[str, list[float]] | None = None):
        self.sums = {name: list(pair) for name, pair in (sums or {}).items()}

    def add(self, metrics: Metrics) -> None:
        """Adds the metrics of one step; waits for the device."""
        for name, mean in jax.device_get(metrics).items():
            total, count = self.sums.get(name, (0.0, 0.0))
            self.sums[name] = [total + float(mean.total), count + float(mean.count)]

    def finite(self) -> bool:
        """Whether all losses and gradients were finite."""
        return all(math.isfinite(self.sums[name][0]) for name in ("objective", "gradient_norm"))

    def take(self) -> dict[str, float]:
        """The means, as in `Mean.value`; resets the sums."""
        means = {name: total / max(count, 1) for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means


def train(
    task: Task,
    trainable: Any,
    frozen: Any,
    settings: Any,
    workdir: Path,
    mesh: jax.sharding.Mesh | None = None,
    config: Mapping | None = None,
) -> Any:
    """Trains from `trainable`, or from the newest checkpoint of the task in `workdir`, up to `settings.steps` steps.

    Args:
        trainable: parameters to learn; they are copied.
        frozen: the model's other parameters, in a disjoint nested dict.
        settings: the optimizer's fields (see `optimizer`); `log_every`, `evaluate_every`, `save_every` (steps),
            `workers` (processes that make batches), `keep` (checkpoints). Optional: `seed`, `accumulate`, `logger` (see
            `monitor.logger`); `keep_best`, a logged metric such as "val/loss" whose best checkpoint is kept too;
            `patience`, the number of evaluations without a lower value after which the run ends.
        mesh: devices of the run; None: all of them, along `data`.
        config: the configuration that checkpoints record; None: `settings`.

    Returns:
        The trained parameters, on the mesh.

    Raises:
        LVLMError: the loss or its gradient is NaN or infinite (the message names the step, its batch and the last good
            checkpoint), a checkpoint belongs to another model, or the disk cannot be written.
        SystemExit: code 0, after SIGTERM or SIGINT, with everything saved.
    """
    mesh = parallel.make_mesh(data=-1, fsdp=1, tensor=1) if mesh is None else mesh
    steps, accumulate = settings.steps, settings.get("accumulate", 1)
    best, patience = settings.get("keep_best", ""), settings.get("patience", 0)
    if best and task.evaluate is None:
        raise LVLMError(f"keep_best is {best!r}, but {task.name} has no validation data; give some, or leave it empty")
    config = json.loads(json.dumps(settings.to_dict() if config is None else dict(config), default=str))
    transformation, rate = optimizer.make(settings), optimizer.schedule(settings)
    template = placement.of_state(trainable, transformation, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, template)
    frozen = placement.put(frozen, placement.of_parameters(frozen, mesh))
    update = make_step(
        task.objective, task.terms, transformation, settings.get("seed", 0), accumulate,
        (shardings, placement.everywhere(mesh)),
    )  # fmt: skip

    with Stop() as stop, checkpoints.Checkpoints(workdir / task.name, settings.keep, bool(best)) as saved:
        identity = checkpoints.identity(trainable, frozen)
        state, record = _begin(saved, template, identity, trainable, transformation, shardings)
        _warn_of_changes(record.get("config", config), config)
        start, tally = int(state.step), Tally(record.get("sums"))
        lowest, waited = record.get("lowest"), record.get("waited", 0)
        if patience and waited >= patience:
            return state.trainable
        pace = Pace(flops_per_token(trainable, frozen), list(mesh.devices.flat))

        def settle(step: int, metrics: Metrics, tokens: int, filler: Metrics, done: float | None = None) -> None:
            """Processes the results of a step. Runs while the next step computes, so that no device waits for the host.

            Args:
                tokens, filler: `token_count` and `padding` of the step's batch.
                done: when the step ended; None: when its metrics are available.
            """
            tally.add(metrics | filler)
            done = time.monotonic() if done is None else done
            if not tally.finite():
                saved.wait()
                raise LVLMError(_not_finite(task, step, tally, saved.newest()))
            monitor.advance()
            if step == start + 1:
                pace.restart(done)  # most of this step was compilation
            else:
                pace.count(tokens)
            if step % settings.log_every == 0 or step == steps:
                values = tally.take() | {"learning_rate": float(rate(step - 1))} | pace.read(done)
                monitor.write(step, values)
                monitor.show(values)

        def judged(step: int) -> dict[str, float]:
            """Computes and logs the metrics of held-out data and of answers to held-out prompts."""
            with jax.set_mesh(mesh):
                metrics_found = _evaluated(task, state.trainable, frozen)
                answers = task.answer(state.trainable, frozen) if task.answer else ()
            if answers:
                metrics_found["val/answers_right"] = sum(answer.right for answer in answers) / len(answers)
            monitor.write(step, metrics_found, answers)
            monitor.say(step, metrics_found)
            return metrics_found

        with (
            Monitor(workdir, task.name, start, steps, logger(settings.get("logger", ""), workdir, config)) as monitor,
            contextlib.closing(data.batches(task.source, start, steps, settings.workers)) as batches,
        ):
            if task.evaluate is not None and start == 0:
                metrics_of_step = judged(0)
                lowest = _score(metrics_of_step, best) if best else None
            running = None
            for step, batch in enumerate(batches, start + 1):
                placed = placement.put(batch, placement.of_batch(batch, mesh, accumulate))
                # If a step has ended before the next one begins, its time does not depend on when it is read.
                ended = running is not None and all(leaf.is_ready() for leaf in jax.tree.leaves(running[1]))
                done = time.monotonic() if ended else None
                with jax.set_mesh(mesh):
                    state, metrics = update(state, frozen, placed)
                if running is not None:
                    settle(*running, done)
                running = (step, metrics, token_count(batch), padding(batch))
                stopping, last = stop.is_due(step), step == steps
                judge = task.evaluate is not None and (step % settings.evaluate_every == 0 or last)
                keep = step % settings.save_every == 0 or last or stopping or (judge and bool(best))
                if not (judge or keep):
                    continue
                settle(*running)
                running, score = None, math.inf
                if judge:
                    metrics_of_step = judged(step)
                    if best:
                        score = _score(metrics_of_step, best)
                        better = lowest is None or score < lowest
                        lowest, waited = (score, 0) if better else (lowest, waited + 1)
                if keep:
                    monitor.secure()
                    # The data's position is the number of the next batch, which equals this step.
                    position = {"step": step, "seed": settings.get("seed", 0), "next_batch": step}
                    progress = {"sums": tally.sums, "lowest": lowest, "waited": waited}
                    saved.save(step, state, identity | position | progress | {"config": config}, score)
                pace.restart(time.monotonic())
                if stopping:
                    raise SystemExit(0)
                if patience and waited >= patience:
                    monitor.say(step, {f"{best} was lowest": lowest})
                    break
    return state.trainable


def _begin(
    saved: checkpoints.Checkpoints,
    template: State,
    identity: Mapping,
    trainable: Any,
    transformation: Any,
    shardings: State,
) -> tuple[State, Mapping]:
    """The newest checkpoint and its record; without a checkpoint, the initial state and an empty record."""
    restored = saved.restore(template, identity)
    if restored is not None:
        return restored
    # A copy, because the step donates its state and the caller keeps `trainable`.
    own = placement.put(jax.tree.map(lambda leaf: leaf.copy(), trainable), shardings.trainable)
    moments = jax.jit(transformation.init, out_shardings=shardings.optimizer)(own)
    return State(placement.put(np.zeros((), np.int32), shardings.step), own, moments), {}


def _evaluated(task: Task, trainable: Any, frozen: Any) -> dict[str, float]:
    metrics = jax.device_get(task.evaluate(trainable, frozen))
    return {f"val/{name}": float(Mean(*mean).value) for name, mean in metrics.items()}


def _score(metrics: Mapping[str, float], best: str) -> float:
    if best not in metrics:
        raise LVLMError(f"keep_best is {best!r}, which is not measured; expected one of {', '.join(sorted(metrics))}")
    return metrics[best] if math.isfinite(metrics[best]) else math.inf


def _not_finite(task: Task, step: int, tally: Tally, newest: int | None) -> str:
    fault = next(name for name in ("objective", "gradient_norm") if not math.isfinite(tally.sums[name][0]))
    quantity = {"objective": "the loss", "gradient_norm": "the norm of the gradient"}[fault]
    batch = f"batch {step - 1}" if task.describe is None else task.describe(step - 1)
    checkpoint = (
        "there is no checkpoint yet" if newest is None else f"the last good checkpoint is that of step {newest}"
    )
    return (
        f"{quantity} of step {step} of {task.name} is {tally.sums[fault][0]} ({batch}); {checkpoint}: "
        "lower the learning rate, or look at these examples"
    )


def _warn_of_changes(before: Mapping, now: Mapping) -> None:
    changes = differences(dict(before), dict(now))
    if changes and jax.process_index() == 0:
        warnings.warn(f"the run resumes with another configuration: {'; '.join(changes[:5])}", stacklevel=3)
