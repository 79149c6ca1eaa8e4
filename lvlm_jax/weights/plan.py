"""Matches a checkpoint's tensors with parameters, using only file headers: exactly one row per tensor."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from lvlm_jax import models
from lvlm_jax.errors import LONGEST, LVLMError
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.weights.bin_file import BinFile
from lvlm_jax.weights.gguf import GgufFile
from lvlm_jax.weights.original import append_rows
from lvlm_jax.weights.safetensors_file import SafetensorsFile
from lvlm_jax.weights.tables import Axes, Piece, Row, Table, flatten, inverse, permute, table_for

TensorFile = SafetensorsFile | BinFile | GgufFile

_FLOATS = tuple(np.dtype(kind) for kind in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
_CHUNK = 1 << 24  # elements compared at a time


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensor from which a parameter is loaded.

    Attributes:
        axes: the permutation that gives our array.
        appended: number of vocabulary rows to append to the stored ones.
        piece: the part of a fused tensor, with the configuration that determines its place; None for a whole tensor.
    """

    file: TensorFile
    name: str
    axes: Axes
    appended: int = 0
    piece: tuple[Piece, FamilyConfig] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The parameter's shape, in our order of axes."""
        shape = self.file.shapes[self.name]
        if self.appended:
            shape = (shape[0] + self.appended, *shape[1:])
        if self.piece:
            shape = self.piece[0].shape(shape, self.piece[1])
        return permute(shape, self.axes)

    def view(self) -> np.ndarray:
        """The parameter in our order of axes: a view of the file unless rows are appended."""
        tensor = self.file.view(self.name)
        complete = append_rows(tensor, self.appended) if self.appended else tensor
        complete = self.piece[0].take(complete, self.piece[1]) if self.piece else complete
        return complete if self.axes is None else complete.transpose(self.axes)


class Faults:
    """Collects what is wrong with a set of tensors, so that one error reports all of it."""

    def __init__(self):
        self.tensors: dict[str, list[str]] = {}

    def add(self, kind: str, what: str) -> None:
        """Records a faulty tensor; a fused one is recorded once, not once per part."""
        tensors = self.tensors.setdefault(kind, [])
        if what not in tensors:
            tensors.append(what)

    def check(self, where: Any, what: str = "its configuration") -> None:
        """Raises an LVLMError of one line if anything was recorded: the tensors of `where` do not fit `what`."""
        if not self.tensors:
            return
        counts = dict.fromkeys(self.tensors, 0)

        def message() -> str:
            parts = [_count_text(kind, tensors, counts[kind]) for kind, tensors in self.tensors.items()]
            return f"the tensors of {where} do not fit {what}: {'; '.join(parts)}"

        # The message names one tensor of each kind before the second of any, as far as it has room.
        for place in range(max(map(len, self.tensors.values()))):
            for kind, tensors in self.tensors.items():
                if counts[kind] == place < len(tensors):
                    counts[kind] += 1
                    if len(message()) > LONGEST:
                        counts[kind] -= 1
        raise LVLMError(message())


def check_shapes(params: Mapping, config: FamilyConfig) -> None:
    """Raises an `LVLMError` if shapes differ from those of a configuration; leaves of adapters and int8 are skipped.

    Raises:
        LVLMError: some parameters are misshapen; the message names them.
    """
    faults, expected = Faults(), flatten(models.abstract_parameters(config))
    for path, leaf in flatten(params).items():
        if path in expected and leaf.shape != expected[path].shape:
            faults.add("misshapen", f"{path} {list(leaf.shape)} instead of {list(expected[path].shape)}")
    faults.check("these parameters")


def _count_text(kind: str, tensors: Sequence[str], examples: int) -> str:
    """How many tensors have a kind of fault, with the first names."""
    names = [*tensors[:examples], "..."] if examples < len(tensors) else tensors
    return f"{len(tensors)} {kind}" + (f": {', '.join(names)}" if examples else "")


