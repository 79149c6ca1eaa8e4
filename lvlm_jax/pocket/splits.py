"""Writes a split of the pocket world to a folder, in the layout of real data.

images/pocket_test_000000.png ...
annotations/instances_test.json      COCO: categories, boxes, masks as uncompressed run lengths
annotations/captions_test.json       COCO: five captions per image
pope/pope_{random,popular,adversarial}.json      POPE's JSON lines
questions/{choice,counting,position,color,place,multi_image}.jsonl
MME_Benchmark_release_version/{existence,count,position,color}/NAME.png and NAME.txt
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket import captions, catalogue, questions
from lvlm_jax.pocket.pope import STRATEGIES, pope_rows
from lvlm_jax.pocket.questions import Question
from lvlm_jax.pocket.scenes import SIZE, SPLITS, Scene, render, scene_at

# Image ids of the splits do not overlap, so that annotations of several can be merged.
FIRST_ID = {"train": 1_000_000, "val": 2_000_000, "test": 3_000_000}
# MME's folder names -> our kinds of question with yes/no forms.
MME_TASKS = {"existence": "existence", "count": "counting", "position": "position", "color": "colour"}
MME_SUFFIX = " Please answer yes or no."
# The demo's scene: a kitchen with an elephant in it, and a knife without its fork.
SAMPLE = ("test", 2822)


def write_split(folder: str | Path, split: str, images: int, seed: int | tuple[int, ...] = 0) -> dict[str, int]:
    """Writes the first `images` scenes of a split; the same arguments always write the same data.

    Args:
        folder: new or empty.
        split: "train" (a quarter of its captions is wrong), "val" or "test" (a share of its scenes is atypical).
        seed: another seed gives other scenes; with several seeds, the images take them in turn.

    Returns:
        How many images, objects and captions were written, and how many questions per file.

    Raises:
        LVLMError: the split is unknown, there are no images or too few for POPE, or the folder cannot be used.
    """
    known_split(split)
    if images < 1:
        raise LVLMError(f"{images} images asked for; give at least 1")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LVLMError(f"{folder} is not an empty folder; give a new one")
    seeds = seed if isinstance(seed, tuple) else (seed,)
    scenes = [scene_at(split, index // len(seeds), seeds[index % len(seeds)]) for index in range(images)]
    pope = _pope(split, scenes, seeds)  # may find too few images, so it runs before anything is written
    try:
        for name in ("images", "annotations", "pope", "questions"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LVLMError(f"cannot make the folder {folder}: {error.strerror}; give one that can be written") from error
    for index, scene in enumerate(scenes):
        Image.fromarray(render(scene)).save(folder / "images" / file_name(split, index))
    counts = _write_annotations(folder / "annotations", split, scenes, seeds)
    for strategy, rows in pope.items():
        counts[f"pope_{strategy}"] = _write_lines(folder / "pope" / f"pope_{strategy}.json", rows)
    counts |= _write_questions(folder / "questions", split, scenes, seeds)
    counts |= _write_mme(folder / "MME_Benchmark_release_version", split, scenes, seeds)
    return counts


def known_split(split: str) -> str:
    """Returns `split`, if it is the name of a split; otherwise raises `LVLMError`."""
    if split not in SPLITS:
        raise LVLMError(f"split {split!r} is unknown; choose one of {', '.join(SPLITS)}")
    return split


def file_name(split: str, index: int) -> str:
    """Name of an image file."""
    return f"pocket_{split}_{index:06d}.png"


def number(name: str | int) -> int:
    """The index of an image within its split, from the image's file name or id."""
    return int(re.findall(r"\d+", str(name))[-1]) % 1_000_000


def demo_scene() -> Scene:
    """The scene of the shipped `sample.png`."""
    return scene_at(*SAMPLE)


def _generator(purpose: int, split: str, seeds: tuple[int, ...]) -> np.random.Generator:
    """The random generator for one file. Each file has its own, so that a change to one leaves the others unchanged."""
    return np.random.default_rng([12, purpose, SPLITS[split], *seeds])


