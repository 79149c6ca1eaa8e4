"""Batches of the pocket world: images with patch labels, and conversations as token rows.

All code here is NumPy, because it runs in worker processes beside the training.
"""

import dataclasses
from typing import Any

import numpy as np

from lvlm_jax.pocket import catalogue, conversations, questions, tokenizer
from lvlm_jax.pocket.captions import THIRDS, third
from lvlm_jax.pocket.scenes import Scene, patch_labels, render, sample_scene

CATEGORY_COUNT = len(catalogue.CATEGORIES)
LABEL_COUNT = CATEGORY_COUNT + len(catalogue.SCENE_NAMES)

# Largest number of conversations drawn per step; those about one image and those about several fill separate arrays.
RESERVED = 256
DRILL_TURNS = 6
POSITION_SHARE = 1 / 4  # of the drill questions
CHOICE_SHARE = 1 / 2  # of the other drill questions; without them, yes/no answers stay at chance for long
ONE_WORD = conversations.SUFFIXES[0]


def place_labels(scene: Scene) -> np.ndarray:
    """Label of each patch, int32 [64]: the index of its object in CATEGORIES.

    The label of a patch without an object is the number of categories plus the index of the kind of place.
    """
    labels = patch_labels(scene)
    return np.where(labels > 0, labels - 1, CATEGORY_COUNT + catalogue.SCENE_NAMES.index(scene.kind)).astype(np.int32)


