"""LoRA adapters in the format of PEFT: `adapter_config.json` and `adapter_model.safetensors`, out and in.

An adapter's tensors carry the names of the torch modules they belong to, which the model's key table knows:
`base_model.model.` + module + `.lora_A.weight` [r, in] and `.lora_B.weight` [out, r].

Where a torch module holds several projections of ours (`Adapted.pieces`), each gets the whole A and its rows of B. Out
of the projections' own adapters comes one whose A stacks theirs and whose B is zero but for theirs, block by block.
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
from lvlm_jax.weights.peft_settings import CONFIG, is_targeted, rank, read_settings, scale
from lvlm_jax.weights.plan import Faults, TensorFile
from lvlm_jax.weights.safetensors_file import SafetensorsFile, write_tensors
from lvlm_jax.weights.tables import LINEAR, Piece, Table, flatten, fused, table_for, unflatten
from lvlm_jax.weights.whole_tensors import replace_trained, replace_vocabulary, stored_vocabulary

WEIGHTS, TORCH_WEIGHTS = "adapter_model.safetensors", "adapter_model.bin"

_SCHEME = "state_dict"  # PEFT names modules as the model in memory does
_PREFIX = "base_model.model."
_FACTORS = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight"}


def save_adapter(
    folder: str | os.PathLike, params: Mapping, config: FamilyConfig, base_model_name: str | None = None
) -> Path:
    """Writes the adapters that a parameter tree holds, for `peft.PeftModel.from_pretrained` and `load_adapter`.

    Args:
        folder: made when missing; an adapter in it is replaced, other files stay.
        params: the whole tree, or at least the leaves of its adapters, on any devices of this process. Ranks, scales
            and the dropout rate are read from them.
        config: the model's configuration.
        base_model_name: folder or hub id of the base model, which PEFT's Auto classes load.

    Returns:
        The folder.

    Raises:
        LVLMError: no adapters in `params`, or the folder cannot be written.
    """
    folder, flat = files.expand(folder), flatten(params)
    paths = [path.removesuffix("/lora_a") for path in flat if path.endswith("/lora_a")]
    if not paths:
        raise LVLMError(f"nothing to save to {folder}: the parameters hold no LoRA adapter")
    modules = _modules(table_for(config), paths, _SCHEME)
    if lost := sorted(set(paths).difference(*(module.paths for module in modules.values()))):
        raise LVLMError(f"the adapter of {lost[0]} cannot be saved: PEFT knows no linear module for it")
    whole = {name: module.joined(flat, config) for name, module in modules.items()}
    tensors = {
        f"{_PREFIX}{name}{suffix}": getattr(factors, leaf)
        for name, factors in whole.items()
        for leaf, suffix in _FACTORS.items()
    }

    def fetch(name: str) -> np.ndarray:
        return np.ascontiguousarray(np.asarray(tensors[name]).T)

    dropout = float(flat.get(f"{paths[0]}/lora_dropout", 0.0))
    settings = _settings(whole, dropout, base_model_name)
    entries = [(name, array.shape[::-1], np.dtype(array.dtype)) for name, array in tensors.items()]
    with files.atomic_file(folder / CONFIG) as config_file, files.atomic_file(folder / WEIGHTS) as weights_file:
        config_file.write((json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
        write_tensors(weights_file, entries, fetch)
        # The settings come back behind the tensors: no moment shows the new tensors under the old settings.
        (folder / CONFIG).unlink(missing_ok=True)
    return folder


def load_adapter(folder: str | os.PathLike, params: Mapping, config: FamilyConfig) -> dict:
    """Reads an adapter onto parameters, beside the kernels it belongs to and unmerged.

    Args:
        folder: what PEFT's `save_pretrained`, `save_adapter`, or LLaVA's own training wrote; or a hub id.
        params: the parameters of the base model.
        config: the model's configuration.

    Returns:
        `params` with the leaves of the adapter, in float32, on the mesh of `params` if there is one. Parameters that
        the folder holds whole (`whole_tensors`) are in the place of those of `params`.

    Raises:
        LVLMError: files that cannot be read, a kind of adapter that is not supported (named), `params` with an adapter
            already, or tensors that are missing, unexpected, misshapen or not floating-point; all of them at once.
    """
    folder, flat = resolve_checkpoint(folder), flatten(params)
    if present := next((path for path in flat if path.endswith(LORA_LEAVES)), None):
        raise LVLMError(f"the parameters hold a LoRA adapter already ({present}); merge it before loading {folder}")
    settings = read_settings(folder)
    file, kernels = _open(folder), projections(flat)
    _check_head(folder, table_for(config), flat, file)
    whole = stored_vocabulary(flat, file, config)
    targeted = _targeted(_modules_in_use(table_for(config), kernels, file), settings, file)
    shapes = {}
    for name, module in targeted.items():
        inner, (rows, columns) = rank(name, settings), module.shape(kernels, config)
        shapes[f"{_PREFIX}{name}{_FACTORS['lora_a']}"] = (inner, rows)
        shapes[f"{_PREFIX}{name}{_FACTORS['lora_b']}"] = (columns, inner)
    _check_tensors(folder, file, shapes, whole.values())
    replace_vocabulary(flat, file, whole, config, folder)
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


class Factors(NamedTuple):
    """The adapter of one torch module, in our orientation; W + scale · A B."""

    lora_a: Float[np.ndarray, "in r"]
    lora_b: Float[np.ndarray, "r out"]
    scale: float


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A torch module that PEFT can adapt.

    Attributes:
        paths: our projections that are in it, in the order in which it stacks them.
        pieces: which part of its fused weight each is; None for all of it.
    """

    paths: tuple[str, ...]
    pieces: tuple[Piece | None, ...]

    @classmethod
    def of(cls, parts: Mapping[str, Piece | None]) -> "Adapted":
        """From the pieces of paths."""
        paths = sorted(parts, key=lambda path: parts[path].index if parts[path] else 0)
        return cls(tuple(paths), tuple(parts[path] for path in paths))

    def shape(self, kernels: Mapping, config: FamilyConfig) -> tuple[int, int]:
        """Inputs and outputs of the module; kernels are `layers.projections`."""
        _, (rows, columns) = kernels[self.paths[0]]
        piece = self.pieces[0]
        return rows, columns if piece is None else piece.whole((columns,), config)[0]

    def joined(self, flat: Mapping, config: FamilyConfig) -> Factors:
        """One adapter for the module; of a fused one, that of a single A where all of its projections share it."""
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
            return Factors(np.asarray(first.lora_a), fused(blocks, shares, groups).T, first.scale)
        ends = np.cumsum([one.lora_a.shape[1] for one in own])
        unit = first.lora_b.shape[1] // shares[piece.index]  # outputs of a share
        blocks = [np.zeros((unit * share, ends[-1]), np.float32) for share in shares]
        for one, part, end in zip(own, self.pieces, ends, strict=True):
            place = slice(end - one.lora_a.shape[1], end)
            blocks[part.index][:, place] = one.lora_b.T * (one.scale / first.scale)
        stacked = np.concatenate([one.lora_a for one in own], axis=1)
        return Factors(stacked, fused(blocks, shares, groups).T, first.scale)