def _write_annotations(folder: Path, split: str, scenes: list[Scene], seeds: tuple[int, ...]) -> dict[str, int]:
    rng = _generator(0, split, seeds)
    first = FIRST_ID[split]
    images = [
        {"id": first + i, "file_name": file_name(split, i), "width": SIZE, "height": SIZE, "scene": scene.kind}
        for i, scene in enumerate(scenes)
    ]
    objects, texts = [], []
    for i, scene in enumerate(scenes):
        for k, placed in enumerate(scene.objects):
            objects.append(
                {
                    "id": first * 10 + len(objects),
                    "image_id": first + i,
                    "category_id": catalogue.COCO_IDS[placed.category],
                    "bbox": list(placed.box),
                    "area": placed.area,
                    "segmentation": {"size": [SIZE, SIZE], "counts": _run_lengths(scene.owner == k + 1)},
                    "iscrowd": 0,
                }
            )
        for text, _ in captions.five_captions(scene, rng, captions.NOISE if split == "train" else 0.0):
            texts.append({"id": first * 10 + len(texts), "image_id": first + i, "caption": text})
    information = {
        "description": "lvlm_jax pocket world",
        "split": split,
        "seed": seeds[0] if len(seeds) == 1 else seeds,
    }
    listed_categories = [{"id": number, "name": name} for name, number in catalogue.COCO_IDS.items()]
    instances = {"info": information, "images": images, "annotations": objects, "categories": listed_categories}
    _write_json(folder / f"instances_{split}.json", instances)
    _write_json(folder / f"captions_{split}.json", {"info": information, "images": images, "annotations": texts})
    return {"images": len(scenes), "objects": len(objects), "captions": len(texts)}


def _run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths of a mask [96, 96]: column by column, beginning with zeros."""
    flat = np.concatenate([[0], mask.T.ravel().astype(np.int8), [1 - mask[-1, -1]]])
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.concatenate([[0], edges])).tolist()


def _pope(split: str, scenes: list[Scene], seeds: tuple[int, ...]) -> dict[str, list[dict]]:
    images = [(file_name(split, i), list(scene.counts)) for i, scene in enumerate(scenes)]
    return {
        strategy: pope_rows(images, strategy, catalogue.CATEGORIES, _generator(1, split, seeds))
        for strategy in STRATEGIES
    }


def _row(number: int, images: list[str], question: Question) -> dict:
    source = {"image": images[0]} if len(images) == 1 else {"images": images}
    return {"question_id": number, **source, "kind": question.kind, "text": question.text, "label": question.short,
            "answer": question.full}  # fmt: skip


def _write_questions(folder: Path, split: str, scenes: list[Scene], seeds: tuple[int, ...]) -> dict[str, int]:
    rng = _generator(2, split, seeds)
    counts = {}
    for kind in ("choice", "counting", "position", "colour", "place"):
        rows: list[dict] = []
        for i, scene in enumerate(scenes):
            question = questions.SINGLE[kind](scene, rng)
            if question is not None:
                rows.append(_row(len(rows) + 1, [file_name(split, i)], question))
        name = "color" if kind == "colour" else kind
        counts[name] = _write_lines(folder / f"{name}.jsonl", rows)
    rows = []
    for group in _groups(scenes, rng):
        for make in questions.MULTI.values():
            question = make([scenes[i] for i in group], rng)
            if question is not None:
                rows.append(_row(len(rows) + 1, [file_name(split, i) for i in group], question))
    counts["multi_image"] = _write_lines(folder / "multi_image.jsonl", rows)
    return counts


def _groups(scenes: list[Scene], rng: np.random.Generator) -> Iterable[list[int]]:
    """Groups of two to four different images, one group per two images; more than half of the groups show one place."""
    for first in range(0, len(scenes), 2):
        size = int(rng.integers(2, 5))
        alike = rng.random() < 0.6
        others = [i for i in range(len(scenes)) if i != first and (not alike or scenes[i].kind == scenes[first].kind)]
        if len(others) >= size - 1:
            yield [first, *(int(i) for i in rng.choice(others, size - 1, replace=False))]


def _write_mme(folder: Path, split: str, scenes: list[Scene], seeds: tuple[int, ...]) -> dict[str, int]:
    rng = _generator(3, split, seeds)
    counts = {}
    for task, kind in MME_TASKS.items():
        (folder / task).mkdir(parents=True)
        total = 0
        for i, scene in enumerate(scenes):
            pair = _yes_and_no(questions.SINGLE[kind], scene, rng)
            if pair is None:
                continue
            lines = [f"{question.text}{MME_SUFFIX}\t{question.short}\n" for question in pair]
            name = file_name(split, i)
            Image.fromarray(render(scene)).save(folder / task / name)
            (folder / task / name).with_suffix(".txt").write_text("".join(lines), encoding="utf-8")
            total += len(lines)
        counts[f"MME {task}"] = total
    return counts


def _yes_and_no(make: Callable, scene: Scene, rng: np.random.Generator) -> tuple[Question, Question] | None:
    """Two questions of a kind about one scene, with answers yes and no; None if a few tries do not find both."""
    by_answer: dict[str, Question] = {}
    for _ in range(24):
        question = make(scene, rng)
        if question is not None and question.short in ("Yes", "No"):
            by_answer.setdefault(question.short, question)
        if len(by_answer) == 2:
            return by_answer["Yes"], by_answer["No"]
    return None


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _write_lines(path: Path, rows: list[dict]) -> int:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)
