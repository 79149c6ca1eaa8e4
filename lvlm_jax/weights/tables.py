"""Key tables: the mapping between Hugging Face tensor names and our parameter paths.

A family's table has one row per kind of tensor, in which `{i}` stands for the layer number, and one entry per naming
scheme with the prefix of each part of the model. Loading and saving use the same rows, so everything that can be loaded
can be saved. The table of model type `x` is `TABLE` in the file `weights/x.py`.
"""

import dataclasses
import importlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from lvlm_jax.models.family import FamilyConfig

Axes = tuple[int, ...] | None

SAME: Axes = None
LINEAR: Axes = (1, 0)  # torch has [out, in], we have [in, out]
CONVOLUTION: Axes = (2, 3, 1, 0)  # torch has [out, in, height, width], we have [height, width, in, out]

_NUMBERED = re.compile(r"layers_(\d+)")


def inverse(axes: Axes) -> Axes:
    """The inverse permutation of `axes`."""
    return axes and tuple(axes.index(axis) for axis in range(len(axes)))


def permute(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
    """Permutes a shape. A shape of another rank is returned unchanged, and reported later as misshapen."""
    return shape if axes is None or len(axes) != len(shape) else tuple(shape[axis] for axis in axes)


@dataclasses.dataclass(frozen=True)
class Piece:
    """The part of a fused tensor that a row describes, along the first axis of the Hugging Face tensor.

    That axis is viewed as [groups, sum(shares), unit], and the row is `shares[index]` of each group. Fused q, k and v
    side by side are one group of shares (1, 1, 1); InternLM2 has one group of shares (query heads per key head, 1, 1)
    for every key head.

    Attributes:
        index: the index in `shares`.
        shares: returns the shares for a configuration.
        groups: returns the number of groups for a configuration.
    """

    index: int
    shares: Callable[[FamilyConfig], tuple[int, ...]]
    groups: Callable[[FamilyConfig], int] = lambda config: 1

    def take(self, whole: np.ndarray, config: FamilyConfig) -> np.ndarray:
        """The piece of a fused tensor; a view if it is contiguous, as with a single group."""
        shares, groups = self.shares(config), self.groups(config)
        start, size = sum(shares[: self.index]), shares[self.index]
        split = whole.reshape(groups, sum(shares), -1, *whole.shape[1:])
        return split[:, start : start + size].reshape(-1, *whole.shape[1:])

    def shape(self, whole: tuple[int, ...], config: FamilyConfig) -> tuple[int, ...]:
        """The shape of the piece of a tensor of shape `whole`; () if it cannot be split this way."""
        shares = self.shares(config)
        if not whole or whole[0] % (self.groups(config) * sum(shares)):
            return ()
        return whole[0] // sum(shares) * shares[self.index], *whole[1:]

    def whole(self, shape: tuple[int, ...], config: FamilyConfig) -> tuple[int, ...]:
        """The shape of the fused tensor whose piece has this shape: the inverse of `shape`."""
        shares = self.shares(config)
        return shape[0] // shares[self.index] * sum(shares), *shape[1:]


def fuse(pieces: Sequence[np.ndarray], shares: tuple[int, ...], groups: int) -> np.ndarray:
    """The fused tensor of all its pieces, in the order of `shares`: the inverse of `Piece.take`."""
    rest = pieces[0].shape[1:]
    split = [piece.reshape(groups, share, -1, *rest) for piece, share in zip(pieces, shares, strict=True)]
    return np.concatenate(split, axis=1).reshape(-1, *rest)


@dataclasses.dataclass(frozen=True)
class Row:
    """One kind of tensor.

    Attributes:
        part: the part of the model; each scheme defines its prefix.
        path: our parameter path, keys joined by "/".
        name: the tensor's name after the prefix.
        axes: the permutation of the Hugging Face tensor's axes that gives our array.
        piece: the part of a fused tensor that this row describes; other rows describe the rest. None: a whole tensor.
    """

    part: str
    path: str
    name: str
    axes: Axes = SAME
    piece: Piece | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """All rows of a model family, and the naming schemes of its checkpoints.

    Attributes:
        schemes: scheme name -> part -> prefix.
        ignored: regular expressions of names that are not parameters (buffers of old versions).
        tied: the path that is absent if embeddings are tied, and the path whose parameter is used instead.
        vocabulary: paths whose first Hugging Face axis counts tokens.
        optional: returns the path prefixes that a checkpoint may lack under a configuration, because nothing reads
            them.
        tower: the table of a vision tower that is stored as a separate checkpoint.
        own: scheme name -> rows that replace those of `rows`: with other names, other axes, or fused.

    Raises:
        ValueError: under one scheme two rows claim the same path, or the same name of the same part, or the rows of a
            fused tensor are incomplete; or a scheme has its own row for a path that is not in `rows`.
    """

    rows: tuple[Row, ...]
    schemes: Mapping[str, Mapping[str, str]]
    ignored: tuple[str, ...] = ()
    tied: tuple[str, str] | None = None
    vocabulary: tuple[str, ...] = ()
    optional: Callable[[FamilyConfig], tuple[str, ...]] = lambda config: ()
    tower: "Table | None" = None
    own: Mapping[str, tuple[Row, ...]] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        common = _by_path(self.rows)
        by_path = {scheme: common | _by_path(self.own.get(scheme, ())) for scheme in {*self.schemes, *self.own}}
        for rows in (common, *by_path.values()):
            if rows.keys() != common.keys():
                raise ValueError("a scheme of a key table has a row of its own for a path without a common one")
            _check_names(rows.values())
        object.__setattr__(self, "_by_path", MappingProxyType(by_path))
        object.__setattr__(self, "_ignored", re.compile("|".join(self.ignored or ("(?!)",))))

    def row(self, path: str, scheme: str) -> tuple[Row, str]:
        """The row of a parameter path under a scheme, and its layer number ("" if the row has none).

        Raises:
            KeyError: no row describes the path.
        """
        numbers = _NUMBERED.findall(path)
        return self._by_path[scheme][_NUMBERED.sub("layers_{i}", path)], (numbers or [""])[0]

    def name(self, path: str, scheme: str) -> str:
        """The tensor name of a parameter path under a scheme."""
        row, number = self.row(path, scheme)
        return self.schemes[scheme][row.part] + row.name.replace("{i}", number)

    def names(self, paths: Iterable[str], scheme: str) -> dict[str, list[str]]:
        """Tensor name -> parameter paths (several for a fused tensor), of all `paths` under one scheme."""
        paths_by_name: dict[str, list[str]] = {}
        for path in paths:
            paths_by_name.setdefault(self.name(path, scheme), []).append(path)
        return paths_by_name

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor of this name is not a parameter."""
        return self._ignored.search(name) is not None


def _by_path(rows: Iterable[Row]) -> dict[str, Row]:
    """The rows by path."""
    rows = tuple(rows)
    by_path = {row.path: row for row in rows}
    if len(by_path) != len(rows):
        raise ValueError("two rows of a key table claim the same tensor")
    return by_path


def _check_names(rows: Iterable[Row]) -> None:
    """Checks that every tensor has one row, or the rows of all its pieces."""
    indices: dict[tuple[str, str], list[int | None]] = {}
    for row in rows:
        indices.setdefault((row.part, row.name), []).append(row.piece and row.piece.index)
    for (_, name), pieces in indices.items():
        if len(pieces) != len(set(pieces)) or (None in pieces and len(pieces) > 1):
            raise ValueError(f"two rows of a key table claim the same tensor ({name})")
        if pieces != [None] and sorted(pieces) != list(range(len(pieces))):
            raise ValueError(f"the rows of the fused tensor {name} do not make it whole")


def table_for(config: FamilyConfig) -> Table:
    """The key table of a configuration's model family."""
    return importlib.import_module(f"lvlm_jax.weights.{config.model_type.replace('-', '_')}").TABLE


def flatten(tree: Mapping) -> dict[str, object]:
    """Nested dict -> {"a/b/c": leaf}, in the tree's order."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}/{path}": leaf for path, leaf in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def unflatten(flat: Mapping[str, object]) -> dict:
    """{"a/b/c": leaf} -> nested dict."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree
