"""What every benchmark reads into: questions, and where the files of a benchmark lie."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Attributes:
        id: as the benchmark's file gives it; unique within its group.
        images: files, or encoded pictures where the benchmark ships them inside its tables. In `text`, each
          `<image>` is the place of the next one; without any, the images come first.
        text: the question as the file has it, without the protocol's suffix.
        label: the right answer in the benchmark's own words; None where there is none to compare with.
        group: split, subtask or kind ("random", "existence", ...).
        extra: what the benchmark's scorer needs besides.
        names: of the images, where a file name alone does not tell them apart (CO3D's frames are numbered in every
          folder anew); empty for the file names.
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
        """Group and id as text, since answer files write one id now as a number, now as a string."""
        return self.group, str(self.id)

    @property
    def unit(self) -> str:
        """Name of the image, or of the images together: what a bootstrap resamples."""
        return "+".join(self.image_names)

    @property
    def image_names(self) -> tuple[str, ...]:
        """What the images are called in answer files and records."""
        return self.names or tuple(map(image_name, self.images))


def image_name(image: Path | bytes) -> str:
    """A file's name; for an encoded picture the beginning of its SHA-256."""
    return hashlib.sha256(image).hexdigest()[:16] if isinstance(image, bytes) else image.name


def listed_name(image: Path | bytes) -> str:
    """As `image_name`, with the folders that a question file writes before the name ("vase/64_439/frame001.jpg")."""
    return image_name(image) if isinstance(image, bytes) or image.is_absolute() else image.as_posix()


@dataclasses.dataclass(frozen=True)
class Data:
    """Where a benchmark's files lie. Only `folder` is always needed; the rest overrules what is looked for in it.

    Attributes:
        folder: the folder that users have (of COCO, of MME, ...), searched in the places listed by each benchmark.
        question_file: one question file instead of the ones looked for (POPE, MIHBench, multiple choice).
        image_folder: folder of the images.
        image_list: CHAIR: file with one image name or id a line; the images in this order.
        synonyms: CHAIR: the user's synonym list, one category a line, its words separated by commas.
        chair_pickle: CHAIR: `chair.pkl` with the ground truth of all images.
        source: POPE: "coco", "aokvqa" or "gqa".
        groups: only these splits or subtasks; empty for those of the protocol.
        only: CHAIR: only these image ids (rescoring takes them from the captions).
        limit: only the first questions of every group, this many of each; None for all.
        matching: AMBER: "spacy" for soft matching with spaCy's large English vectors, as the official scorer does it,
          "exact", or "auto" for the former where it is installed.
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
        seen: Counter = Counter()
        kept = []
        for question in questions:
            seen[question.group] += 1
            if self.limit is None or seen[question.group] <= self.limit:
                kept.append(question)
        return kept
