"""Batches for `smol`: rows of chat turns about one image, two images or none, in the language model's chat format.

All code here is NumPy, because it runs in a worker process beside the training.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lvlm_jax.pocket import catalogue, conversations, questions, recipe_data, smol_text
from lvlm_jax.pocket.captions import THIRDS, third
from lvlm_jax.pocket.scenes import Scene, render, sample_scene
from lvlm_jax.pocket.smol_text import Turn

IMAGE, IMAGE_TOKENS = "<image>", 64
KINDS = ("existence", "choice", "counting", "position", "colour", "place", "refused")
SHARES = np.cumsum((0.5, 0.24, 0.08, 0.08, 0.05, 0.03, 0.02))
TURNS = 16  # more than fit into a row
ANSWERS = 80  # largest number of tokens with loss in a row; later answer tokens have none


def segments(images: int, turns: Sequence[Turn]) -> list[tuple[str, str]]:
    """(prompt, answer) pieces of a conversation in ChatML; only the answers and their end-of-turn tokens have loss."""
    markers, pieces = f"{IMAGE}\n" * images, []
    for question, answer in turns:
        between = "\n" if pieces else ""
        pieces.append((f"{between}<|im_start|>user\n{markers}{question}<|im_end|>\n<|im_start|>assistant\n", answer))
        markers = ""
    return pieces


def encode(encoder: Any, images: int, turns: Sequence[Turn], length: int) -> tuple[list[int], list[int], list[int]]:
    """Token ids of a conversation, cut before the first turn that does not fit into `length`.

    Returns:
        ids, the indices of the tokens with loss, and the index of the first token of each one-word answer.
    """
    image = encoder.convert_tokens_to_ids(IMAGE)
    ids: list[int] = []
    learned: list[int] = []
    words: list[int] = []
    for prompt, answer in segments(images, turns):
        first_tokens = []
        for token in encoder(prompt, add_special_tokens=False)["input_ids"]:
            first_tokens += [image] * IMAGE_TOKENS if token == image else [token]
        answer_ids = [*encoder(answer, add_special_tokens=False)["input_ids"], encoder.eos_token_id]
        if len(ids) + len(first_tokens) + len(answer_ids) > length:
            break
        start = len(ids) + len(first_tokens)
        ids += first_tokens + answer_ids
        learned += range(start, start + len(answer_ids))
        words += [start] if " " not in answer or answer.startswith(("Yes", "No")) else []
    return ids, learned, words


def single_turns(scene: Scene, rng: np.random.Generator, hard: float | None) -> list[Turn]:
    """Different questions about one image; 1 row of 4 begins with a description, and 2 of 4 have one later."""
    turns, used = [], set()
    for _ in range(TURNS):
        kind = KINDS[min(int(SHARES.searchsorted(rng.random())), len(KINDS) - 1)]
        if kind == "existence":
            about, turn = smol_text.existence_turn(scene, rng, hard)
        elif kind == "refused":
            about, turn = kind, smol_text.refused_turn(rng)
        else:
            options = {"hard": hard} if kind == "choice" else {}
            question = questions.SINGLE[kind](scene, rng, **options)
            about, turn = (None, None) if question is None else (question.text, _worded(question, rng))
        # A repeated question would be answered from the text before it.
        if turn is not None and about not in used:
            turns.append(turn)
            used.add(about)
    place = rng.random()
    if place < 0.75:
        turns.insert(0 if place < 0.25 else 4, smol_text.caption_turn(scene, rng))
    return turns


def several_turns(scenes: list[Scene], rng: np.random.Generator) -> list[Turn]:
    """Questions about two images together."""
    kinds, turns = list(questions.MULTI.values()), []
    while len(turns) < TURNS // 2:
        question = smol_text.pick(kinds, rng)(scenes, rng)
        if question is not None:
            turns.append(_worded(question, rng))
    return turns


def _worded(question: questions.Question, rng: np.random.Generator) -> Turn:
    """A question with a sentence as answer, or with a benchmark's suffix and a one-word answer."""
    if rng.random() < 0.6:
        return question.text, question.full
    return question.text + conversations.suffix(question), question.short


