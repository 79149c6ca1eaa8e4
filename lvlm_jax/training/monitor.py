"""Monitoring for people: a progress bar, JSON lines, TensorBoard, and the utilisation of the hardware.

Speed is in tokens per second; padding counts, because it is computed too. The model FLOP utilisation is

    MFU = (4 P + 2 T) · tokens per second / (devices · peak)

P: weights that every token uses (all except those of the vision tower and a separate embedding table); the forward pass
and the gradients of activations take 2 FLOPs each per weight. T: the trained weights among them, another 2 FLOPs each;
with T = P this is the usual 6 P. Attention's own products, the tower and recomputation are left out, so the true
utilisation is higher. The peak is that of dense bfloat16 products.
"""

import dataclasses
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import image, scalar, text

from lvlm_jax.config_files import user_object
from lvlm_jax.errors import LVLMError
from lvlm_jax.files import read_bytes, write_whole
from lvlm_jax.journal import progress
from lvlm_jax.parallel.peaks import peak_flops
from lvlm_jax.training.losses import Mean
from lvlm_jax.weights.tables import flatten

FLUSH_SECONDS = 5.0  # TensorBoard's files; a flush waits for the disk


def flops_per_token(trainable: Any, frozen: Any) -> float:
    """FLOPs of training per token, 4 P + 2 T; see the module."""
    sizes = [{path: math.prod(leaf.shape) for path, leaf in flatten(part).items()} for part in (trainable, frozen)]
    untied = any("lm_head/" in path for part in sizes for path in part)

    def met(path: str) -> bool:
        beside = path.startswith(("vision_tower/", "connector/", "qformer/"))
        return not beside and not (untied and path.endswith("embed_tokens/embedding"))

    trained, fixed = (sum(size for path, size in part.items() if met(path)) for part in sizes)
    return 4.0 * (trained + fixed) + 2.0 * trained


def token_count(batch: Any) -> int:
    """The size of all arrays of a batch that are called `tokens`."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    names = ((getattr(path[-1], "key", getattr(path[-1], "name", None)), leaf) for path, leaf in leaves)
    return sum(leaf.size for name, leaf in names if name == "tokens")


def padding(batch: Any) -> dict[str, Mean]:
    """`padding`, the share of a batch's tokens that are padding; empty for batches without `image_id`."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    known = [leaf for path, leaf in leaves if getattr(path[-1], "key", None) == "image_id"]
    if not known:
        return {}
    filling, size = sum(int((leaf < 0).sum()) for leaf in known), sum(leaf.size for leaf in known)
    return {"padding": Mean(np.float32(filling), np.float32(size))}


