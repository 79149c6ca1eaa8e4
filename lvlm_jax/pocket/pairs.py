"""Prompts of the pocket world for preference pairs: one question each, about new images, with its answer."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.questions import PLACEHOLDER
from lvlm_jax.pocket import balanced, captions, conversations, questions
from lvlm_jax.pocket.questions import Question
from lvlm_jax.pocket.scenes import SPLITS, Scene, render, sample_scene

SINGLE = 0.2  # share of prompts about one image, so that a model does not forget how to answer them
DESCRIPTION = "description"  # the kind of prompts that ask for a description


@dataclasses.dataclass(frozen=True)
class Mix:
    """The mix of prompts.

    Attributes:
        single: probability of a prompt about one image instead of two to four.
        describe: probability that a prompt about one image asks for a detailed description.
        kinds: name -> function that makes a question about several images; `balanced.KINDS`, or some of them.
        one_word: share of questions that ask for one word.
        question_first: whether a question about several images stands before the images.
    """

    single: float = SINGLE
    describe: float = 0.0
    kinds: Mapping[str, Callable] = dataclasses.field(default_factory=lambda: questions.MULTI)
    one_word: float = conversations.ONE_WORD
    question_first: bool = False


@dataclasses.dataclass(frozen=True)
class PocketPrompt:
    """A prompt of the pocket world.

    Attributes:
        scenes: one to four scenes.
        kind: the kind of question, a name in `questions.SINGLE` or `balanced.KINDS`; or DESCRIPTION.
        text: the question, perhaps with a suffix that asks for one word.
        truth: the right answer: one word if the question asks for one, else a sentence.
        answer: the right answer as one word; "" if the prompt asks for a description.
        wrong: wrong answers, in the same form as `truth`.
    """

    scenes: list[Scene]
    kind: str
    text: str
    truth: str
    answer: str = ""
    wrong: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        scenes: list[Scene],
        question: Question,
        rng: np.random.Generator,
        one_word: float = conversations.ONE_WORD,
        question_first: bool = False,
    ) -> "PocketPrompt":
        """A question about scenes; its answer is one word with probability `one_word`, else a sentence."""
        short = rng.random() < one_word
        text = question.text + PLACEHOLDER * len(scenes) * question_first
        text += conversations.any_suffix(question, rng) if short else ""
        truth, *wrong = (option[short] for option in ((question.full, question.short), *question.wrong))
        return cls(scenes, question.kind, text, truth, question.short, tuple(dict.fromkeys(wrong)))

    def row(self, index: int, images: list[str]) -> dict:
        """The prompt as a line of a prompt file."""
        row = {"id": f"{self.kind}/{index:06d}", "images": images, "prompt": self.text, "truth": self.truth}
        row["kind"] = self.kind
        return row | ({"answer_type": self.answer, "wrong": list(self.wrong)} if self.answer else {})


def write_prompts(folder: str | Path, count: int, seed: int = 0, mix: Mix = Mix()) -> Path:
    """Writes `prompts.jsonl`, lines `{id, images, prompt, truth, kind, answer_type, wrong}`, and its images.

    The same arguments always write the same prompts. Existing images stay, so an interrupted call can be repeated.
    Questions about several images are balanced (`pocket.balanced`); up to four are about the same images.

    Args:
        folder: where the file and the folder `images` are written.
        count: number of prompts.
        seed: another seed gives other images.
        mix: the kinds of prompts.

    Returns:
        The file.

    Raises:
        LVLMError: the folder has other prompts, or cannot be written.
    """
    path = Path(folder) / "prompts.jsonl"
    rows, scenes = [], {}
    prompts = sample_prompts(count, seed, mix)
    for index, (group, prompt) in enumerate(prompts):
        names = [f"images/{group}_{place + 1}.png" for place in range(len(prompt.scenes))]
        scenes |= dict(zip(names, prompt.scenes, strict=True))
        rows.append(prompt.row(index, names))
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    try:
        (path.parent / "images").mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_bytes() != content:
            raise LVLMError(f"{str(path)!r} has prompts of other settings; give another --out")
        with files.atomic_file(path) as file:
            file.write(content)
        for name, scene in scenes.items():
            balanced.save(scene, path.parent / name)
    except OSError as error:
        raise LVLMError(
            f"prompts cannot be written to {str(folder)!r}: {error.strerror}; give a folder that can be written"
        ) from error
    return path


def write_pairs(folder: str | Path, count: int, seed: int = 0, style: str = "list") -> Path:
    """Writes `pairs.jsonl`, lines `{id, images, prompt, good, bad}`, and its images below `folder`.

    The good caption names present objects; the bad one also names an absent object that is typical of the place.

    Args:
        count: number of pairs.
        seed: another seed gives other images.
        style: style of the captions, see `captions.caption`.

    Returns:
        The file.

    Raises:
        LVLMError: the folder cannot be written.
    """
    path, rows = Path(folder) / "pairs.jsonl", []
    try:
        (path.parent / "images").mkdir(parents=True, exist_ok=True)
        for index in range(count):
            # The leading number makes these random numbers differ from those of the prompts.
            rng = np.random.default_rng([17, SPLITS["train"], seed, index])
            scene, name = sample_scene(rng, "train"), f"images/{index:06d}.png"
            prompt = conversations.DETAILED_PROMPTS[rng.integers(len(conversations.DETAILED_PROMPTS))]
            words = [
                captions.caption(scene, style, np.random.default_rng([seed, index]), noisy) for noisy in (False, True)
            ]
            rows.append({"id": f"{index:06d}", "images": [name], "prompt": prompt, "good": words[0], "bad": words[1]})
            with files.atomic_file(path.parent / name) as file:
                Image.fromarray(render(scene)).save(file, "PNG")
        with files.atomic_file(path) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    except OSError as error:
        raise LVLMError(
            f"pairs cannot be written to {str(folder)!r}: {error.strerror}; give a folder that can be written"
        ) from error
    return path


def sample_prompts(count: int, seed: int = 0, mix: Mix = Mix()) -> list[tuple[str, PocketPrompt]]:
    """The prompts of `write_prompts`, each with the name of its group of scenes; the scenes are of the train split."""
    # The leading number makes these random numbers differ from those of conversations and of the written splits.
    streams = [np.random.default_rng([13, SPLITS["train"], seed, index]) for index in range(count)]
    alone = [rng.random() < mix.single for rng in streams]
    several = count - sum(alone)
    groups = balanced.draw(several, seed, "train", mix.kinds) if several else []
    drawn = [(number, group.scenes, question) for number, group in enumerate(groups) for question in group.questions]
    order = iter(np.random.default_rng([23, seed]).permutation(len(drawn)))
    prompts = []
    for index, (rng, one) in enumerate(zip(streams, alone, strict=True)):
        if one:
            prompts.append((f"one_{index:06d}", _about_one(rng, mix)))
        elif (place := next(order, None)) is not None:
            number, scenes, question = drawn[place]
            prompts.append((f"{number:06d}", PocketPrompt.of(scenes, question, rng, mix.one_word, mix.question_first)))
    return prompts


def _about_one(rng: np.random.Generator, mix: Mix) -> PocketPrompt:
    """A prompt about one image."""
    scenes = [sample_scene(rng, "train")]
    if mix.describe and rng.random() < mix.describe:
        text = conversations.DETAILED_PROMPTS[rng.integers(len(conversations.DETAILED_PROMPTS))]
        return PocketPrompt(scenes, DESCRIPTION, text, captions.caption(scenes[0], "detailed", rng))
    return PocketPrompt.of(scenes, _draw(questions.SINGLE, scenes[0], rng), rng, mix.one_word)


def _draw(kinds: dict[str, Callable], about: Scene | list[Scene], rng: np.random.Generator) -> Question:
    """A question of any kind that these scenes allow."""
    makers = list(kinds.values())
    while True:
        question = makers[rng.integers(len(makers))](about, rng)
        if question is not None:
            return question
