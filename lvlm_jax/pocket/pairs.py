"""Prompts of the pocket world for preference pairs: one question each, about new images, with its answer."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket import captions, conversations, questions
from lvlm_jax.pocket.questions import Question
from lvlm_jax.pocket.scenes import SPLITS, Scene, render, sample_scene

SINGLE = 0.2  # share of prompts about one image, so that a model does not forget how to answer them
DESCRIPTION = "description"  # the kind of prompts that ask for a description


def write_prompts(folder: str | Path, count: int, seed: int = 0, single: float = SINGLE, describe: float = 0.0) -> Path:
    """Writes `prompts.jsonl`, lines `{id, images, prompt, truth}`, and its images below `folder`.

    The same arguments always write the same prompts. Existing files are kept, so an interrupted call can be repeated.

    Args:
        count: number of prompts.
        seed: another seed gives other images.
        single: probability of a prompt about one image instead of two to four.
        describe: probability that a prompt about one image asks for a detailed description.

    Returns:
        The file.

    Raises:
        LVLMError: the folder has other prompts, or cannot be written.
    """
    path = Path(folder) / "prompts.jsonl"
    prompts = [sample_prompt(index, seed, single, describe) for index in range(count)]
    names = [
        [f"images/{index:06d}_{place + 1}.png" for place in range(len(scenes))]
        for index, (scenes, _, _, _) in enumerate(prompts)
    ]
    rows = [
        {"id": f"{kind}/{index:06d}", "images": names[index], "prompt": text, "truth": truth}
        for index, (_, kind, text, truth) in enumerate(prompts)
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    try:
        (path.parent / "images").mkdir(parents=True, exist_ok=True)
        if path.exists() and path.read_bytes() != content:
            raise LVLMError(f"{str(path)!r} has prompts of other settings; give another --out")
        with files.atomic_file(path) as file:
            file.write(content)
        for (scenes, _, _, _), images in zip(prompts, names, strict=True):
            for scene, name in zip(scenes, images, strict=True):
                if not (path.parent / name).exists():
                    with files.atomic_file(path.parent / name) as file:
                        Image.fromarray(render(scene)).save(file, "PNG")
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
            # The leading number separates this stream from that of the prompts.
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


def sample_prompt(
    index: int, seed: int = 0, single: float = SINGLE, describe: float = 0.0
) -> tuple[list[Scene], str, str, str]:
    """Prompt `index` of the stream `seed`, over scenes like those of the train split; see `write_prompts`.

    Returns:
        scenes: one to four.
        kind: kind of the question, a name in `questions.SINGLE` or `questions.MULTI`; or DESCRIPTION.
        text: the question; a share of `conversations.ONE_WORD` has the suffix for a one-word answer.
        truth: the right answer, in the requested form.
    """
    # The leading number separates this stream from those of conversations and of the written splits.
    rng = np.random.default_rng([13, SPLITS["train"], seed, index])
    if rng.random() < single:
        scenes = [sample_scene(rng, "train")]
        if describe and rng.random() < describe:
            prompt = conversations.DETAILED_PROMPTS[rng.integers(len(conversations.DETAILED_PROMPTS))]
            return scenes, DESCRIPTION, prompt, captions.caption(scenes[0], "detailed", rng)
        question = _draw(questions.SINGLE, scenes[0], rng)
    else:
        scenes = conversations.several_scenes(rng, "train")
        question = _draw(questions.MULTI, scenes, rng)
    if rng.random() < conversations.ONE_WORD:
        return scenes, question.kind, question.text + conversations.suffix(question), question.short
    return scenes, question.kind, question.text, question.full


def _draw(kinds: dict[str, Callable], about: Scene | list[Scene], rng: np.random.Generator) -> Question:
    """A question of any kind that these scenes allow."""
    makers = list(kinds.values())
    while True:
        question = makers[rng.integers(len(makers))](about, rng)
        if question is not None:
            return question
