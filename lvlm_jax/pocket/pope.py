"""POPE questions by the official sampling rule, for any set of images with known objects.

Source: Li et al. 2023, "Evaluating Object Hallucination in Large Vision-Language Models", section 5.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import permutations

import numpy as np

from lvlm_jax.errors import LVLMError
from lvlm_jax.pocket.questions import article

STRATEGIES = ("random", "popular", "adversarial")
PER_IMAGE = 3  # questions with the answer yes, and the same number with no


def pope_rows(
    images: Sequence[tuple[str, Sequence[str]]], strategy: str, categories: Sequence[str], rng: np.random.Generator
) -> list[dict]:
    """Questions about every image with at least three categories: three present and three absent ones, alternating.

    The absent categories are, for "random": any; for "popular": those that occur in most images; for "adversarial": for
    each present category in a question, the one that shares most images with it. Frequencies are those in `images`;
    ties are broken by the order of `categories`. No category occurs twice for one image.

    Args:
        images: (file name, distinct categories present); the questions are about the first three categories.
        strategy: one of `STRATEGIES`.
        categories: all category names.
        rng: used only by "random".

    Returns:
        Rows of a POPE file: `question_id` (from 1), `image`, `text`, `label`.

    Raises:
        LVLMError: the strategy is unknown, or no image shows three categories.
    """
    if strategy not in STRATEGIES:
        raise LVLMError(f"POPE strategy {strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}")
    frequency = Counter(name for _, present in images for name in present)
    together = Counter(pair for _, present in images for pair in permutations(present, 2))
    rows: list[dict] = []

    def ask(image: str, category: str, label: str) -> None:
        text = f"Is there {article(category)} in the image?"
        rows.append({"question_id": len(rows) + 1, "image": image, "text": text, "label": label})

    for image, present in images:
        if len(present) < PER_IMAGE:
            continue
        absent = [name for name in categories if name not in present]
        for present_name in present[:PER_IMAGE]:
            if strategy == "random":
                choice = absent[rng.integers(len(absent))]
            elif strategy == "popular":
                choice = max(absent, key=lambda name: frequency[name])
            else:
                choice = max(absent, key=lambda name: together[present_name, name])  # noqa: B023 (used at once)
            absent.remove(choice)
            ask(image, present_name, "yes")
            ask(image, choice, "no")
    if not rows:
        raise LVLMError(
            f"none of the {len(images)} images shows {PER_IMAGE} categories, as POPE needs; give more images"
        )
    return rows