def plan(
    where: Any,
    config: FamilyConfig,
    expected: Mapping[str, tuple[int, ...]],
    files: Sequence[TensorFile],
    tower: Sequence[TensorFile] = (),
) -> dict[str, Source]:
    """Finds the source of every parameter.

    Args:
        where: name of the checkpoint in errors.
        config: the model's configuration.
        expected: parameter path -> shape.
        files: the checkpoint's open files.
        tower: the open files of a separate vision tower. If there are any, a tower inside `files` is ignored.

    Returns:
        parameter path -> source. Optional parameters that are not stored are left out.

    Raises:
        LVLMError: tensors are missing, unexpected, stored twice, misshapen or not floating-point, or a tied output
            layer is stored and differs from the embedding.
    """
    table, faults = table_for(config), Faults()
    tied, embedding = table.tied if table.tied and table.tied[0] not in expected else (None, None)
    paths = [*expected, tied] if tied else [*expected]
    sources: dict[str, Source] = {}
    _match(table, config, paths, files, sources, faults, passed_over="vision_tower/" if tower else None)
    if tower:
        inside = [path for path in paths if path.startswith("vision_tower/")]
        _match(table.tower, config, inside, tower, sources, faults)

    tied_source = sources.pop(tied, None)
    if tied_source:  # a file may have a tied matrix under one name only
        sources.setdefault(embedding, dataclasses.replace(tied_source, axes=None))
    scheme = scheme_in_use(table, expected, files)
    for path, shape in expected.items():
        if path in sources:
            if scheme == "original" and path in table.vocabulary:
                sources[path] = _append_token_rows(sources[path], config.image_token_id, shape)
            _check_tensor(sources[path], shape, faults)
        elif not path.startswith(table.optional(config)):
            faults.add("missing", table.name(path, scheme))
    faults.check(where)
    if tied_source and not _equal(tied_source.file.view(tied_source.name), sources[embedding].view()):
        raise LVLMError(
            f"the configuration of {where} ties the output layer to the embedding, but {tied_source.name} differs "
            f"from {sources[embedding].name}: set tie_word_embeddings to false in config.json, or remove the tensor"
        )
    return sources


def plan_some(
    config: FamilyConfig, expected: Mapping[str, tuple[int, ...]], file: TensorFile, faults: Faults
) -> dict[str, Source]:
    """The sources of those parameters that a file has; errors in its tensors go to `faults`."""
    table, sources = table_for(config), {}
    _match(table, config, [*expected], [file], sources, faults)
    for path, source in sources.items():
        if "original" in table.schemes and path in table.vocabulary:
            sources[path] = source = _append_token_rows(source, config.image_token_id, expected[path])
        _check_tensor(source, expected[path], faults)
    return sources


def scheme_in_use(table: Table, paths: Mapping[str, Any], files: Sequence[TensorFile]) -> str:
    """The naming scheme of most tensors of the files."""
    names = {name for file in files for name in file.shapes}
    return max(table.schemes, key=lambda scheme: len(names & table.names(paths, scheme).keys()))


def _match(
    table: Table, config: FamilyConfig, paths, files, sources: dict[str, Source], faults: Faults, passed_over=None
) -> None:
    """Adds the source of every parameter in `files`, under any naming scheme, except paths under `passed_over`."""
    by_name: dict[str, list[tuple[str, Row]]] = {}
    for scheme in table.schemes:
        for name, parameter_paths in table.names(paths, scheme).items():
            by_name[name] = [(path, table.row(path, scheme)[0]) for path in parameter_paths]
    for file in files:
        for name in file.shapes:
            if name not in by_name and not table.is_ignored(name):
                faults.add("unexpected", name)
            for path, row in by_name.get(name, ()):
                if passed_over and path.startswith(passed_over):
                    continue
                if path in sources:
                    faults.add("stored twice", f"{name} and {sources[path].name}")
                    continue
                sources[path] = Source(file, name, row.axes, piece=row.piece and (row.piece, config))


def _append_token_rows(source: Source, image_token_id: int, shape: tuple[int, ...]) -> Source:
    """Appends rows for added tokens if the stored vocabulary ends just before the image token."""
    rows = (source.file.shapes[source.name] or (0,))[0]
    num_rows = permute(shape, inverse(source.axes))[0]
    return dataclasses.replace(source, appended=num_rows - rows) if rows == image_token_id < num_rows else source


def _check_tensor(source: Source, shape: tuple[int, ...], faults: Faults) -> None:
    if source.shape != shape:
        expected = permute(shape, inverse(source.axes))
        if source.piece:
            expected = source.piece[0].whole(expected, source.piece[1])
        stored_shape = list(source.file.shapes[source.name])
        faults.add("misshapen", f"{source.name} {stored_shape} instead of {list(expected)}")
    elif (dtype := source.file.dtypes[source.name]) not in _FLOATS:
        faults.add("not floating-point", f"{source.name} {dtype}")


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    rows = max(1, _CHUNK // max(1, a.shape[-1])) if a.ndim else 1
    return a.shape == b.shape and all(
        np.array_equal(a[i : i + rows], b[i : i + rows]) for i in range(0, a.shape[0], rows)
    )