class Pace:
    """Seconds per step, tokens per second and MFU since the last reading.

    Args:
        flops: FLOPs per token.
        devices: the devices that share the work.
    """

    def __init__(self, flops: float, devices: list[jax.Device]):
        peak = peak_flops(devices[0].device_kind)
        self._flops, self._peak = flops, peak and peak * len(devices)
        self.restart(time.monotonic())

    def restart(self, now: float) -> None:
        """Resets the counts: the time before `now` (in `time.monotonic`) does not belong to steps."""
        self._began, self._steps, self._tokens = now, 0, 0

    def count(self, tokens: int) -> None:
        """Counts one step and its tokens."""
        self._steps += 1
        self._tokens += tokens

    def read(self, now: float) -> dict[str, float]:
        """`seconds_per_step`, `tokens_per_second` and `mfu` up to `now`, if they are known; resets the counts."""
        elapsed, steps, tokens = max(now - self._began, sys.float_info.min), self._steps, self._tokens
        self.restart(now)
        figures = {"seconds_per_step": elapsed / steps} if steps else {}
        if steps and tokens:
            figures["tokens_per_second"] = tokens / elapsed
            if self._peak:
                figures["mfu"] = self._flops * tokens / elapsed / self._peak
        return figures


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer of the model in training to a held-out prompt.

    Attributes:
        id: id of the row.
        prompt: the prompt's text.
        truth, text: the right answer, and the model's answer.
        image: the first image, upright 8-bit RGB `[H, W, 3]`; None without images.
    """

    id: str
    prompt: str
    truth: str
    text: str
    image: np.ndarray | None = None

    @property
    def right(self) -> bool:
        """Whether the two answers have the same words, ignoring case and punctuation."""
        return _words(self.text) == _words(self.truth)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


Logger = Callable[[int, Mapping[str, float]], None]


def logger(word: str, workdir: Path, config: Mapping) -> Logger | None:
    """A further destination of records, besides the run's folder; None if `word` is empty, or if this is not process 0.

    Args:
        word: "" for none; "wandb"; or `module:function` or `file.py:function` of (step, values).

    Raises:
        LVLMError: wandb is not installed, or there is no such function.
    """
    if not word or jax.process_index():
        return None
    if word != "wandb":
        function = user_object(word, "loop.logger")
        if not callable(function):
            raise LVLMError(f"loop.logger {word[:80]!r} is not a function; expected a function of (step, values)")
        return function
    try:
        import wandb
    except ImportError as error:
        raise LVLMError(
            "loop.logger is 'wandb', which is not installed; pip install wandb, or leave it empty"
        ) from error
    workdir.mkdir(parents=True, exist_ok=True)
    # A resumed run in the same folder continues the same wandb run.
    identity = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
    run = wandb.init(project="lvlm_jax", dir=str(workdir), id=identity, resume="allow", config=dict(config))
    return lambda step, values: run.log(dict(values), step=step)


class Monitor:
    """Progress bar, `log.jsonl` and TensorBoard files of one task. Only the first process shows and writes anything.

    Args:
        workdir: contains `log.jsonl`, shared by the tasks of a run, and `tensorboard/<task>`.
        task: name of the task.
        start: the step from which the run resumes; records of later steps are removed.
        steps: the last step.
        beside: a function that gets every record too, from `logger`; or None.

    Raises:
        LVLMError: (also in `write` and `secure`) the files cannot be written.
    """

    def __init__(self, workdir: Path, task: str, start: int, steps: int, beside: Logger | None = None):
        self._task, self._path, self._events, self._beside = task, workdir / "log.jsonl", None, beside
        self._flushed = time.monotonic()
        first = jax.process_index() == 0
        if first and start < steps:
            rewind(self._path, task, start or -1)  # a run that starts over also repeats its evaluation at step 0
            self._events = _event_file(workdir / "tensorboard" / task, start)
        self._progress = progress.Progress(steps, start, task, quiet=not first)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.close()
        if self._events is not None:
            self._events.close()

    def advance(self) -> None:
        """Advances the bar by one step."""
        self._progress.update()

    def write(self, step: int, values: Mapping[str, float], answers: Sequence[Answer] = ()) -> None:
        """Writes `values` and answers as the record of `step`."""
        if self._events is None:
            return
        # Nine digits distinguish any two float32 numbers.
        values = {name: float(f"{value:.9g}") for name, value in values.items()}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                texts = [{"id": one.id, "text": one.text, "truth": one.truth} for one in answers]
                record = {"stage": self._task, "step": step} | values | ({"answers": texts} if texts else {})
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            summaries = [scalar(name, value) for name, value in values.items()]
            for one in answers:
                summaries.append(text(f"answers/{one.id}", f"{one.prompt}\n\n**{one.text}**\n\n(truth: {one.truth})"))
                if one.image is not None and step == 0:
                    summaries.append(image(f"answers/{one.id}", one.image, dataformats="HWC"))
            for summary in summaries:
                self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            if self._beside is not None:
                self._beside(step, values)
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._flush()
        except OSError as error:
            raise self._full(error) from error

    def secure(self) -> None:
        """Flushes all files to the disk. Call it before a checkpoint declares that these records need not be written
        again."""
        try:
            if self._events is not None:
                self._flush()
        except OSError as error:
            raise self._full(error) from error

    def _flush(self) -> None:
        self._events.flush()
        self._flushed = time.monotonic()

    def _full(self, error: OSError) -> LVLMError:
        return LVLMError(f"the logs in {self._path.parent} cannot be written: {error.strerror}")

    def show(self, values: Mapping[str, float]) -> None:
        """Shows the loss and the speed after the bar."""
        values_shown = {"loss": f"{values['objective']:.4g}"}
        if "tokens_per_second" in values:
            values_shown["tokens/s"] = f"{values['tokens_per_second']:.0f}"
        if "mfu" in values:
            values_shown["MFU"] = f"{values['mfu']:.1%}"
        self._progress.note(values_shown)

    def say(self, step: int, values: Mapping[str, float]) -> None:
        """Prints the values of a step as a line above the bar."""
        if not self._progress.quiet:
            text = ", ".join(f"{name} {value:.3f}" for name, value in values.items())
            progress.say(f"{self._task} {step}: {text}", sys.stdout)


def _event_file(folder: Path, start: int) -> EventsWriter:
    """TensorBoard's file for this process; its first event hides those of an earlier process after `start`.

    This thread writes the file: if a full disk ended a separate writer thread, training would wait for ever.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The library's own name has only second and host, so two runs within a second would share a file.
        events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        events.write_event(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START)))
    except OSError as error:
        raise LVLMError(f"{folder} cannot be written: {error.strerror}") from error
    return events


def rewind(log: Path, task: str, step: int) -> None:
    """Removes a task's records after `step` from a log, and lines that are not records, such as a truncated line."""
    if not log.exists():
        return
    content = read_bytes(log, "log of the training")
    remaining = b"".join(line for line in content.splitlines(keepends=True) if _stays(line, task, step))
    if remaining != content:
        write_whole(log, remaining.decode())


def _stays(line: bytes, task: str, step: int) -> bool:
    try:
        record = json.loads(line.decode())
        return line.endswith(b"\n") and (record["stage"] != task or record["step"] <= step)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False
