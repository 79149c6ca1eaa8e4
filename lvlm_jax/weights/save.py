"""Saves parameters from devices as a Hugging Face checkpoint that transformers can load, one tensor at a time."""

import dataclasses
import json
import math
import os
from pathlib import Path

import jax
import numpy as np

from lvlm_jax import files, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.weights.checkpoint import read_optional
from lvlm_jax.weights.folder import PROCESSOR_FOLDERS, TRAINING, copy_processor, put_in_place, write_json
from lvlm_jax.weights.plan import Faults
from lvlm_jax.weights.quantize import refuse_quantized
from lvlm_jax.weights.safetensors_file import write_safetensors
from lvlm_jax.weights.tables import Row, flatten, fuse, inverse, permute, table_for

MAX_SHARD_SIZE = 5_000_000_000  # bytes, the default of transformers

# Files that `overwrite` may remove: those of a checkpoint folder, and no others.
_CHECKPOINT_FILES = (
    "*.json",
    "*.safetensors",
    "*.bin",
    "*.jinja",
    "*.model",
    "*.tiktoken",
    "*.txt",
    "*.md",
    ".gitattributes",
)


def save_checkpoint(
    folder: str | os.PathLike,
    params: dict,
    config: FamilyConfig,
    processor_source: str | os.PathLike | None = None,
    dtype=None,
    scheme: str = "hub",
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    training: dict | None = None,
) -> Path:
    """Writes a checkpoint folder. It appears complete or not at all: everything is written beside it and then renamed.

    Args:
        folder: the new folder.
        params: the parameter tree, on any devices of this process.
        config: the model's configuration; `config.hf` is written as `config.json`.
        processor_source: a folder whose tokenizer, processor and generation files are copied.
        dtype: dtype of the saved tensors; None keeps each parameter's own.
        scheme: the naming scheme, one of those of the family's key table.
        max_shard_size: bytes above which the weights are split into several files with an index.
        overwrite: replace an existing checkpoint folder.
        training: the record of how the parameters were made, written as `training.json`.

    Returns:
        The folder.

    Raises:
        LVLMError: the folder already exists, parameters do not fit the configuration or are quantized, the scheme is
            unknown, or the disk is full.
    """
    refuse_quantized(params)
    folder = files.expand(folder)
    _check_target(folder, overwrite)
    tensors = _tensors(params, config, scheme, dtype)
    try:
        with files.folder_beside(folder, "partial") as partial:
            _write_weights(partial, tensors, max_shard_size)
            hf_config = _hf_config(config, {tensor.dtype for tensor in tensors.values()})
            write_json(partial / "config.json", hf_config)
            write_json(partial / "generation_config.json", _generation_config(config, processor_source))
            if training is not None:
                write_json(partial / TRAINING, training)
            if processor_source is not None:
                copy_processor(Path(processor_source), partial, config)
            partial.chmod(0o777 & ~_umask())
            put_in_place(partial, folder)
    except OSError as error:
        raise LVLMError(f"cannot write {folder}: {error.strerror or error}") from error
    return folder


