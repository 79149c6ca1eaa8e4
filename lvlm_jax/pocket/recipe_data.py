"""Batches of the pocket world: pictures with patch labels, and conversations as token rows.

Everything here is NumPy, for it runs in worker processes beside the training.
"""

import dataclasses
from typing import Any

import numpy as np

from lvlm_jax.pocket import catalogue, conversations, questions, tokenizer
from lvlm_jax.pocket.captions import THIRDS, third
from lvlm_jax.pocket.scenes import Scene, patch_labels, render, sample_scene

CATEGORY_COUNT = len(catalogue.CATEGORIES)
LABEL_COUNT = CATEGORY_COUNT + len(catalogue.SCENE_NAMES)

# Conversations set aside per step, from which the two kinds are picked until each has its rows.
RESERVED = 256
DRILL_TURNS = 6
POSITION_SHARE = 1 / 4  # of the drill questions
CHOICE_SHARE = 1 / 2  # of the others: without it yes/no stays at chance for long
ONE_WORD = conversations.SUFFIXES[0]


def place_labels(scene: Scene) -> np.ndarray:
    """What each patch shows, int32 [64]: a category by its place in CATEGORIES, or behind those the kind of place."""
    labels = patch_labels(scene)
    return np.where(labels > 0, labels - 1, CATEGORY_COUNT + catalogue.SCENE_NAMES.index(scene.kind)).astype(np.int32)


def column_words(encoder: Any) -> np.ndarray:
    """Per column of patches the token of the third of the image it lies in, int32 [8]."""
    side = tokenizer.SIZE // tokenizer.PATCH
    names = [THIRDS[3 * (2 * column + 1) // (2 * side)] for column in range(side)]
    return np.array([encoder(f" {name}", add_special_tokens=False)["input_ids"][0] for name in names], np.int32)


def label_words(encoder: Any) -> np.ndarray:
    """Per label of `place_labels` the token that its name begins with, int32 [labels]."""
    names = [*catalogue.CATEGORIES, *(name.split(" ", 1)[1] for name in catalogue.SCENE_NAMES)]
    return np.array([encoder(f" {name}", add_special_tokens=False)["input_ids"][0] for name in names], np.int32)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Scenes for patch classification."""

    seed: int
    batch: int
    split: str = "train"

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """`images` uint8 [batch, 96, 96, 3], `labels` int32 [batch, 64]."""
        rng = np.random.default_rng([2, self.seed, step])
        scenes = [sample_scene(rng, self.split) for _ in range(self.batch)]
        return {"images": np.stack([render(s) for s in scenes]), "labels": np.stack([place_labels(s) for s in scenes])}


@dataclasses.dataclass(frozen=True)
class Part:
    """One rectangle of a batch: how many rows of how many tokens, and room for how many images."""

    rows: int
    length: int
    images: int


@dataclasses.dataclass(frozen=True)
class Conversations:
    """Conversations over one image and over several, in two rectangles, so that little of either is padding.

    The first `drill` rows of `single` ask only whether, which and where objects are, in short turns beside the caption:
    in ordinary conversations too few of the answers depend on that for a small model to learn to look for it.
    The absent objects asked for are drawn as `questions.absent_category` says, by `hard`: a model that is drilled to
    resist what is typical of a place would not be tempted by it, and POPE's adversarial split would show nothing.
    """

    seed: int
    encoder: Any
    single: Part
    several: Part
    drill: int = 0
    hard: float | None = None
    split: str = "train"

    def __call__(self, step: int) -> dict[str, dict[str, np.ndarray]]:
        """`single` and `several`, each as `rows_of` makes them."""
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
    asked = []
    for _ in range(DRILL_TURNS):
        where = questions.position(scene, rng) if rng.random() < POSITION_SHARE else None
        what = questions.choice(scene, rng, hard) if rng.random() < CHOICE_SHARE else None
        asked.append(where or what or questions.existence(scene, rng, hard))
    turns = [(question.text + conversations.suffix(question), question.short) for question in asked]
    turns.insert(int(rng.integers(2)) * len(turns), conversations.caption_turn(scene, rng))
    return turns


def rows_of(encoder: Any, samples: list[tuple[list[Scene], list[tuple[str, str]]]], part: Part) -> dict:
    """Conversations as arrays.

    Returns:
        tokens: int32 [rows, length], right-padded.
        answers: bool [rows, length], the tokens that carry loss.
        images: uint8 [images, 96, 96, 3], those of all rows in reading order, then black ones.
        labels: int32 [images, 64], -1 for the black ones.
    """
    tokens = np.full((part.rows, part.length), encoder.pad_token_id, np.int32)
    answers = np.zeros((part.rows, part.length), bool)
    images = np.zeros((part.images, 96, 96, 3), np.uint8)
    labels = np.full((part.images, 64), -1, np.int32)
    used = 0
    for row, (scenes, turns) in enumerate(samples):
        ids, mask = tokenizer.encode_conversation(encoder, len(scenes), turns, part.length)
        tokens[row, : len(ids)], answers[row, : len(ids)] = ids, mask
        for scene in scenes:
            images[used], labels[used] = render(scene), place_labels(scene)
            used += 1
    return {"tokens": tokens, "answers": answers, "images": images, "labels": labels}


def held_out(encoder: Any, count: int, length: int = 128) -> dict[str, dict[str, np.ndarray]]:
    """Single questions about validation scenes, asked as at test time: by kind, `count` rows each.

    `existence` has any absent object in its "no" half, `tempting` one that is typical of the scene; `choice`,
    `counting`, `position` are answered by one word. Only the first answer token carries the mask.
    """
    rng = np.random.default_rng([3, 0])
    kinds: dict[str, list] = {name: [] for name in ("existence", "tempting", "choice", "counting", "position")}
    while any(len(rows) < count for rows in kinds.values()):
        scene = sample_scene(rng, "val")
        yes = rng.random() < 0.5
        for kind, hard in (("existence", 0.0), ("tempting", 1.0)):
            names = list(scene.counts)
            name = names[rng.integers(len(names))] if yes else questions.absent_category(scene, rng, hard)
            asked = questions.EXISTENCE[0].format(questions.article(name))
            kinds[kind].append(([scene], [(asked, "Yes" if yes else "No")]))
        for kind in ("choice", "counting"):
            question = questions.SINGLE[kind](scene, rng)
            if question is not None:
                kinds[kind].append(([scene], [(question.text + ONE_WORD, question.short)]))
        single = [placed for placed in scene.objects if scene.counts[placed.category] == 1]
        if single:
            asked = f"Where is the {single[0].category} in the image?"
            kinds["position"].append(([scene], [(asked + ONE_WORD, third(single[0]))]))
    part = Part(count, length, count)
    made = {kind: rows_of(encoder, rows[:count], part) for kind, rows in kinds.items()}
    for arrays in made.values():
        arrays["answers"] &= np.cumsum(arrays["answers"], axis=1) == 1
    return made
