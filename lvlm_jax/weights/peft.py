"""Reads and writes LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

An adapter's tensors are named after their torch modules, which the model's key table contains: `base_model.model.` +
module + `.lora_A.weight` [r, in] and `.lora_B.weight` [out, r].

If a torch module combines several of our projections (`Adapted.pieces`), loading gives each of them the whole A and its
own rows of B. Saving combines their adapters into one, which stacks their A and has a block-diagonal B.
"""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.models.layers import LORA_LEAVES, projections
from lvlm_jax.parallel.mesh import sharding_beside
from lvlm_jax.weights.bin_file import BinFile
from lvlm_jax.weights.checkpoint import resolve_checkpoint
from lvlm_jax.weights.lora import scale_of
from lvlm_jax.weights.peft_settings import CONFIG, is_targeted, rank, read_settings, scale
from lvlm_jax.weights.plan import Faults, TensorFile
from lvlm_jax.weights.safetensors_file import SafetensorsFile, write_tensors
from lvlm_jax.weights.tables import LINEAR, Piece, Table, flatten, fuse, table_for, unflatten
from lvlm_jax.weights.whole_tensors import replace_trained, replace_vocabulary, stored_vocabulary, trained_files

WEIGHTS, TORCH_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"

_SCHEME = "state_dict"  # PEFT names modules as in the model in memory
_PREFIX = "base_model.model."
_FACTORS = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight"}


