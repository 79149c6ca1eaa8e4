"""Checkpoints of a training run: Orbax, the last few kept, an unreadable newest one passed over."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

from lvlm_jax.errors import LVLMError


class Checkpoints:
    """The checkpoints of one stage of a run.

    Args:
        folder: where they lie; made when missing.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(Path(folder).resolve(), options=options)

    def save(self, step: int, state: Any) -> None:
        """Writes `state` under `step`; it appears whole or not at all. A step that is there already is left alone."""
        if step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, template: Any) -> Any | None:
        """The newest readable state, shaped and placed like `template`; None when there is no checkpoint.

        Raises:
            LVLMError: there are checkpoints, but none fits `template`.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        reason = ""
        for step in steps:
            try:
                return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))
            except (
                Exception
            ) as error:  # Orbax and TensorStore raise many kinds; each means this one is unreadable
                reason = " ".join(str(error).split())[:200]
                logging.warning(
                    "checkpoint %s of %s cannot be read: %s", step, self._manager.directory, reason
                )
        if steps:
            raise LVLMError(
                f"none of the checkpoints in {self._manager.directory} can be read into this model ({reason}); "
                "use another --workdir, or the configuration they were made with"
            )
        return None

    def close(self) -> None:
        """Waits for writes that are under way."""
        self._manager.close()
