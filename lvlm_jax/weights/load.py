"""Streaming load: Hugging Face files to parameters on devices, one tensor at a time.

Peak host memory is the parameters that live on the host plus one tensor: files are mapped, a tensor's pages are given
back as soon as it is on its device, and of a sharded tensor only the slices that a device holds are read.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from lvlm_jax import models
from lvlm_jax.errors import LVLMError
from lvlm_jax.weights import original
from lvlm_jax.weights.bin_file import BinFile
from lvlm_jax.weights.checkpoint import open_files, read_json, weight_files
from lvlm_jax.weights.families import family
from lvlm_jax.weights.safetensors_file import SafetensorsFile
from lvlm_jax.weights.tables import Axes, Table, flatten, inverse, permuted, unflatten

Place = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]

_FLOATS = tuple(np.dtype(kind) for kind in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))
_LISTED = 10  # tensors of each kind that an error names
_CHUNK = 1 << 24  # elements compared at a time


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter comes from: a tensor of an open file, its axes, and the rows to append to it."""

    file: SafetensorsFile | BinFile
    name: str
    axes: Axes
    appended: int = 0


def load_parameters(
    folder_or_files: str | os.PathLike | Sequence[str | os.PathLike],
    config,
    dtype=None,
    sharding: jax.sharding.Sharding | Place | Mapping | None = None,
    vision_tower: str | os.PathLike | None = None,
) -> dict:
    """Loads a checkpoint into the parameter tree of a configuration.

    Args:
        folder_or_files: a checkpoint folder, or the weight files themselves.
        config: the model's configuration, for example a `LlavaConfig`.
        dtype: of the parameters; None keeps what the files hold.
        sharding: where parameters live: one sharding for all, a nested dict of shardings shaped like the tree, or a
            function of (path, shape) such as ("language_model/norm/scale", (4096,)). None: the default device,
            uncommitted.
        vision_tower: the CLIP checkpoint of an original checkpoint that has no tower inside; one given here is used
            even if there is a tower inside.

    Returns:
        A nested dict of arrays. Parameters that no chosen feature layer reads (the tower's last layers) are left out
        where the checkpoint lacks them.

    Raises:
        LVLMError: a file cannot be read, or tensors are missing, unexpected, misshapen or not floating-point; all of
            them are reported at once.
    """
    expected = {path: tuple(leaf.shape) for path, leaf in flatten(models.abstract_parameters(config)).items()}
    sources = _plan(folder_or_files, config, expected, vision_tower)
    place = _placement(sharding)
    return unflatten(
        {
            path: _load(source, expected[path], dtype and np.dtype(dtype), place(path, expected[path]))
            for path, source in sources.items()
        }
    )


def stored_dtype(folder: str | os.PathLike) -> np.dtype:
    """The dtype that most tensors of a checkpoint folder have.

    Raises:
        LVLMError: a file cannot be read.
    """
    dtypes = [dtype for file in open_files(weight_files(Path(folder))) for dtype in file.dtypes.values()]
    return max(set(dtypes), key=dtypes.count)


def _plan(folder_or_files, config, expected: dict[str, tuple[int, ...]], vision_tower) -> dict[str, Source]:
    """Matches every tensor of the files with one parameter, reading headers only."""
    table = family(config.model_type).table
    files, tower, vocabulary = _open(folder_or_files, vision_tower)
    head, embedding = table.tied or (None, None)
    tied_head = head if head is not None and head not in expected else None
    paths = [*expected, tied_head] if tied_head else list(expected)

    faults = _Faults()
    sources: dict[str, Source] = {}
    main_schemes = [scheme for scheme in table.schemes if not scheme.startswith("clip")]
    tower_schemes = [scheme for scheme in table.schemes if scheme.startswith("clip")]
    for group, schemes in ((files, main_schemes), (tower, tower_schemes)):
        by_name: dict[str, str] = {}
        for scheme in schemes:
            by_name |= table.names(paths, scheme)
        for file in group:
            for name in file.shapes:
                path = by_name.get(name)
                if tower and group is files and path is not None and path.startswith("vision_tower/"):
                    continue  # a tower was named explicitly
                if path is None:
                    if not table.is_ignored(name):
                        faults.unexpected.append(name)
                elif path in sources:
                    faults.repeated.append(f"{name} and {sources[path].name}")
                else:
                    sources[path] = Source(file, name, table.row(path)[0].axes)

    tied_source = sources.pop(tied_head, None)
    for path, source in sources.items():
        shape = permuted(source.file.shapes[source.name], source.axes)
        if vocabulary and path in table.vocabulary:
            sources[path] = source = dataclasses.replace(source, appended=_appended(table, path, shape, expected[path], vocabulary))
            shape = permuted(_hf_shape(source), source.axes)
        if shape != expected[path]:
            wanted = permuted(expected[path], inverse(source.axes))
            faults.misshapen.append(f"{source.name} {list(source.file.shapes[source.name])} instead of {list(wanted)}")
        elif source.file.dtypes[source.name] not in _FLOATS:
            faults.not_floating.append(f"{source.name} {source.file.dtypes[source.name]}")
    optional = tuple(f"{prefix}/" for prefix in family(config.model_type).optional(config))
    scheme = _scheme_in_use(table, expected, {name for file in files for name in file.shapes})
    for path in expected:
        if path not in sources and not path.startswith(optional):
            faults.missing.append(table.name(path, scheme) or table.name(path, "clip") or path)
    where = folder_or_files if isinstance(folder_or_files, str | os.PathLike) else ", ".join(map(str, folder_or_files))
    faults.check(where)
    if tied_source and not _equal(tied_source.file.view(tied_source.name), _view(sources[embedding])):
        raise LVLMError(
            f"{where}: config.json ties the output layer to the embedding, but {tied_source.name} differs from "
            f"{sources[embedding].name}; set tie_word_embeddings to false in config.json, or remove the tensor"
        )
    return {path: sources[path] for path in expected if path in sources}