def save_adapter(
    folder: str | os.PathLike,
    params: Mapping,
    config: FamilyConfig,
    base_model_name: str | None = None,
    rslora: bool = False,
) -> Path:
    """Writes the adapters of a parameter tree, for `peft.PeftModel.from_pretrained` and `load_adapter`.

    Args:
        folder: created if missing; an adapter in it is replaced, other files stay.
        params: the whole tree, or at least the leaves of its adapters, on any devices of this process. Ranks, scales
            and the dropout rate are read from them.
        config: the model's configuration.
        base_model_name: folder or hub id of the base model, which PEFT's Auto classes load.
        rslora: write the scales as alpha / √rank (`use_rslora`) instead of alpha / rank; their values stay the same.

    Returns:
        The folder.

    Raises:
        LVLMError: `params` has no adapters, or the folder cannot be written.
    """
    folder, flat = files.expand(folder), flatten(params)
    paths = [path.removesuffix("/lora_a") for path in flat if path.endswith("/lora_a")]
    if not paths:
        raise LVLMError(f"nothing to save to {folder}: the parameters have no LoRA adapter")
    modules = _modules(table_for(config), paths, _SCHEME)
    if unsupported := sorted(set(paths).difference(*(module.paths for module in modules.values()))):
        raise LVLMError(f"the adapter of {unsupported[0]} cannot be saved: PEFT has no linear module for it")
    joint_factors = {name: module.joined(flat, config) for name, module in modules.items()}
    tensors = {
        f"{_PREFIX}{name}{suffix}": getattr(factors, leaf)
        for name, factors in joint_factors.items()
        for leaf, suffix in _FACTORS.items()
    }

    def fetch(name: str) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(tensors[name]).T)

    dropout = float(flat.get(f"{paths[0]}/lora_dropout", 0.0))
    settings = _settings(joint_factors, dropout, base_model_name, rslora)
    entries = [(name, array.shape[::-1], np.dtype(array.dtype)) for name, array in tensors.items()]
    with files.atomic_file(folder / CONFIG) as config_file, files.atomic_file(folder / WEIGHTS) as weights_file:
        config_file.write((json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
        write_tensors(weights_file, entries, fetch)
        # The settings are written after the tensors, so that new tensors never coexist with old settings.
        (folder / CONFIG).unlink(missing_ok=True)
    return folder


def load_adapter(folder: str | os.PathLike, params: Mapping, config: FamilyConfig) -> dict:
    """Attaches an adapter to parameters, beside its kernels and unmerged.

    Args:
        folder: written by PEFT's `save_pretrained`, `save_adapter`, or LLaVA's own training; or a hub id.
        params: the parameters of the base model.
        config: the model's configuration.

    Returns:
        `params` with the leaves of the adapter, in float32, on the mesh of `params` if there is one. Parameters that
        the folder contains whole (`whole_tensors`) replace those of `params`.

    Raises:
        LVLMError: a file is unreadable, the kind of adapter is not supported, `params` already has an adapter, or
            tensors are missing, unexpected, misshapen or not floating-point; all such tensors are reported at once.
    """
    folder, flat = resolve_checkpoint(folder), flatten(params)
    if present := next((path for path in flat if path.endswith(LORA_LEAVES)), None):
        raise LVLMError(f"the parameters already have a LoRA adapter ({present}); merge it before loading {folder}")
    settings = read_settings(folder)
    file, kernels = _open(folder), projections(flat)
    _check_head(folder, table_for(config), flat, file)
    vocabulary = stored_vocabulary(flat, file, config)
    targeted = _select_targets(_modules_in_use(table_for(config), kernels, file), settings, file)
    shapes = {}
    for name, module in targeted.items():
        inner, (rows, columns) = rank(name, settings), module.shape(kernels, config)
        shapes[f"{_PREFIX}{name}{_FACTORS['lora_a']}"] = (inner, rows)
        shapes[f"{_PREFIX}{name}{_FACTORS['lora_b']}"] = (columns, inner)
    _check_tensors(folder, file, shapes, vocabulary.values())
    replace_vocabulary(flat, file, vocabulary, config, folder)
    replace_trained(flat, folder, config)

    def put(path: str, value: np.ndarray) -> None:
        kernel, _ = kernels[path.rpartition("/")[0]]
        flat[path] = jax.device_put(value.astype(np.float32), sharding_beside(kernel, path, value.shape))

    for name, module in targeted.items():
        lora_a, lora_b = (file.view(f"{_PREFIX}{name}{suffix}") for suffix in _FACTORS.values())
        for path, piece in zip(module.paths, module.pieces, strict=True):
            put(f"{path}/lora_a", lora_a.T)
            put(f"{path}/lora_b", (lora_b if piece is None else piece.take(lora_b, config)).T)
            put(f"{path}/lora_scale", np.asarray(scale(name, settings)))
            if settings["lora_dropout"]:
                put(f"{path}/lora_dropout", np.asarray(settings["lora_dropout"]))
    return unflatten(flat)


def brings_whole(folder: Path) -> str | None:
    """The name of a file or tensor with whole parameters that `load_adapter` would load from a folder; None without
    one."""
    if trained := trained_files(folder):
        return trained[0].name
    return next((name for name in _open(folder).shapes if ".lora_" not in name), None)


class Factors(NamedTuple):
    """The adapter of one torch module, in our orientation: W + scale · A B."""

    lora_a: Float[np.ndarray, "in r"]
    lora_b: Float[np.ndarray, "r out"]
    scale: float


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A torch module that PEFT can adapt.

    Attributes:
        paths: our projections that the module contains, in the order of its fused weight.
        pieces: the part of the fused weight that belongs to each projection; None for the whole weight.
    """

    paths: tuple[str, ...]
    pieces: tuple[Piece | None, ...]

    @classmethod
    def of(cls, parts: Mapping[str, Piece | None]) -> "Adapted":
        """The module that contains these projections; `parts` maps their paths to pieces."""
        paths = sorted(parts, key=lambda path: parts[path].index if parts[path] else 0)
        return cls(tuple(paths), tuple(parts[path] for path in paths))

    def shape(self, kernels: Mapping, config: FamilyConfig) -> tuple[int, int]:
        """Numbers of inputs and outputs of the module; see `layers.projections`."""
        _, (rows, columns) = kernels[self.paths[0]]
        piece = self.pieces[0]
        return rows, columns if piece is None else piece.whole((columns,), config)[0]

    def joined(self, flat: Mapping, config: FamilyConfig) -> Factors:
        """One adapter for the whole module; with a single A, if all projections of a fused module share it."""
        own = [
            Factors(flat[f"{path}/lora_a"], flat[f"{path}/lora_b"], float(flat[f"{path}/lora_scale"]))
            for path in self.paths
        ]
        first, piece = own[0], self.pieces[0]
        if piece is None:
            return first
        own = [one._replace(lora_a=np.asarray(one.lora_a), lora_b=np.asarray(one.lora_b)) for one in own]
        shares, groups = piece.shares(config), piece.groups(config)
        if len(own) == len(shares) and all(
            one.scale == first.scale and np.array_equal(one.lora_a, first.lora_a) for one in own
        ):
            blocks = [one.lora_b.T for one in own]
            return Factors(np.asarray(first.lora_a), fuse(blocks, shares, groups).T, first.scale)
        ends = np.cumsum([one.lora_a.shape[1] for one in own])
        unit = first.lora_b.shape[1] // shares[piece.index]  # outputs per share
        blocks = [np.zeros((unit * share, ends[-1]), np.float32) for share in shares]
        for one, part, end in zip(own, self.pieces, ends, strict=True):
            place = slice(end - one.lora_a.shape[1], end)
            blocks[part.index][:, place] = one.lora_b.T * (one.scale / first.scale)
        stacked = np.concatenate([one.lora_a for one in own], axis=1)
        return Factors(stacked, fuse(blocks, shares, groups).T, first.scale)


def _modules(table: Table, paths: Iterable[str], scheme: str) -> dict[str, Adapted]:
    """The torch modules of the projections at `paths`, by name; omits parameters that are not a module's weight."""
    pieces: dict[str, dict[str, Piece | None]] = {}
    for path in paths:
        row, name = table.row(f"{path}/kernel", scheme)[0], table.name(f"{path}/kernel", scheme)
        if row.axes == LINEAR and name.endswith(".weight"):
            pieces.setdefault(name.removesuffix(".weight"), {})[path] = row.piece
    return {name: Adapted.of(parts) for name, parts in pieces.items()}


def _settings(modules: Mapping[str, Factors], dropout: float, base_model_name: str | None, rslora: bool) -> dict:
    """`adapter_config.json` for the adapters of torch modules.

    Targets are the modules' full names: the endings that PEFT's users write ("q_proj") would also match the vision
    tower.
    """
    ranks = {name: factors.lora_a.shape[1] for name, factors in modules.items()}
    alphas = {
        name: _round_for_people(factors.scale / scale_of(1, ranks[name], rslora)) for name, factors in modules.items()
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": _round_for_people(dropout),
        "target_modules": sorted(modules),
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": rslora,
    }


def _round_for_people(value: float) -> int | float:
    """Rounds a float32 to the number that people write: 10 for 3.3333333 · 3, 0.05 for 0.05000000074."""
    value = float(f"{value:.7g}")
    return int(value) if value.is_integer() else value


def _open(folder: Path) -> TensorFile:
    if (folder / WEIGHTS).is_file():
        return SafetensorsFile(folder / WEIGHTS)
    if (folder / TORCH_WEIGHTS).is_file():
        return BinFile(folder / TORCH_WEIGHTS)
    others = sorted(file.name for file in folder.glob("adapter_model*"))
    raise LVLMError(
        f"no {WEIGHTS} and no {TORCH_WEIGHTS} in {folder}{f', only {others[0]}' if others else ''}; "
        "expected a folder that PEFT saved an adapter to"
    )


def _modules_in_use(table: Table, paths: Iterable[str], file: TensorFile) -> dict[str, Adapted]:
    """All torch modules by name, in the naming scheme of most tensors of the file."""
    schemes = [_modules(table, paths, scheme) for scheme in table.schemes]
    return max(schemes, key=lambda modules: sum(_has_tensors(module, file) for module in modules))


def _has_tensors(module: str, file: TensorFile) -> bool:
    return any(f"{_PREFIX}{module}{suffix}" in file.shapes for suffix in _FACTORS.values())


def _select_targets(modules: Mapping[str, Adapted], settings: Mapping, file: TensorFile) -> dict[str, Adapted]:
    """The modules that have an adapter; without targets in the settings, those with tensors in the file."""
    if settings["target_modules"] is None:
        return {name: module for name, module in modules.items() if _has_tensors(name, file)}
    targeted = {name: module for name, module in modules.items() if is_targeted(name, settings)}
    # LLaVA makes its adapters before it loads the tower, but its settings name endings that the tower has too.
    decoder = {name: one for name, one in targeted.items() if one.paths[0].startswith("language_model/")}
    outside = targeted.keys() - decoder.keys()
    original = any(name.startswith(f"{_PREFIX}model.layers.") for name in file.shapes)
    return targeted if not original or any(_has_tensors(name, file) for name in outside) else decoder


def _check_head(folder: Path, table: Table, flat: Mapping, file: TensorFile) -> None:
    """Raises an LVLMError if the adapter changes an output layer that this model does not have."""
    if table.tied is None or any(path.startswith(table.tied[0].removesuffix("kernel")) for path in flat):
        return
    names = {table.name(table.tied[0], scheme).removesuffix(".weight") for scheme in table.schemes}
    if any(_has_tensors(name, file) for name in names):
        raise LVLMError(
            f"adapter {folder} adapts lm_head, which this model ties to its embedding: with PEFT, load the model with "
            "tie_word_embeddings=False, merge the adapter, save, and load that"
        )


def _check_tensors(folder: Path, file: TensorFile, shapes: Mapping[str, tuple[int, ...]], whole: Iterable[str]) -> None:
    faults = Faults()
    for name in sorted(file.shapes.keys() - shapes.keys() - set(whole)):
        faults.add("unexpected", name)
    for name, shape in shapes.items():
        if name not in file.shapes:
            faults.add("missing", name)
        elif file.shapes[name] != shape:
            faults.add("misshapen", f"{name} {list(file.shapes[name])} instead of {list(shape)}")
        elif not jnp.issubdtype(file.dtypes[name], jnp.floating):
            faults.add("not floating-point", f"{name} {file.dtypes[name]}")
    faults.check(f"adapter {folder}")
    if not shapes:
        raise LVLMError(f"adapter {folder} adapts no projection of this model; was it trained on another one?")
