"""Checks that every tensor of a checkpoint has its place in the model, from the files' headers or from the index."""

import math
from collections.abc import Collection
from pathlib import Path

from lvlm_jax import files, models
from lvlm_jax.errors import LVLMError
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.verification.results import FAILED, LEFT_OUT, PASSED, Result, compared
from lvlm_jax.weights import load
from lvlm_jax.weights.plan import plan
from lvlm_jax.weights.save import stored_shapes
from lvlm_jax.weights.tables import flatten, table_for

NAME = "tensors"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def has_weights(folder: Path) -> bool:
    """Whether a folder contains weights, complete or not."""
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))


def check(folder: Path, config: FamilyConfig, vision_tower: str | None = None) -> Result:
    """Compares the tensors in a folder with those of its configuration."""
    parameters = models.abstract_parameters(config)
    if not has_weights(folder):
        index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
        return of_index(index, config, parameters) if index else Result(NAME, LEFT_OUT, "neither weights nor an index")
    try:
        files, tower = load.open_checkpoint(folder, vision_tower)
        plan(folder, config, {path: leaf.shape for path, leaf in flatten(parameters).items()}, files, tower)
    except LVLMError as error:
        return Result(NAME, FAILED, str(error))
    count = sum(len(file.shapes) for file in (*files, *tower))
    kinds = sorted({str(dtype) for file in (*files, *tower) for dtype in file.dtypes.values()})
    size = sum(leaf.size for leaf in flatten(parameters).values())
    words = f"{count} tensors of {', '.join(kinds)}: each has its place and its shape; {size / 1e9:.3g} billion numbers"
    return Result(NAME, PASSED, words, {"tensors": count, "dtypes": kinds, "parameters": size})


def of_index(index: Path, config: FamilyConfig, parameters: dict | None = None) -> Result:
    """Compares the names in an index with those of a configuration, and the total size.

    Args:
        index: an index of weight files.
        parameters: the result of `models.abstract_parameters`, if known.
    """
    parameters = models.abstract_parameters(config) if parameters is None else parameters
    read = files.read_json(index, "index of weights", dict)
    names = set(read.get("weight_map") or ())
    scheme, shapes, missing, unexpected = compare_names(names, config, parameters)
    faults = [f"{len(tensors)} {kind}: {', '.join(tensors[:3])}" for kind, tensors in _by_kind(missing, unexpected)]
    size = sum(math.prod(shapes[name]) for name in names & shapes.keys())
    stated = (read.get("metadata") or {}).get("total_size")
    words = f"{len(names)} names of {index.name} (scheme {scheme}), each with its place; shapes are not in it"
    figures = {"tensors": len(names), "scheme": scheme, "parameters": size, "total_size": stated}
    if not faults and stated in {size * width for width in _BYTES.values()}:
        words = words.replace("shapes are not in it", f"its total_size, {stated} bytes, is that of our shapes")
    return compared(NAME, faults, words, **figures)


def compare_names(
    names: Collection[str], config: FamilyConfig, parameters: dict
) -> tuple[str, dict[str, tuple[int, ...]], list[str], list[str]]:
    """The naming scheme that most names follow, its shapes, and the missing and the unexpected names."""
    table = table_for(config)
    by_scheme = {scheme: stored_shapes(config, scheme, parameters) for scheme in table.schemes}
    scheme = max(by_scheme, key=lambda one: len(by_scheme[one].keys() & set(names)))
    shapes = by_scheme[scheme]
    elsewhere = ("vision_tower/",) if scheme == "original" else ()  # the authors' LLaVA has a separate tower
    optional = [path for path in flatten(parameters) if path.startswith((*table.optional(config), *elsewhere))]
    missing = sorted(shapes.keys() - set(names) - table.names(optional, scheme).keys())
    return scheme, shapes, missing, sorted(name for name in {*names} - {*shapes} if not table.is_ignored(name))


def _by_kind(missing: Collection[str], unexpected: Collection[str]) -> list[tuple[str, list[str]]]:
    return [(kind, list(tensors)) for kind, tensors in (("missing", missing), ("unexpected", unexpected)) if tensors]
