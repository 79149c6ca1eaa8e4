"""LoRA adapters in the format of PEFT: `adapter_config.json` and `adapter_model.safetensors`, out and in.

An adapter's tensors carry the names of the torch modules they belong to, which the model's key table knows:
`base_model.model.` + module + `.lora_A.weight` [r, in] and `.lora_B.weight` [out, r].

Where a torch module holds several projections of ours (`Adapted.pieces`), each gets the whole A and its rows of B. Out
of the projections' own adapters comes one whose A stacks theirs and whose B is zero but for theirs, block by block.
"""

import dataclasses
import json
import math
import os
import re
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
from lvlm_jax.models.layers import LORA_LEAVES, matrices
from lvlm_jax.parallel.mesh import sharding_beside
from lvlm_jax.weights.checkpoint import resolve_checkpoint
from lvlm_jax.weights.plan import Faults
from lvlm_jax.weights.safetensors_file import SafetensorsFile, write_tensors
from lvlm_jax.weights.tables import LINEAR, Piece, Table, flatten, fused, table_for, unflatten

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_SCHEME = "state_dict"  # PEFT names modules as the model in memory does
_PREFIX = "base_model.model."
_FACTORS = {"lora_a": ".lora_A.weight", "lora_b": ".lora_B.weight"}

# Settings of PEFT that either are read below or do not change what a trained adapter computes. Any other one that is
# set is a variety of LoRA, or something besides it, that is not known here.
_KNOWN = frozenset(
    "peft_type task_type base_model_name_or_path revision auto_mapping peft_version inference_mode runtime_config "
    "r lora_alpha lora_dropout rank_pattern alpha_pattern use_rslora target_modules exclude_modules "
    "layers_to_transform fan_in_fan_out bias init_lora_weights eva_config megatron_core qalora_group_size".split()
)
_DEFAULTS = {
    "lora_dropout": 0.0,
    "bias": "none",
    "init_lora_weights": True,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
}
# Other ways of initialising A and B move something of the base weights into them.
_HARMLESS_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")


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
    folder, flat = Path(folder).expanduser(), flatten(params)
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
    with files.whole(folder / CONFIG) as config_file, files.whole(folder / WEIGHTS) as weights_file:
        config_file.write((json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())
        write_tensors(weights_file, entries, fetch)
        # The settings come back behind the tensors: no moment shows the new tensors under the old settings.
        (folder / CONFIG).unlink(missing_ok=True)
    return folder


def load_adapter(folder: str | os.PathLike, params: Mapping, config: FamilyConfig) -> dict:
    """Reads an adapter onto parameters, beside the kernels it belongs to and unmerged.

    Args:
        folder: what PEFT's `save_pretrained`, or `save_adapter`, wrote; or a hub id.
        params: the parameters of the base model.
        config: the model's configuration.

    Returns:
        `params` with the leaves of the adapter, in float32, on the mesh of `params` if there is one.

    Raises:
        LVLMError: files that cannot be read, a kind of adapter that is not supported (named), `params` with an adapter
            already, or tensors that are missing, unexpected, misshapen or not floating-point; all of them at once.
    """
    folder, flat = resolve_checkpoint(folder), flatten(params)
    if present := next((path for path in flat if path.endswith(LORA_LEAVES)), None):
        raise LVLMError(
            f"the parameters hold a LoRA adapter already ({present}); merge it before loading {folder}"
        )
    settings = _read_settings(folder)
    file, kernels = _open(folder), matrices(flat)
    modules = _modules_in_use(table_for(config), kernels, file)
    targeted = {name: module for name, module in modules.items() if _is_targeted(name, settings, file)}
    shapes = {}
    for name, module in targeted.items():
        rank, (rows, columns) = _rank(name, settings), module.shape(kernels, config)
        shapes[f"{_PREFIX}{name}{_FACTORS['lora_a']}"] = (rank, rows)
        shapes[f"{_PREFIX}{name}{_FACTORS['lora_b']}"] = (columns, rank)
    _check_tensors(folder, file, shapes)

    def put(path: str, value: np.ndarray) -> None:
        kernel, _ = kernels[path.rpartition("/")[0]]
        flat[path] = jax.device_put(value.astype(np.float32), sharding_beside(kernel, path, value.shape))

    for name, module in targeted.items():
        lora_a, lora_b = (file.view(f"{_PREFIX}{name}{suffix}") for suffix in _FACTORS.values())
        for path, piece in zip(module.paths, module.pieces, strict=True):
            put(f"{path}/lora_a", lora_a.T)
            put(f"{path}/lora_b", (lora_b if piece is None else piece.take(lora_b, config)).T)
            put(f"{path}/lora_scale", np.asarray(_scale(name, settings)))
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
        """Inputs and outputs of the module; kernels are `layers.matrices`."""
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


def _open(folder: Path) -> SafetensorsFile:
    if not (folder / WEIGHTS).is_file():
        found = sorted(file.name for file in folder.glob("adapter_model*"))
        raise LVLMError(
            f"no {WEIGHTS} in {folder}{f', only {found[0]}' if found else ''}; "
            "expected an adapter that PEFT saved with safetensors (load it with PEFT and save it again)"
        )
    return SafetensorsFile(folder / WEIGHTS)


def _read_settings(folder: Path) -> dict:
    """`adapter_config.json` with what PEFT fills in where a field is absent.

    Raises:
        LVLMError: it is missing, malformed, or asks for more than LoRA on projections.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise LVLMError(f"no {CONFIG} in {folder}; expected a folder that PEFT saved an adapter to")
    settings = {**_DEFAULTS, **files.read_json(path, "adapter configuration", dict)}
    if settings.get("peft_type") != "LORA":
        raise LVLMError(f"{path} is of peft_type {settings.get('peft_type')!r}; only LORA is supported")
    unknown = sorted(name for name, value in settings.items() if value and name not in _KNOWN)
    unknown += ["bias"] * (settings["bias"] != "none")
    unknown += ["init_lora_weights"] * (settings["init_lora_weights"] not in _HARMLESS_INITIAL)
    if unknown:
        values = ", ".join(f"{name} = {json.dumps(settings[name])[:60]}" for name in unknown)
        raise LVLMError(
            f"{path} sets {values}, which is not supported; merge the adapter with PEFT and load the merged model"
        )
    _check_types(path, settings)
    return settings


def _check_types(path: Path, settings: Mapping) -> None:
    """Raises an LVLMError if a setting that is read has a type or a value that PEFT would not write."""
    patterns = [*settings["rank_pattern"].items(), *settings["alpha_pattern"].items()]
    for name, value in [
        (name, settings.get(name)) for name in ("r", "lora_alpha", "lora_dropout")
    ] + patterns:
        if not isinstance(value, int | float) or value < 0 or (value == 0 and name != "lora_dropout"):
            raise LVLMError(f"{path}: {name} is {json.dumps(value)[:60]}; expected a positive number")
    names = [settings[name] for name in ("target_modules", "exclude_modules") if settings[name] is not None]
    for value in names:
        if not isinstance(value, str) and not (
            isinstance(value, list) and all(isinstance(name, str) for name in value)
        ):
            raise LVLMError(
                f"{path}: {json.dumps(value)[:60]} is neither a list of modules nor an expression"
            )
    for expression in [name for name, _ in patterns] + [value for value in names if isinstance(value, str)]:
        try:
            re.compile(expression)
        except re.error as error:
            raise LVLMError(f"{path}: {expression!r} is not a regular expression: {error}") from error


def _modules_in_use(table: Table, paths: Iterable[str], file: SafetensorsFile) -> dict[str, Adapted]:
    """All torch modules by name, under the naming scheme that most tensors of the file follow."""
    schemes = [_modules(table, paths, scheme) for scheme in table.schemes]
    return max(schemes, key=lambda modules: sum(_stored(module, file) for module in modules))


def _stored(module: str, file: SafetensorsFile) -> bool:
    return any(f"{_PREFIX}{module}{suffix}" in file.shapes for suffix in _FACTORS.values())


def _is_targeted(module: str, settings: Mapping, file: SafetensorsFile) -> bool:
    """Whether PEFT wraps a module under these settings; without targets, whether the file has tensors of it."""
    if settings["target_modules"] is None:
        return _stored(module, file)
    if _names(module, settings["exclude_modules"] or ()):
        return False
    layers = settings["layers_to_transform"]
    if isinstance(settings["target_modules"], list) and layers not in (None, []):
        number = re.search(r"\.(\d+)\.", module)
        if number is None or int(number[1]) not in (layers if isinstance(layers, list) else [layers]):
            return False
    return _names(module, settings["target_modules"])


def _names(module: str, wanted: str | list[str]) -> bool:
    """A string is a regular expression for the whole name, a list holds names or their endings."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in wanted)


def _of_pattern(patterns: Mapping, module: str, default):
    """The value of the first pattern that ends the module's name, as PEFT looks it up."""
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, default)


def _rank(module: str, settings: Mapping) -> int:
    return _of_pattern(settings["rank_pattern"], module, settings["r"])


def _scale(module: str, settings: Mapping) -> float:
    alpha, rank = (
        _of_pattern(settings["alpha_pattern"], module, settings["lora_alpha"]),
        _rank(module, settings),
    )
    return alpha / (math.sqrt(rank) if settings["use_rslora"] else rank)


def _check_tensors(folder: Path, file: SafetensorsFile, shapes: Mapping[str, tuple[int, ...]]) -> None:
    faults = Faults()
    for name in sorted(file.shapes.keys() - shapes.keys()):
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
        raise LVLMError(
            f"adapter {folder} adapts no projection of this model; was it trained on another one?"
        )