def _modules(table: Table, paths: Iterable[str], scheme: str) -> dict[str, Adapted]:
    """The torch modules of projections of ours by their names; a parameter that is no module's weight has none."""
    found: dict[str, dict[str, Piece | None]] = {}
    for path in paths:
        row, name = table.row(f"{path}/kernel", scheme)[0], table.name(f"{path}/kernel", scheme)
        if row.axes == LINEAR and name.endswith(".weight"):
            found.setdefault(name.removesuffix(".weight"), {})[path] = row.piece
    return {name: Adapted.of(parts) for name, parts in found.items()}


def _settings(modules: Mapping[str, Factors], dropout: float, base_model_name: str | None) -> dict:
    """`adapter_config.json` of the adapters of torch modules.

    Targets are the modules' full names: the endings that PEFT's users write ("q_proj") would find the vision tower's
    modules too.
    """
    ranks = {name: factors.lora_a.shape[1] for name, factors in modules.items()}
    alphas = {name: _readable(factors.scale * ranks[name]) for name, factors in modules.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": _readable(dropout),
        "target_modules": sorted(modules),
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: value for module, value in alphas.items() if value != alpha},
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": False,
    }


def _readable(value: float) -> int | float:
    """A float32 as people write it: 10 for 3.3333333 · 3, 0.05 for 0.05000000074."""
    value = float(f"{value:.7g}")
    return int(value) if value.is_integer() else value


def _open(folder: Path) -> TensorFile:
    if (folder / WEIGHTS).is_file():
        return SafetensorsFile(folder / WEIGHTS)
    if (folder / TORCH_WEIGHTS).is_file():
        return BinFile(folder / TORCH_WEIGHTS)
    found = sorted(file.name for file in folder.glob("adapter_model*"))
    raise LVLMError(
        f"no {WEIGHTS} and no {TORCH_WEIGHTS} in {folder}{f', only {found[0]}' if found else ''}; "
        "expected a folder that PEFT saved an adapter to"
    )


def _modules_in_use(table: Table, paths: Iterable[str], file: TensorFile) -> dict[str, Adapted]:
    """All torch modules by name, under the naming scheme that most tensors of the file follow."""
    schemes = [_modules(table, paths, scheme) for scheme in table.schemes]
    return max(schemes, key=lambda modules: sum(_stored(module, file) for module in modules))


def _stored(module: str, file: TensorFile) -> bool:
    return any(f"{_PREFIX}{module}{suffix}" in file.shapes for suffix in _FACTORS.values())


def _targeted(modules: Mapping[str, Adapted], settings: Mapping, file: TensorFile) -> dict[str, Adapted]:
    """The modules that have an adapter; without targets, those of which the file has tensors."""
    if settings["target_modules"] is None:
        return {name: module for name, module in modules.items() if _stored(name, file)}
    found = {name: module for name, module in modules.items() if is_targeted(name, settings)}
    # LLaVA makes its adapters before it loads the tower, and names them by endings that the tower has too.
    decoder = {name: one for name, one in found.items() if one.paths[0].startswith("language_model/")}
    outside = found.keys() - decoder.keys()
    original = any(name.startswith(f"{_PREFIX}model.layers.") for name in file.shapes)
    return found if not original or any(_stored(name, file) for name in outside) else decoder


def _check_head(folder: Path, table: Table, flat: Mapping, file: TensorFile) -> None:
    """Raises an LVLMError if the adapter is for an output layer that this model does not have."""
    if table.tied is None or any(path.startswith(table.tied[0].removesuffix("kernel")) for path in flat):
        return
    names = {table.name(table.tied[0], scheme).removesuffix(".weight") for scheme in table.schemes}
    if any(_stored(name, file) for name in names):
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