def stored_shapes(
    config: FamilyConfig, scheme: str = "hub", parameters: dict | None = None
) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape of a configuration's Hugging Face checkpoint, under one of its naming schemes.

    Args:
        config: the configuration.
        scheme: the naming scheme.
        parameters: the result of `models.abstract_parameters`, if it is known; computing it takes seconds.
    """
    parameters = models.abstract_parameters(config) if parameters is None else parameters
    tensors = _by_name(flatten(parameters), config, scheme, None)
    return {name: tensor.shape for name, tensor in tensors.items()}


def _check_target(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise LVLMError(f"{folder} is a file; expected a folder to save to")
    present = sorted(folder.iterdir()) if folder.exists() else []
    if present and not overwrite:
        raise LVLMError(f"{folder} exists and is not empty: name another folder, or pass overwrite=True")
    foreign = [
        entry.name
        for entry in present
        if (entry.is_dir() and entry.name not in PROCESSOR_FOLDERS)
        or not any(map(entry.match, (*_CHECKPOINT_FILES, *PROCESSOR_FOLDERS)))
    ]
    if foreign:
        raise LVLMError(
            f"{folder} has more than a checkpoint in it ({', '.join(foreign[:5])}), so it is not replaced: name another"
        )


@dataclasses.dataclass
class _Tensor:
    """A tensor to save: its parameters (several if it is fused, in order) with their rows, and its dtype and shape in
    the file."""

    parts: list[tuple[Row, jax.Array]]
    dtype: np.dtype
    shape: tuple[int, ...]
    config: FamilyConfig

    def host(self) -> np.ndarray:
        """The tensor with the axes of Hugging Face."""
        arrays = [
            host if row.axes is None else host.transpose(inverse(row.axes))
            for row, host in ((row, np.asarray(array)) for row, array in self.parts)
        ]
        piece = self.parts[0][0].piece
        fused_array = fuse(arrays, piece.shares(self.config), piece.groups(self.config)) if piece else arrays[0]
        return np.ascontiguousarray(fused_array, self.dtype)


def _tensors(params: dict, config: FamilyConfig, scheme: str, dtype) -> dict[str, _Tensor]:
    """tensor name -> tensor, after checking that the parameters are those of the configuration."""
    expected = {path: tuple(leaf.shape) for path, leaf in flatten(models.abstract_parameters(config)).items()}
    flat, faults = flatten(params), Faults()
    for path in flat.keys() - expected.keys():
        faults.add("unexpected", path)
    for path, shape in expected.items():
        if path not in flat:
            faults.add("missing", path)
        elif flat[path].shape != shape:
            faults.add("misshapen", f"{path} {list(flat[path].shape)} instead of {list(shape)}")
    faults.check("the parameters to save")
    return _by_name(flat, config, scheme, dtype)


def _by_name(params: dict, config: FamilyConfig, scheme: str, dtype) -> dict[str, _Tensor]:
    """tensor name -> tensor, from parameters by path."""
    table = table_for(config)
    if scheme not in table.schemes:
        raise LVLMError(f"there is no naming scheme {scheme!r}; expected one of {', '.join(table.schemes)}")
    tensors = {}
    for name, paths in table.names(params, scheme).items():
        parts = [(table.row(path, scheme)[0], params[path]) for path in paths]
        parts.sort(key=lambda part: part[0].piece.index if part[0].piece else 0)
        shapes = [permute(array.shape, inverse(row.axes)) for row, array in parts]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(parts) > 1 else shapes[0]
        saved = np.dtype(parts[0][1].dtype if dtype is None else dtype)
        tensors[name] = _Tensor(parts, saved, shape, config)
    return tensors


def _write_weights(folder: Path, tensors: dict[str, _Tensor], max_shard_size: int) -> None:
    def fetch(name: str) -> np.ndarray:
        return tensors[name].host()

    sizes = {name: math.prod(tensor.shape) * tensor.dtype.itemsize for name, tensor in tensors.items()}
    shards: list[list[str]] = [[]]
    shard_size = 0
    for name, size in sizes.items():
        if shards[-1] and shard_size + size > max_shard_size:
            shards.append([])
            shard_size = 0
        shards[-1].append(name)
        shard_size += size
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, [(name, tensors[name].shape, tensors[name].dtype) for name in names], fetch)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def _hf_config(config: FamilyConfig, dtypes: set[np.dtype]) -> dict:
    """`config.hf` with the dtype of the saved tensors; unchanged if they have several dtypes."""
    hf = json.loads(json.dumps(config.hf))
    if len(dtypes) == 1:
        name = next(iter(dtypes)).name
        for part in (hf, hf.get("text_config"), hf.get("vision_config")):
            if isinstance(part, dict):
                part.update({key: name for key in ("dtype", "torch_dtype") if key in part})
        if "torch_dtype" not in hf:
            hf["dtype"] = name
    return hf


def _generation_config(config: FamilyConfig, processor_source) -> dict:
    if processor_source is not None and (Path(processor_source) / "generation_config.json").is_file():
        return read_optional(Path(processor_source), "generation_config.json")
    eos = list(config.eos_token_ids)
    return {"eos_token_id": eos[0] if len(eos) == 1 else eos, "pad_token_id": config.pad_token_id}


def _umask() -> int:
    """The process's umask; `mkdtemp` makes private folders, but a checkpoint follows the user's default."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
