"""Training conversations: a caption and several questions about one image, or questions about a few images."""

from collections.abc import Callable

import numpy as np

from lvlm_jax.pocket import captions, questions
from lvlm_jax.pocket.questions import Question
from lvlm_jax.pocket.scenes import SPLITS, Scene, render, sample_scene

MULTI_IMAGE = 0.15  # share of conversations over two to four images
ONE_WORD = 0.3  # share of questions with a benchmark's suffix and a one-word answer
SUFFIXES = ("\nAnswer the question using a single word or phrase.", " Please answer this question with one word.")
YES_NO_SUFFIX = " Please answer yes or no."

SHORT_PROMPTS = (
    "Describe the image briefly.",
    "Write a short caption for this image.",
    "Give a brief description of the image.",
    "What is shown in this image?",
)
DETAILED_PROMPTS = (
    "Please describe this image in detail.",
    "Please help me describe the image in detail.",
    "Describe the image in detail.",
    "Describe this image.",
    "What do you see in this picture?",
)
LIST_PROMPTS = ("List the objects in the image.", "What objects are in the image?", "Which objects can you see?")

# With yes/no questions alone, a small model stays at chance; an equal number of forced choices teaches it to look.
_KINDS = ("existence", "choice", "counting", "position", "colour", "place")
_CUMULATIVE = np.cumsum((0.33, 0.33, 0.11, 0.11, 0.08, 0.04))
_MULTI_KINDS = tuple(questions.MULTI)


def sample_conversation(seed: int, index: int, split: str = "train") -> tuple[list[np.ndarray], list[tuple[str, str]]]:
    """Conversation `index` of the stream `seed`.

    Returns:
        images: one to four uint8 arrays [96, 96, 3].
        turns: (question, answer) pairs, all about these images; the chat template puts the images before the first.
    """
    scenes, turns = sample_text(seed, index, split)
    return [render(scene) for scene in scenes], turns


def sample_text(
    seed: int, index: int, split: str = "train", hard: float | None = questions.HARD_NEGATIVES
) -> tuple[list[Scene], list[tuple[str, str]]]:
    """The scenes and turns of `sample_conversation`, without drawing the images.

    For questions of existence and choice about one image, `questions.absent_category` draws absent objects, with
    `hard`.
    """
    # The leading number separates this stream from the scenes of the written splits, whose seeds begin with 0 to 2.
    rng = np.random.default_rng([11, SPLITS[split], seed, index])
    if rng.random() < MULTI_IMAGE:
        scenes = several_scenes(rng, split)
        return scenes, _turns(lambda: _multi_question(scenes, rng), 5, rng)
    scene = sample_scene(rng, split)
    turns = _turns(lambda: _single_question(scene, rng, hard), 6, rng)
    turns.insert(0 if rng.random() < 0.5 else len(turns), caption_turn(scene, rng))
    return [scene], turns


def several_scenes(rng: np.random.Generator, split: str) -> list[Scene]:
    """Two to four scenes for joint questions."""
    count = int(rng.choice((2, 3, 4), p=(0.6, 0.25, 0.15)))
    first = sample_scene(rng, split)
    alike = rng.random() < 0.6  # images of one place share objects, so that both answers occur
    return [first, *(sample_scene(rng, split, first.kind if alike else None) for _ in range(count - 1))]


def _turns(draw: Callable[[], Question], count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Turns with `count` different questions from `draw`; fewer if a simple scene keeps giving the same questions."""
    by_text: dict[str, Question] = {}
    for _ in range(3 * count):
        question = draw()
        by_text.setdefault(question.text, question)
        if len(by_text) == count:
            break
    return [_turn(question, rng) for question in by_text.values()]


def _multi_question(scenes: list[Scene], rng: np.random.Generator) -> Question:
    while True:
        question = questions.MULTI[_MULTI_KINDS[rng.integers(len(_MULTI_KINDS))]](scenes, rng)
        if question is not None:
            return question


def _single_question(scene: Scene, rng: np.random.Generator, hard: float | None) -> Question:
    while True:
        kind = _KINDS[min(int(_CUMULATIVE.searchsorted(rng.random())), len(_KINDS) - 1)]
        options = {"hard": hard} if kind in ("existence", "choice") else {}
        question = questions.SINGLE[kind](scene, rng, **options)
        if question is not None:
            return question


def _turn(question: Question, rng: np.random.Generator) -> tuple[str, str]:
    """The question in one of two forms: plain with a sentence as answer, or with a suffix and a one-word answer."""
    if rng.random() >= ONE_WORD:
        return question.text, question.full
    return question.text + any_suffix(question, rng), question.short


def any_suffix(question: Question, rng: np.random.Generator) -> str:
    """One of the suffixes that ask for the short answer of `question`."""
    suffixes = (*SUFFIXES, YES_NO_SUFFIX) if question.short in ("Yes", "No") else SUFFIXES
    return suffixes[rng.integers(len(suffixes))]


def suffix(question: Question) -> str:
    """The benchmark's suffix that asks for a short answer."""
    return YES_NO_SUFFIX if question.short in ("Yes", "No") else SUFFIXES[0]


def caption_turn(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A request for a short, detailed or listing description, and its answer, wrong as often as training captions."""
    noisy = bool(rng.random() < captions.NOISE)
    draw = rng.random()
    if draw < 0.35:
        style = captions.SHORT_STYLES[rng.integers(2)]
        return SHORT_PROMPTS[rng.integers(len(SHORT_PROMPTS))], captions.caption(scene, style, rng, noisy)
    if draw < 0.85:
        prompt = DETAILED_PROMPTS[rng.integers(len(DETAILED_PROMPTS))]
        return prompt, captions.caption(scene, "detailed", rng, noisy)
    return LIST_PROMPTS[rng.integers(len(LIST_PROMPTS))], captions.caption(scene, "list", rng, noisy)
