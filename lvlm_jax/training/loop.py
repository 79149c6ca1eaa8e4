"""The training loop: one task, one jitted step with donated state, logs, checkpoints, and a clean stop."""

import dataclasses
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from lvlm_jax.errors import LVLMError
from lvlm_jax.training import data, optimizer
from lvlm_jax.training.checkpoints import Checkpoints
from lvlm_jax.training.losses import Mean

Metrics = dict[str, Mean]


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned, from what, and how it is judged.

    Attributes:
        name: of its folder and in the log.
        objective: (params, batch) -> (scalar to minimise, metrics); pure.
        source: step number -> batch; picklable.
        evaluate: params -> metrics on held-out data.
    """

    name: str
    objective: Callable[[Any, Any], tuple[jax.Array, Metrics]]
    source: Callable[[int], Any]
    evaluate: Callable[[Any], Metrics]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """All that changes during training."""

    step: Any  # an integer array, or what JAX puts in its place while it rebuilds a tree
    params: Any
    optimizer: optax.OptState

    @classmethod
    def create(cls, params: Any, transformation: optax.GradientTransformation) -> "State":
        """Step 0."""
        return cls(jnp.zeros((), jnp.int32), params, transformation.init(params))


def make_step(
    objective: Callable[[Any, Any], tuple[jax.Array, Metrics]], transformation: optax.GradientTransformation
) -> Callable[[State, Any], tuple[State, Metrics]]:
    """The jitted update; its first argument is donated."""

    def step(state: State, batch: Any) -> tuple[State, Metrics]:
        (loss, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(state.params, batch)
        updates, optimizer_state = transformation.update(gradient, state.optimizer, state.params)
        one = jnp.ones(())
        metrics |= {"objective": Mean(loss, one), "gradient_norm": Mean(optax.tree.norm(gradient), one)}
        return State(state.step + 1, optax.apply_updates(state.params, updates), optimizer_state), metrics

    return jax.jit(step, donate_argnums=0)


class Stop:
    """Within it, SIGTERM and SIGINT only set `requested`, so that the loop can save before it leaves."""

    def __enter__(self) -> "Stop":
        self.requested = False
        self._before = {
            number: signal.signal(number, self._request) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Log:
    """JSON lines in `log.jsonl` of a run: every record has the stage and the step it was made after."""

    def __init__(self, workdir: Path, stage: str):
        self._path, self._stage = workdir / "log.jsonl", stage

    def write(self, step: int, values: dict[str, float]) -> None:
        """Appends one record."""
        record = {
            "stage": self._stage,
            "step": step,
            **{name: round(float(v), 6) for name, v in values.items()},
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def train(task: Task, params: Any, settings: Any, workdir: Path) -> Any:
    """Trains from `params`, or from the newest checkpoint of the task in `workdir`, up to `settings.steps` steps.

    Args:
        settings: the optimizer's fields (see `optimizer`), and `log_every`, `evaluate_every`, `save_every` (steps),
            `workers` (processes that make batches), `keep` (checkpoints).

    Returns:
        The trained parameters.

    Raises:
        LVLMError: the loss is NaN or infinite; the message names the step and the checkpoint to go back to.
        SystemExit: code 0, after SIGTERM or SIGINT, with everything saved.
    """
    transformation = optimizer.make(settings)
    rate = optimizer.schedule(settings)
    # A copy, because the step donates its state and the caller keeps `params`; placed for good, because a second
    # step whose state is placed otherwise than the first one's would be compiled again.
    state = jax.device_put(
        State.create(jax.tree.map(jnp.copy, params), transformation), jax.local_devices()[0]
    )
    checkpoints = Checkpoints(workdir / task.name, settings.keep)
    state = checkpoints.restore(state) or state
    start, saved = int(state.step), int(state.step)
    step_fn = make_step(task.objective, transformation)
    log = Log(workdir, task.name)
    source = data.batches(task.source, start, settings.steps, settings.workers)
    running: Metrics = {}
    with Stop() as stop, tqdm(total=settings.steps, initial=start, desc=task.name, mininterval=10) as bar:
        began = time.monotonic()
        for step, batch in enumerate(source, start + 1):
            state, metrics = step_fn(state, batch)
            if not np.isfinite(metrics["objective"].total):
                raise LVLMError(
                    f"the loss of step {step} of {task.name} is {float(metrics['objective'].total)}; the last good "
                    f"checkpoint is that of step {saved}: lower the learning rate, or look at batch {step - 1}"
                )
            running = {name: running[name] + mean if running else mean for name, mean in metrics.items()}
            bar.update()
            if step % settings.log_every == 0 or step == settings.steps:
                elapsed, began = time.monotonic() - began, time.monotonic()
                values = {name: float(mean.value) for name, mean in running.items()}
                count = float(running["objective"].count)
                log.write(step, values | {"rate": rate(step), "seconds_per_step": elapsed / count})
                bar.set_postfix(loss=f"{values['objective']:.3f}")
                running = {}
            if step % settings.evaluate_every == 0 or step == settings.steps:
                found = {
                    f"val/{name}": float(mean.value) for name, mean in task.evaluate(state.params).items()
                }
                log.write(step, found)
                bar.write(f"{task.name} {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))
                began = time.monotonic()
            if step % settings.save_every == 0 or step == settings.steps or stop.requested:
                checkpoints.save(step, state)
                saved = step
            if stop.requested:
                checkpoints.close()
                raise SystemExit(0)
    checkpoints.close()
    return state.params
