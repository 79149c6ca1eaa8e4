"""`Question` and `Data`: the questions of every benchmark in one form, and the places of its files."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        id: the id in the benchmark's file; unique within its group.
        images: files, or encoded images if the benchmark's tables contain them. In `text`, each `<image>` is the place
            of the next one; without placeholders, the images come first.
        text: the question in the file, without the protocol's suffix.
        label: the right answer in the benchmark's own words; None if there is none to compare with.
        group: split, subtask or kind ("random", "existence", ...).
        extra: further data for the benchmark's scorer.
        names: names of the images, if file names are ambiguous (in CO3D, every folder numbers its frames from 1); empty
            for the file names.
    """

    id: int | str
    images: tuple[Path | bytes, ...]
    text: str
    label: str | None
    group: str
    extra: Mapping = dataclasses.field(default_factory=dict, compare=False)
    names: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """Group and id as text, because answer files write ids as numbers or as strings."""
        return self.group, str(self.id)

    @property
    def unit(self) -> str:
        """Name of the image or images; the bootstrap resamples these units."""
        return "+".join(self.image_names)

    @property
    def image_names(self) -> tuple[str, ...]:
        """Names of the images in answer files and records."""
        return self.names or tuple(map(image_name, self.images))


def image_name(image: Path | bytes) -> str:
    """The name of a file; for an encoded image, the beginning of its SHA-256."""
    return hashlib.sha256(image).hexdigest()[:16] if isinstance(image, bytes) else image.name


def listed_name(image: Path | bytes) -> str:
    """The path of an image in a question file ("vase/64_439/frame001.jpg"); otherwise as `image_name`."""
    return image_name(image) if isinstance(image, bytes) or image.is_absolute() else image.as_posix()


@dataclasses.dataclass(frozen=True)
class Data:
    """Where a benchmark's files are. Only `folder` is always needed; the other fields take precedence over files found
    in it.

    Attributes:
        folder: the usual folder (of COCO, of MME, ...), searched in the places that each benchmark lists.
        question_file: one question file, used instead of those in the folder (POPE, MIHBench, multiple choice).
        image_folder: folder of the images.
        image_list: for CHAIR: file with one image name or id per line; it determines the images and their order.
        synonyms: for CHAIR: the user's synonym list, one category per line, its words separated by commas.
        chair_pickle: for CHAIR: `chair.pkl` with the ground truth of all images.
        source: for POPE: "coco", "aokvqa" or "gqa".
        groups: only these splits or subtasks; empty for those of the protocol.
        only: for CHAIR: only these image ids (rescoring takes them from the captions).
        limit: how many of the first questions of every group to use; None for all.
        matching: for AMBER: "spacy" for soft matching with spaCy's large English vectors, as in the official scorer,
            "exact", or "auto" for "spacy" if it is installed.
    """

    folder: Path
    question_file: Path | None = None
    image_folder: Path | None = None
    image_list: Path | None = None
    synonyms: Path | None = None
    chair_pickle: Path | None = None
    source: str = "coco"
    groups: tuple[str, ...] = ()
    only: tuple[int, ...] | None = None
    matching: str = "auto"
    limit: int | None = None

    def limited(self, questions: Sequence[Question]) -> list[Question]:
        """The questions within the limit."""
        counts: Counter = Counter()
        limited = []
        for question in questions:
            counts[question.group] += 1
            if self.limit is None or counts[question.group] <= self.limit:
                limited.append(question)
        return limited
