"""How a checkpoint or an adapter was trained, as `training.json` beside its weights."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lvlm_jax import files
from lvlm_jax.journal.record import checkpoint_hash, method_record
from lvlm_jax.training import registry
from lvlm_jax.training.registry import Objective
from lvlm_jax.version import __version__
from lvlm_jax.weights.folder import TRAINING, write_json


def of(config: ConfigDict, base: str | Path) -> dict[str, Any]:
    """The record of a run of an objective.

    Args:
        config: configuration of the run.
        base: folder of the checkpoint that it began with, whose own record is kept as `model.training`.

    Returns:
        JSON values: `version`, `recipe`, `method` (under whose attention the model learnt; None for plain attention),
        `seed` and `model`.
    """
    entry = registry.find(config.recipe)
    has_method = isinstance(entry, Objective) and entry.method
    folder = Path(base)
    model = {
        "name": config.model,
        "sha256": checkpoint_hash(folder) if folder.is_dir() else None,
        "training": read(folder),
    }
    if config.lora.enabled and config.lora.start:
        model["adapter"] = {"name": config.lora.start, "training": read(files.expand(config.lora.start))}
    return record(config, entry.method(config) if has_method else None) | {"model": model}


def record(config: ConfigDict, method: Any) -> dict[str, Any]:
    """The record of a run that started from fresh parameters; `method` is None for plain attention."""
    return {
        "version": __version__,
        "recipe": config.recipe,
        "method": method_record(method),
        "seed": config.seed,
        "model": None,
    }


def read(folder: str | Path) -> dict[str, Any] | None:
    """The record in a folder; None if it has none.

    Raises:
        LVLMError: the record cannot be read.
    """
    path = Path(folder) / TRAINING
    return files.read_json(path, "record of a training") if path.is_file() else None


def write(folder: Path, about: dict[str, Any]) -> None:
    """Writes a record beside an adapter."""
    write_json(folder / TRAINING, about)
