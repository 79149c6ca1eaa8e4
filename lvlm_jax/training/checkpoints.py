"""Checkpoints of a training run: written by Orbax while training continues, each with a record of its run.

The folder of a step contains `state` (sharded arrays) and `record` (JSON). The folder is written under another name
and then renamed, so it is complete or absent. Restoring places arrays as the template says, on any mesh.
"""

import hashlib
import json
import math
import sys
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from lvlm_jax import parallel
from lvlm_jax.errors import LVLMError
from lvlm_jax.version import __version__
from lvlm_jax.weights.fingerprint import fingerprint
from lvlm_jax.weights.tables import flatten

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")


class Checkpoints:
    """The checkpoints of one task of a run; a context manager that waits for unfinished writes.

    Args:
        folder: folder of the checkpoints; created if missing.
        keep: number of newest checkpoints to keep.
        best: whether to keep the checkpoint with the lowest score too.

    Raises:
        LVLMError: (every method) the folder cannot be written.
    """

    def __init__(self, folder: Path, keep: int = 2, best: bool = False):
        self.folder = Path(folder).resolve()
        policies = [LatestN(keep)]
        if best:
            policies.append(BestN(get_metric_fn=_score, reverse=True, n=1))
        options = ocp.CheckpointManagerOptions(
            best_fn=_score if best else None,  # Orbax writes scores only if this is set
            preservation_policy=AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,  # left by a killed process
        )
        self._failed = False
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise LVLMError(f"{self.folder} cannot be written: {error.strerror or error}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        if parallel.lost(error):
            return  # Orbax would wait for the process that died
        try:
            self.wait()
            self._manager.close()
        except LVLMError:
            if kind is None or kind is SystemExit:
                raise

    def newest(self) -> int | None:
        """The step of the newest complete checkpoint on the disk."""
        self._manager.reload()
        return max(self._manager.all_steps(), default=None)

    def save(self, step: int, state: Any, record: Mapping, score: float = math.inf) -> None:
        """Starts writing a checkpoint; returns when `state` may be overwritten. An existing checkpoint
        of that step is not written again.

        Args:
            state: arrays.
            record: JSON values; `restore` returns them.
            score: determines the best checkpoint; lower is better.
        """
        if step in self._manager.all_steps():
            return
        # A deep copy, because it is written while the caller continues.
        record = json.loads(json.dumps({**record, "versions": versions()}))
        record["checksum"] = _checksum(state, record)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        self._write(lambda: self._manager.save(step, args=items, metrics={"score": score}))

    def wait(self) -> None:
        """Returns when all writes are finished."""
        self._write(self._manager.wait_until_finished)

    def _write(self, action: Any) -> None:
        if self._failed:
            return  # reported once; further errors would only repeat it
        try:
            action()
        except Exception as error:  # Orbax and TensorStore raise many types, some from other threads
            self._failed = True
            newest = self.newest()
            remaining = "there is none yet" if newest is None else f"that of step {newest} is intact"
            raise LVLMError(
                f"a checkpoint cannot be written to {self.folder} ({_brief(error)}); {remaining}: "
                "make room and start again with the same --workdir"
            ) from error

    def restore(self, template: Any, identity: Mapping) -> tuple[Any, dict] | None:
        """The newest readable checkpoint; None if there is none.

        A truncated, incomplete or changed checkpoint is reported, and removed once an older one has been read.

        Args:
            template: `jax.ShapeDtypeStruct`s with the wanted shardings.
            identity: required content of the checkpoint's record, see `identity`.

        Returns:
            (state, record).

        Raises:
            LVLMError: the checkpoint belongs to another model, or none is readable.
        """
        unreadable: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state_and_record, reason = self._read(step, template, identity), ""
            except LVLMError:
                raise
            except Exception as error:  # of any type; each means that this checkpoint is unreadable
                state_and_record, reason = None, _brief(error)
            if _on_all_processes(not reason):
                for broken in unreadable:
                    self._manager.delete(broken)
                return state_and_record
            unreadable[step] = reason
            _ignore_closed_loops()
            if jax.process_index() == 0:
                warnings.warn(f"checkpoint {step} of {self.folder} cannot be read ({reason})", stacklevel=2)
        if unreadable:
            raise LVLMError(
                f"no checkpoint in {self.folder} can be read ({unreadable[max(unreadable)]}); "
                "use another --workdir, or the configuration they were made with"
            )
        return None

    def _read(self, step: int, template: Any, identity: Mapping) -> tuple[Any, dict]:
        items = ocp.args.Composite(record=ocp.args.JsonRestore())
        record = self._manager.restore(step, args=items)["record"]
        self._compare(step, record, identity)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(template))
        state = self._manager.restore(step, args=items)["state"]
        if record.pop("checksum") != _checksum(state, record):
            raise ValueError("its contents are not those that were written")
        return state, record

    def _compare(self, step: int, record: Mapping, identity: Mapping) -> None:
        """Raises an `LVLMError` if a checkpoint belongs to another model."""
        stored, own = record["trainable"], identity["trainable"]
        different = sorted(path for path in stored.keys() | own.keys() if stored.get(path) != own.get(path))
        if different:
            path = different[0]
            fault = f"{path} is {stored.get(path, 'missing')} there and {own.get(path, 'missing')} here"
        elif record["base"] != identity["base"]:
            fault = "its frozen parameters had other values"
        else:
            return
        raise LVLMError(
            f"checkpoint {step} of {self.folder} is that of another model ({fault}); "
            "use another --workdir, or the configuration it was made with"
        )


def identity(trainable: Any, frozen: Any) -> dict:
    """The identity of a model: names, dtypes and shapes of the trained parameters, and a hash of the frozen ones."""
    shapes = {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in flatten(trainable).items()}
    return {"trainable": shapes, "base": fingerprint(frozen)}


def _checksum(state: Any, record: Mapping) -> str:
    return hashlib.sha256((fingerprint(state) + json.dumps(record, sort_keys=True)).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that affect a run's numbers."""
    return {"lvlm_jax": __version__} | {name: metadata.version(name) for name in LIBRARIES}


def _score(metrics: Mapping) -> float:
    return metrics["score"]


def _brief(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _ignore_closed_loops() -> None:
    """After an error, Orbax closes the event loop of TensorStore's other reads; this silences the error that each of
    them would print."""
    others = sys.unraisablehook

    def hook(event: Any) -> None:
        if str(event.exc_value) != "Event loop is closed":
            others(event)

    sys.unraisablehook = hook


def _on_all_processes(good: bool) -> bool:
    if jax.process_count() == 1:
        return good
    return bool(multihost_utils.process_allgather(np.array(good)).all())
