"""Whole tensors in an adapter's folder, which replace the base model's.

LLaVA's own LoRA training, and code modelled on it, also train other parameters than the adapters, above all the
projector, and store them in the files `TRAINED`. PEFT stores embedding and output layer whole if an adapter
changes one of them.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.models.layers import INT8_LEAVES, projections
from lvlm_jax.parallel.mesh import sharding_beside
from lvlm_jax.weights.checkpoint import TRAINED, open_files
from lvlm_jax.weights.plan import Faults, TensorFile, plan_some
from lvlm_jax.weights.tables import table_for

_PREFIXES = ("base_model.model.", "base_model.")


class _Renamed:
    """A file of tensors under the names of a checkpoint."""

    def __init__(self, file: TensorFile, names: Mapping[str, str]):
        self._file, self._names = file, names
        self.shapes = {name: file.shapes[theirs] for name, theirs in names.items()}
        self.dtypes = {name: file.dtypes[theirs] for name, theirs in names.items()}

    def view(self, name: str) -> np.ndarray:
        return self._file.view(self._names[name])


def _plain_name(name: str) -> str:
    prefix = next((prefix for prefix in _PREFIXES if name.startswith(prefix)), "")
    return name.removeprefix(prefix).replace(".base_layer.", ".")


def _shapes(flat: Mapping) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters; for int8 kernels, those of the float kernels."""
    shapes = {path: tuple(leaf.shape) for path, leaf in flat.items() if not path.endswith(INT8_LEAVES)}
    return shapes | {f"{module}/kernel": shape for module, (_, shape) in projections(flat).items()}


def stored_vocabulary(flat: Mapping, file: TensorFile, config: FamilyConfig) -> dict[str, str]:
    """The embedding and output layer in an adapter's file: their names in a checkpoint -> their names in the file."""
    table, expected = table_for(config), _shapes(flat)
    paths = [path for path in table.vocabulary if path in expected]
    names = {table.name(path, scheme) for scheme in table.schemes for path in paths}
    return {_plain_name(name): name for name in file.shapes if _plain_name(name) in names}


def replace_vocabulary(
    flat: dict, file: TensorFile, names: Mapping[str, str], config: FamilyConfig, where: Path
) -> None:
    """Puts the tensors of `stored_vocabulary` into flat parameters.

    Raises:
        LVLMError: tensors do not fit, or belong to int8 parameters.
    """
    _replace(flat, _Renamed(file, names), config, where)


def trained_files(folder: Path) -> list[Path]:
    """The files of an adapter's folder that contain whole parameters."""
    return [folder / name for name in TRAINED if (folder / name).is_file()]


def replace_trained(flat: dict, folder: Path, config: FamilyConfig) -> None:
    """Puts the tensors of `trained_files` into flat parameters.

    Raises:
        LVLMError: a file contains anything but tensors, unknown names, or tensors that do not fit.
    """
    for path in trained_files(folder):
        (file,) = open_files([path])
        _replace(flat, _Renamed(file, {_plain_name(name): name for name in file.shapes}), config, path)


def _replace(flat: dict, file: _Renamed, config: FamilyConfig, where: Path) -> None:
    faults, shapes = Faults(), _shapes(flat)
    sources = plan_some(config, shapes, file, faults)
    faults.check(where, "the model")
    for path, source in sources.items():
        if path not in flat:
            raise LVLMError(
                f"{where} replaces {path}, which is int8 here: load the model without quant, "
                "save it with the adapter, and load that with quant"
            )
        place = sharding_beside(flat[path], path, shapes[path])
        flat[path] = jax.device_put(np.ascontiguousarray(source.view()).astype(flat[path].dtype), place)
