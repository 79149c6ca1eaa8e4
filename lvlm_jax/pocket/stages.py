"""The settings, folders and stages that the parts of `lvlm pocket-training` share; each stage is done once."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.journal.record import checkpoint_hash, differences
from lvlm_jax.pocket import benchmark as pocket
from lvlm_jax.weights import names


@dataclasses.dataclass(frozen=True)
class Setup:
    """Settings that all parts of a run share.

    Attributes:
        config: the settings of configs/pocket_training.py.
        out: folder of all files of the run.
        batch_size: number of questions that are answered at once.
        resamples: number of bootstrap resamples.
        images, captions: numbers of test images to ask about and to describe.
        seconds: name of a finished stage -> its duration.
    """

    config: ConfigDict
    out: Path
    batch_size: int
    resamples: int
    images: int
    captions: int
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    def world(self, part: pocket.Part) -> Path:
        """Folder of the test images that a part of the benchmark is about."""
        count = self.captions if part.benchmark.descriptions else self.images
        folder = self.out / f"world-{count}"
        pocket.write_world(folder, count)
        return folder

    @property
    def base(self) -> str:
        """Folder of the checkpoint that every training begins with."""
        return names.checkpoint(self.config.model)

    def stage(self, name: str, about: Mapping[str, Any], work: Callable[[], object]) -> None:
        """Does a piece of work once, even if the run is stopped and resumed.

        Args:
            name: name of the stage and of its folder below `out`.
            about: everything that determines the result.
            work: does the work.

        Raises:
            LVLMError: the folder has a result with other settings.
        """
        path = self.out / name / "stage.json"
        about = json.loads(json.dumps(about, default=str))
        known = files.read_json(path, "stage of the run") if path.exists() else {"about": about, "seconds": 0.0}
        if changed := differences(known["about"], about):
            raise LVLMError(
                f"{str(path.parent)!r} was made with other settings ({'; '.join(changed[:3])}); repeat those, give "
                "another --out, or remove it"
            )
        if not known.get("done"):
            print(f"{name} ...", flush=True)
            began, done = time.monotonic(), False
            try:
                work()
                done = True
            finally:
                known |= {"seconds": round(known["seconds"] + time.monotonic() - began, 1), "done": done}
                files.write_whole(path, json.dumps(known, indent=1) + "\n")
        self.seconds[name] = known["seconds"]

    def about_model(self) -> dict[str, str]:
        """The base model, for records."""
        return {"model": checkpoint_hash(self.base), "dtype": names.dtype("auto")}