@dataclasses.dataclass(frozen=True)
class Chats:
    """Batches of rows about one image each. The first row of every second batch has no image or two images,
    alternating.

    `hard` is the probability that an absent object is typical of the place; None excludes typical objects.
    """

    seed: int
    encoder: Any
    rows: int
    length: int
    hard: float | None = None
    split: str = "train"

    def __call__(self, step: int) -> dict[str, np.ndarray]:
        """Batch `step`, from `rows_of`."""
        rng = np.random.default_rng([17, self.seed, step])
        samples: list = []
        if step % 4 == 2:
            first = sample_scene(rng, self.split)
            scenes = [first, sample_scene(rng, self.split, first.kind if rng.random() < 0.6 else None)]
            samples = [(scenes, several_turns(scenes, rng))]
        elif step % 4 == 0:
            samples = [([], smol_text.spoken_turns(TURNS, rng))]
        while len(samples) < self.rows:
            scene = sample_scene(rng, self.split)
            samples.append(([scene], single_turns(scene, rng, self.hard)))
        return rows_of(self.encoder, samples, self.length, self.rows + 1)


def rows_of(encoder: Any, samples: Sequence[tuple[list[Scene], Sequence[Turn]]], length: int, images: int) -> dict:
    """Conversations as arrays.

    Returns:
        tokens: int32 [rows, length], right-padded.
        columns: int32 [rows, ANSWERS], the columns of the tokens with loss; 0 after the last.
        words: bool [rows, ANSWERS], whether the token with loss begins a one-word answer.
        images: uint8 [images, 96, 96, 3], the images of all rows in order, then black images.
    """
    tokens = np.full((len(samples), length), encoder.pad_token_id, np.int32)
    columns = np.zeros((len(samples), ANSWERS), np.int32)
    words = np.zeros(columns.shape, bool)
    pictures = np.zeros((images, 96, 96, 3), np.uint8)
    num_images = 0
    for row, (scenes, turns) in enumerate(samples):
        ids, learned, first = encode(encoder, len(scenes), turns, length)
        learned = learned[: columns.shape[1]]
        tokens[row, : len(ids)] = ids
        columns[row, : len(learned)] = learned
        words[row, : len(learned)] = np.isin(learned, first)
        for scene in scenes:
            pictures[num_images] = render(scene)
            num_images += 1
    return {"tokens": tokens, "columns": columns, "words": words, "images": pictures}


def held_out(encoder: Any, count: int, length: int = 128) -> dict[str, dict[str, np.ndarray]]:
    """Questions about validation scenes, one per row, with one-word answers: kind -> a batch of `count` rows.

    About half of `existence` and of `tempting` has the answer no: `existence` then names any absent object, `tempting`
    one that is typical of the place.
    """
    rng = np.random.default_rng([18, 0])
    kinds: dict[str, list] = {name: [] for name in ("existence", "tempting", "choice", "position")}
    while any(len(rows) < count for rows in kinds.values()):
        scene = sample_scene(rng, "val")
        yes = rng.random() < 0.5
        for kind, hard in (("existence", 0.0), ("tempting", 1.0)):
            name = smol_text.pick(list(scene.counts), rng) if yes else questions.absent_category(scene, rng, hard)
            text = questions.EXISTENCE[0].format(questions.article(name))
            kinds[kind].append(([scene], [(text, "Yes" if yes else "No")]))
        question = questions.choice(scene, rng)
        kinds["choice"].append(([scene], [(question.text + recipe_data.ONE_WORD, question.short)]))
        alone = [placed for placed in scene.objects if scene.counts[placed.category] == 1]
        if alone:
            text = f"Where is the {alone[0].category} in the image?"
            kinds["position"].append(([scene], [(text + recipe_data.ONE_WORD, third(alone[0]))]))
    batches = {kind: rows_of(encoder, rows[:count], length, count) for kind, rows in kinds.items()}
    for arrays in batches.values():
        arrays["words"] = np.zeros_like(arrays["words"])
        arrays["words"][:, 0] = True  # the first token of the answer, whatever its length
    return batches


def label_vectors(embedding: np.ndarray, encoder: Any) -> np.ndarray:
    """The image token to learn for each label of `recipe_data.place_labels`, float32 [labels, E].

    It is the mean of the language model's own embeddings of the label's words.
    """
    names = [*catalogue.CATEGORIES, *(name.split(" ", 1)[1] for name in catalogue.SCENE_NAMES)]
    return np.stack([_mean_embedding(embedding, encoder, name) for name in names])


def column_vectors(embedding: np.ndarray, encoder: Any) -> np.ndarray:
    """The embedding of "left", "middle" or "right" for each column of patches, float32 [8, E]."""
    side = int(IMAGE_TOKENS**0.5)
    names = [THIRDS[3 * (2 * column + 1) // (2 * side)] for column in range(side)]
    return np.stack([_mean_embedding(embedding, encoder, name) for name in names])


def _mean_embedding(embedding: np.ndarray, encoder: Any, words: str) -> np.ndarray:
    return embedding[encoder(f" {words}", add_special_tokens=False)["input_ids"]].mean(axis=0)
