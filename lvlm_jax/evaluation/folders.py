"""Finds a benchmark's files in common folder layouts; errors name the missing file and the places searched."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation.question import Data
from lvlm_jax.journal.record import file_hash

# Common places of a benchmark's images, relative to the data folder.
COCO_IMAGES = ("val2014", "coco/val2014", "COCO_2014/val2014", "coco2014/val2014", "COCO/val2014", "images", ".")
COCO_LINK = "https://cocodataset.org/#download (2014 Val images: val2014.zip)"
GQA_IMAGES = ("gqa/images", "GQA/images", "images", "gqa", "GQA", ".")


def chosen_groups(data: Data, known: Sequence[str], what: str, kind: str = "group") -> tuple[str, ...]:
    """The groups that `data` names, in the order of `known`; all if it names none.

    Raises:
        LVLMError: `data` names an unknown group; the message lists the known groups.
    """
    for name in data.groups:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? There are" if close else "there are"
            raise LVLMError(f"{what} has no {kind} {name!r}; {hint} {', '.join(known)}")
    return tuple(group for group in known if not data.groups or group in data.groups)


def data_folder(data: Data) -> Path:
    """The path of `data.folder`. Raises `LVLMError` if it is not a folder."""
    folder = files.expand(data.folder)
    if not folder.is_dir():
        raise LVLMError(f"data folder {str(folder)!r} is not a folder; give the one with the benchmark")
    return folder


def find(data: Data, names: Sequence[str], places: Iterable[str], what: str, optional: bool = False) -> Path | None:
    """The file called one of `names` in one of `places` below the data folder.

    Raises:
        LVLMError: there is no such file (unless `optional`), or several such files have different contents.
    """
    folder, places = data_folder(data), list(places)
    paths = [folder / place / name for place in places for name in names if (folder / place / name).is_file()]
    if not paths:
        if optional:
            return None
        raise LVLMError(
            f"{what} is missing: no file {' or '.join(names)} in {str(folder)!r} "
            f"(looked in {', '.join(place if place != '.' else 'the folder itself' for place in places)})"
        )
    if len({path.resolve() for path in paths}) > 1 and len({file_hash(path) for path in paths}) > 1:
        raise LVLMError(
            f"{what}: {' and '.join(repr(str(path)) for path in paths)} differ; name one of them, or give its own "
            "folder"
        )
    return paths[0]


def locate_images(data: Data, names: Sequence[str], places: Sequence[str], needed: bool, what: str) -> dict[str, Path]:
    """Image name -> path. The folder is `data.image_folder`, or the first of `places` that contains the first image.

    If images are `needed`, an `LVLMError` names the first missing one. If not, no image is looked for except the first,
    and paths are bare names if no folder contains it: scores need no images.
    """
    distinct = list(dict.fromkeys(names))
    if data.image_folder is not None:
        folders = [files.expand(data.image_folder)]
        if not folders[0].is_dir():
            raise LVLMError(f"image folder {str(folders[0])!r} is not a folder; check the path")
    else:
        folders = [data_folder(data) / place for place in places]
    chosen = next((folder for folder in folders if distinct and (folder / distinct[0]).is_file()), None)
    if not needed:
        return {name: (chosen / name if chosen else Path(name)) for name in distinct}
    if chosen is None:
        searched = ", ".join(repr(str(folder)) for folder in folders)
        raise LVLMError(f"image {distinct[0]!r} of {what} is missing; looked in {searched}")
    paths = {name: chosen / name for name in distinct}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        raise LVLMError(
            f"{len(missing)} of {len(distinct)} images of {what} are missing in {str(chosen)!r}, first {missing[0]!r}"
        )
    return paths