def column_words(encoder: Any) -> np.ndarray:
    """The token for "left", "middle" or "right" of each column of patches, int32 [8]."""
    side = tokenizer.SIZE // tokenizer.PATCH
    names = [THIRDS[3 * (2 * column + 1) // (2 * side)] for column in range(side)]
    return np.array([encoder(f" {name}", add_special_tokens=False)["input_ids"][0] for name in names], np.int32)


def label_words(encoder: Any) -> np.ndarray:
    """The first token of the name of each label in `place_labels`, int32 [labels]."""
    names = [*catalogue.CATEGORIES, *(name.split(" ", 1)[1] for name in catalogue.SCENE_NAMES)]
    return np.array([encoder(f" {name}", add_special_tokens=False)["input_ids"][0] for name in names], np.int32)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Batches of images with the labels of their patches."""

    seed: int
    batch: int
    split: str = "train"

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """The batch of a step: `images` uint8 [batch, 96, 96, 3], and `labels` int32 [batch, 64] of their patches."""
        rng = np.random.default_rng([2, self.seed, step])
        scenes = [sample_scene(rng, self.split) for _ in range(self.batch)]
        return {"images": np.stack([render(s) for s in scenes]), "labels": np.stack([place_labels(s) for s in scenes])}


@dataclasses.dataclass(frozen=True)
class Part:
    """The sizes of one part of a batch: the number of rows, the tokens per row, and the number of images."""

    rows: int
    length: int
    images: int


@dataclasses.dataclass(frozen=True)
class Conversations:
    """Conversations about one image and about several, in two separate arrays, so that both have little padding.

    The first `drill` rows of `single` have short questions (existence, choice, position) and a caption: too few answers
    of ordinary conversations depend on single objects for a small model to learn to look. `questions.absent_category`
    draws absent objects, with `hard`: a model that is drilled to resist typical objects would not be tempted by them,
    and POPE's adversarial split would show nothing.
    """

    seed: int
    encoder: Any
    single: Part
    several: Part
    drill: int = 0
    hard: float | None = None
    split: str = "train"

    def __call__(self, step: int) -> dict[str, dict[str, np.ndarray]]:
        """The batch of a step: the parts `single` and `several`, each from `rows_of`."""
        parts = {"single": self.single, "several": self.several}
        chosen: dict[str, list] = {name: [] for name in parts}
        free = {name: part.images for name, part in parts.items()}
        for index in range(step * RESERVED, (step + 1) * RESERVED):
            scenes, turns = conversations.sample_text(self.seed, index, self.split, self.hard)
            name = "single" if len(scenes) == 1 else "several"
            if len(chosen[name]) < parts[name].rows and len(scenes) <= free[name]:
                if name == "single" and len(chosen[name]) < self.drill:
                    turns = drill_turns(scenes[0], np.random.default_rng([4, self.seed, index]), self.hard)
                chosen[name].append((scenes, turns))
                free[name] -= len(scenes)
            if all(len(chosen[name]) == part.rows for name, part in parts.items()):
                break
        return {name: rows_of(self.encoder, chosen[name], part) for name, part in parts.items()}


def drill_turns(scene: Scene, rng: np.random.Generator, hard: float | None) -> list[tuple[str, str]]:
    """Questions of existence, choice and position with one-word answers, and a caption before or after them."""
    turns_so_far = []
    for _ in range(DRILL_TURNS):
        position = questions.position(scene, rng) if rng.random() < POSITION_SHARE else None
        other = questions.choice(scene, rng, hard) if rng.random() < CHOICE_SHARE else None
        turns_so_far.append(position or other or questions.existence(scene, rng, hard))
    turns = [(question.text + conversations.suffix(question), question.short) for question in turns_so_far]
    turns.insert(int(rng.integers(2)) * len(turns), conversations.caption_turn(scene, rng))
    return turns


def rows_of(encoder: Any, samples: list[tuple[list[Scene], list[tuple[str, str]]]], part: Part) -> dict:
    """Conversations as arrays.

    Returns:
        tokens: int32 [rows, length], right-padded. answers: bool [rows, length], true at the tokens with loss.
        images: uint8 [images, 96, 96, 3], the images of all rows in order, then black images.
        labels: int32 [images, 64], the labels of patches; -1 in black images.
    """
    tokens = np.full((part.rows, part.length), encoder.pad_token_id, np.int32)
    answers = np.zeros((part.rows, part.length), bool)
    images = np.zeros((part.images, 96, 96, 3), np.uint8)
    labels = np.full((part.images, 64), -1, np.int32)
    num_images = 0
    for row, (scenes, turns) in enumerate(samples):
        ids, mask = tokenizer.encode_conversation(encoder, len(scenes), turns, part.length)
        tokens[row, : len(ids)], answers[row, : len(ids)] = ids, mask
        for scene in scenes:
            images[num_images], labels[num_images] = render(scene), place_labels(scene)
            num_images += 1
    return {"tokens": tokens, "answers": answers, "images": images, "labels": labels}


def held_out(encoder: Any, count: int, length: int = 128) -> dict[str, dict[str, np.ndarray]]:
    """Questions about validation scenes, one per row, worded as in the test split: kind -> a batch of `count` rows.

    About half of `existence` and of `tempting` has the answer no: `existence` then names any absent object, `tempting`
    one that is typical of the scene. `choice`, `counting` and `position` have one-word answers. Only the first answer
    token has loss.
    """
    rng = np.random.default_rng([3, 0])
    kinds: dict[str, list] = {name: [] for name in ("existence", "tempting", "choice", "counting", "position")}
    while any(len(rows) < count for rows in kinds.values()):
        scene = sample_scene(rng, "val")
        yes = rng.random() < 0.5
        for kind, hard in (("existence", 0.0), ("tempting", 1.0)):
            names = list(scene.counts)
            name = names[rng.integers(len(names))] if yes else questions.absent_category(scene, rng, hard)
            text = questions.EXISTENCE[0].format(questions.article(name))
            kinds[kind].append(([scene], [(text, "Yes" if yes else "No")]))
        for kind in ("choice", "counting"):
            question = questions.SINGLE[kind](scene, rng)
            if question is not None:
                kinds[kind].append(([scene], [(question.text + ONE_WORD, question.short)]))
        single = [placed for placed in scene.objects if scene.counts[placed.category] == 1]
        if single:
            text = f"Where is the {single[0].category} in the image?"
            kinds["position"].append(([scene], [(text + ONE_WORD, third(single[0]))]))
    part = Part(count, length, count)
    batches = {kind: rows_of(encoder, rows[:count], part) for kind, rows in kinds.items()}
    for arrays in batches.values():
        arrays["answers"] &= np.cumsum(arrays["answers"], axis=1) == 1
    return batches
