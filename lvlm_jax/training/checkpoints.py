"""Checkpoints of a training run: Orbax, written while training goes on, each with a record of what it belongs to.

A folder per step holds `state` (sharded arrays) and `record` (JSON). It is written beside its place and renamed, so
that it is there whole or not at all. Restoring lays arrays out as the template says, on any mesh.
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
    """The checkpoints of one task of a run; a context manager that waits for what is being written.

    Args:
        folder: where they lie; made when missing.
        keep: how many of the newest are kept.
        best: also keep the one with the lowest score.

    Raises:
        LVLMError: by every method, when the folder cannot be written.
    """

    def __init__(self, folder: Path, keep: int = 2, best: bool = False):
        self.folder = Path(folder).resolve()
        policies = [LatestN(keep)]
        if best:
            policies.append(BestN(get_metric_fn=_score, reverse=True, n=1))
        options = ocp.CheckpointManagerOptions(
            best_fn=_score if best else None,  # Orbax writes scores only when it has this
            preservation_policy=AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,  # what a killed process was writing
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
            return  # Orbax would wait for the one that is gone
        try:
            self.wait()
            self._manager.close()
        except LVLMError:
            if kind is None or kind is SystemExit:
                raise

    def newest(self) -> int | None:
        """The step of the newest whole checkpoint on the disk."""
        self._manager.reload()
        return max(self._manager.all_steps(), default=None)

    def save(self, step: int, state: Any, record: Mapping, score: float = math.inf) -> None:
        """Begins to write a checkpoint; returns when `state` may be overwritten. One of that step is left alone.

        Args:
            state: arrays.
            record: JSON values; `restore` gives them back.
            score: for keeping the best; lower is better.
        """
        if step in self._manager.all_steps():
            return
        # A deep copy, because it is written while the caller goes on.
        record = json.loads(json.dumps({**record, "versions": versions()}))
        record["checksum"] = _checksum(state, record)
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record))
        self._write(lambda: self._manager.save(step, args=items, metrics={"score": score}))

    def wait(self) -> None:
        """Returns when nothing is being written any more."""
        self._write(self._manager.wait_until_finished)

    def _write(self, action: Any) -> None:
        if self._failed:
            return  # said once; what follows would only repeat it
        try:
            action()
        except Exception as error:  # Orbax and TensorStore raise many kinds, some of another thread
            self._failed = True
            newest = self.newest()
            left = "there is none yet" if newest is None else f"that of step {newest} is intact"
            raise LVLMError(
                f"a checkpoint cannot be written to {self.folder} ({_brief(error)}); {left}: "
                "make room and start again with the same --workdir"
            ) from error

    def restore(self, template: Any, identity: Mapping) -> tuple[Any, dict] | None:
        """The newest readable checkpoint; None when there is none.

        One that is cut, missing parts, or changed is reported, and removed once an older one has been read.

        Args:
            template: `jax.ShapeDtypeStruct`s with the shardings that the arrays shall have.
            identity: what the record of a checkpoint must hold to belong to this run; see `identity`.

        Returns:
            (state, record).

        Raises:
            LVLMError: a checkpoint of another model, or none that can be read.
        """
        unreadable: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found, reason = self._read(step, template, identity), ""
            except LVLMError:
                raise
            except Exception as error:  # as above; each kind means that this one cannot be read
                found, reason = None, _brief(error)
            if _on_all_processes(not reason):
                for broken in unreadable:
                    self._manager.delete(broken)
                return found
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
        """Raises when a checkpoint belongs to another model."""
        there, here = record["trainable"], identity["trainable"]
        different = sorted(path for path in there.keys() | here.keys() if there.get(path) != here.get(path))
        if different:
            path = different[0]
            fault = f"{path} is {there.get(path, 'missing')} there and {here.get(path, 'missing')} here"
        elif record["base"] != identity["base"]:
            fault = "its frozen parameters had other values"
        else:
            return
        raise LVLMError(
            f"checkpoint {step} of {self.folder} is that of another model ({fault}); "
            "use another --workdir, or the configuration it was made with"
        )


def identity(trainable: Any, frozen: Any) -> dict:
    """What tells one model from another: names, dtypes and shapes of the trained parameters, a hash of the frozen."""
    shapes = {path: f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in flatten(trainable).items()}
    return {"trainable": shapes, "base": fingerprint(frozen)}


def _checksum(state: Any, record: Mapping) -> str:
    return hashlib.sha256((fingerprint(state) + json.dumps(record, sort_keys=True)).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of this package and of the libraries that decide a run's numbers."""
    return {"lvlm_jax": __version__} | {name: metadata.version(name) for name in LIBRARIES}


def _score(metrics: Mapping) -> float:
    return metrics["score"]


def _brief(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _ignore_closed_loops() -> None:
    """After a fault Orbax closes the event loop under TensorStore's other reads, each of which would print that."""
    others = sys.unraisablehook

    def hook(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":
            others(found)

    sys.unraisablehook = hook


def _on_all_processes(good: bool) -> bool:
    if jax.process_count() == 1:
        return good
    return bool(multihost_utils.process_allgather(np.array(good)).all())
