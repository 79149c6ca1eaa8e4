"""Finding a benchmark's files in the folders people have; what is missing is named with where it was looked for."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation.question import Data
from lvlm_jax.journal.record import file_hash

# Where people keep the pictures of a benchmark, seen from the folder they name.
COCO_IMAGES = ("val2014", "coco/val2014", "COCO_2014/val2014", "coco2014/val2014", "COCO/val2014", "images", ".")
COCO_LINK = "https://cocodataset.org/#download (2014 Val images: val2014.zip)"
GQA_IMAGES = ("gqa/images", "GQA/images", "images", "gqa", "GQA", ".")


def chosen_groups(data: Data, known: Sequence[str], what: str, kind: str = "group") -> tuple[str, ...]:
    """The groups that `data` asks for, in the order of `known`; all where it asks for none.

    Raises:
        LVLMError: one that is not known; the message names those that are.
    """
    for name in data.groups:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? There are" if close else "there are"
            raise LVLMError(f"{what} has no {kind} {name!r}; {hint} {', '.join(known)}")
    return tuple(group for group in known if not data.groups or group in data.groups)


def data_folder(data: Data) -> Path:
    """`data.folder` as an existing folder."""
    folder = files.expand(data.folder)
    if not folder.is_dir():
        raise LVLMError(f"data folder {str(folder)!r} is not a folder; give the one that holds the benchmark")
    return folder


def find(data: Data, names: Sequence[str], places: Iterable[str], what: str, optional: bool = False) -> Path | None:
    """The file called one of `names` in one of `places` below the data folder.

    `LVLMError` when there is none (unless `optional`), or when several with different contents are found.
    """
    folder, places = data_folder(data), list(places)
    found = [folder / place / name for place in places for name in names if (folder / place / name).is_file()]
    if not found:
        if optional:
            return None
        raise LVLMError(
            f"{what} is missing: no file {' or '.join(names)} in {str(folder)!r} "
            f"(looked in {', '.join(place if place != '.' else 'the folder itself' for place in places)})"
        )
    if len({path.resolve() for path in found}) > 1 and len({file_hash(path) for path in found}) > 1:
        raise LVLMError(
            f"{what}: {' and '.join(repr(str(path)) for path in found)} differ; "
            "name the one that is meant, or give its own folder"
        )
    return found[0]


def locate_images(data: Data, names: Sequence[str], places: Sequence[str], needed: bool, what: str) -> dict[str, Path]:
    """Image name -> path. The folder is `data.image_folder`, or the first of `places` that holds the first image.

    With `needed`, every image must be there, else `LVLMError` names the first that is not. Without, a name that is
    nowhere stays a bare name: scores need no pictures.
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
        where = ", ".join(repr(str(folder)) for folder in folders)
        raise LVLMError(f"image {distinct[0]!r} of {what} is missing; looked in {where}")
    paths = {name: chosen / name for name in distinct}
    missing = [name for name, path in paths.items() if not path.is_file()]
    if missing:
        raise LVLMError(
            f"{len(missing)} of {len(distinct)} images of {what} are missing in {str(chosen)!r}, first {missing[0]!r}"
        )
    return paths
