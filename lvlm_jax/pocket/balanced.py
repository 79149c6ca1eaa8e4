"""Balanced questions over several images: all kinds, and all answers of a kind, are equally frequent.

So a constant answer is right for about 1/n of the questions of a kind that has n answers.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket.catalogue import SCENE_NAMES
from lvlm_jax.pocket.questions import COMPARISON, MULTI, ORDINALS, Question
from lvlm_jax.pocket.scenes import SPLITS, Scene, render, sample_scene

KINDS = {**MULTI, **COMPARISON}
QUESTIONS = 2700  # in the test set, 300 of each kind; the shipped model has seen five of the nine kinds
FILE = "questions/balanced.jsonl"
ABOUT = "questions/balanced.json"  # the settings with which the questions were drawn
USES = 4  # largest number of questions about one group of images
SIZES = {2: 0.5, 3: 0.3, 4: 0.2}  # number of images -> share of the questions
ALIKE = 0.6  # share of groups whose images are of one place, so that they have objects in common
TRIES = 300  # unsuccessful draws after which the missing answers count as too rare; fewer for few questions
_PLACES = ("which_image", "which_lacks", "odd_one_out")  # kinds whose answer is one of the images


class Cell(NamedTuple):
    """A kind of question, a number of images, and an answer; "" for any answer."""

    kind: str
    images: int
    answer: str


class Group(NamedTuple):
    """A group of images, and the questions about it."""

    scenes: list[Scene]
    questions: list[Question]


def answers(kind: str, images: int) -> tuple[str, ...]:
    """The possible answers of a kind of question over this number of images; ("",) if there are too many."""
    if kind in _PLACES:
        return ORDINALS[:images]
    if kind == "how_many_images":
        return tuple(str(number) for number in range(images + 1))
    return ("",) if kind == "shared_object" else ("Yes", "No")


def quotas(count: int, kinds: Mapping[str, Any]) -> Counter[Cell]:
    """The number of questions of each cell; their sum is at least `count`."""
    counts: Counter[Cell] = Counter()
    for kind in kinds:
        sizes = {images: share for images, share in SIZES.items() if kind != "odd_one_out" or images > 2}
        for images, share in sizes.items():
            options = answers(kind, images)
            each = -(-count * share / sum(sizes.values()) // (len(kinds) * len(options)))
            counts.update({Cell(kind, images, answer): int(each) for answer in options})
    return counts


def draw(count: int, seed: int = 0, split: str = "test", kinds: Mapping[str, Any] = KINDS) -> list[Group]:
    """Groups of two to four scenes with one to `USES` questions each, together about `count` questions.

    Args:
        seed: another seed gives other scenes.
        split: the split whose scenes are used.
        kinds: name -> function that makes a question; `KINDS`, or some of them.
    """
    # The leading number makes these random numbers differ from those of conversations and of the written splits.
    rng = np.random.default_rng([19, SPLITS[split], seed])
    missing, drawn, failures = +quotas(count, kinds), [], 0
    while missing and failures < min(TRIES, TRIES // 10 + count):
        failures += 1
        cell = list(missing)[rng.integers(len(missing))]
        scenes = _scenes(cell, split, rng)
        others = [name for name in kinds if name != cell.kind]
        by_kind: dict[str, Question] = {}
        for kind in (cell.kind, *rng.permutation(others)):
            question = kinds[kind](scenes, rng) if len(by_kind) < USES else None
            if question is None:
                continue
            own = Cell(kind, len(scenes), question.short if "" not in answers(kind, len(scenes)) else "")
            if missing[own]:
                by_kind[kind] = question
                missing = +(missing - Counter([own]))
        if by_kind:
            drawn.append(Group(scenes, list(by_kind.values())))
            failures = 0
    return drawn


def _scenes(cell: Cell, split: str, rng: np.random.Generator) -> list[Scene]:
    """Scenes for which a question of the cell's kind is likely to have the cell's answer."""
    first = sample_scene(rng, split)
    one = cell.kind == "odd_one_out" or (rng.random() < ALIKE if cell.kind != "same_place" else cell.answer == "Yes")
    scenes = [first, *(sample_scene(rng, split, first.kind if one else None) for _ in range(cell.images - 1))]
    if cell.kind == "odd_one_out":
        others = [name for name in SCENE_NAMES if name != first.kind]
        scenes[ORDINALS.index(cell.answer)] = sample_scene(rng, split, others[rng.integers(len(others))])
    return scenes


def write(folder: str | Path, count: int = QUESTIONS, seed: int = 0, split: str = "test") -> int:
    """Writes the questions and their images below `folder`, unless they exist.

    `questions/balanced.jsonl` has lines `{question_id, images, kind, text, label, answer, options}`; `options` are
    the one-word answers that the question could have, the right one first.

    Returns:
        The number of questions.

    Raises:
        LVLMError: the folder holds other questions, or cannot be written.
    """
    folder, rows = Path(folder), []
    about, path = {"count": count, "seed": seed, "split": split}, folder / FILE
    if path.exists():
        known = files.read_json(folder / ABOUT, "settings of questions") if (folder / ABOUT).exists() else None
        if known != about:
            raise LVLMError(f"{str(path)!r} holds other questions; give another folder")
        return len(files.read_rows(path, "questions"))
    drawn = draw(count, seed, split)
    names = [
        [f"balanced_{split}_{index:06d}_{place + 1}.png" for place in range(len(group.scenes))]
        for index, group in enumerate(drawn)
    ]
    for group, images in zip(drawn, names, strict=True):
        for question in group.questions:
            options = [question.short, *(short for _, short in question.wrong)]
            rows.append({"question_id": len(rows) + 1, "images": images, "kind": question.kind, "text": question.text,
                         "label": question.short, "answer": question.full, "options": options})  # fmt: skip
    content = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        for name in ("images", "questions"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for group, images in zip(drawn, names, strict=True):
            for scene, name in zip(group.scenes, images, strict=True):
                save(scene, folder / "images" / name)
        files.write_whole(folder / ABOUT, json.dumps(about) + "\n")
        files.write_whole(path, content)
    except OSError as error:
        raise LVLMError(
            f"questions cannot be written to {str(folder)!r}: {error.strerror}; give a folder that can be written"
        ) from error
    return len(rows)


def save(scene: Scene, path: Path) -> None:
    """Writes an image, unless it exists."""
    if not path.exists():
        with files.atomic_file(path) as file:
            Image.fromarray(render(scene)).save(file, "PNG")
