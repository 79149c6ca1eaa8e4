"""Filters candidates for preference pairs, holds some out for validation, and computes figures about the pairs."""

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lvlm_jax.errors import LVLMError
from lvlm_jax.training.data.prompts import Prompt

# Reasons for dropping a candidate; the first that applies counts.
REASONS = {
    "empty": "one of the answers is empty",
    "equal": "both are equal apart from case, blanks and closing punctuation",
    "unfinished": "an answer was cut at --max-new-tokens",
    "too_long": "an answer has more words than --max-words",
    "near_duplicate": "the word overlap is above --near-duplicate",
}


ANSWERS = 8  # a kind of prompt with more different answers than this is not balanced


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Two answers to one prompt.

    Attributes:
        chosen: the answer to learn from, corrected.
        rejected: the answer to learn to avoid.
        corrected: whether the corrector changed the chosen answer.
        unfinished: whether one of the answers was cut off.
        own: the model's answer on the chosen side, before any correction; None if no model was asked.
        rung: the source of the rejected answer, one of `ladder.RUNGS`; "" without a ladder.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    corrected: bool = False
    unfinished: bool = False
    own: str | None = None
    rung: str = ""


@dataclasses.dataclass(frozen=True)
class Filters:
    """Filters besides those for empty and equal answers, which no trainer can use.

    Attributes:
        near_duplicate: the largest allowed `overlap`; 1 allows all.
        max_words: limit for either answer; 0 allows any number.
        unfinished: whether to drop answers that were cut off; such an answer would teach the model to stop too early.
    """

    near_duplicate: float = 0.98
    max_words: int = 300
    unfinished: bool = True

    def reason(self, candidate: Candidate) -> str | None:
        """The reason (in REASONS) to drop a candidate, or None."""
        answers = (candidate.chosen, candidate.rejected)
        if not all(answer.strip() for answer in answers):
            return "empty"
        if normalised(candidate.chosen) == normalised(candidate.rejected):
            return "equal"
        if self.unfinished and candidate.unfinished:
            return "unfinished"
        if self.max_words and max(len(words(answer)) for answer in answers) > self.max_words:
            return "too_long"
        if self.near_duplicate < 1 and overlap(*answers) > self.near_duplicate:
            return "near_duplicate"
        return None


def normalised(text: str) -> str:
    """A text in lower case, with single blanks, without quotation marks around it or punctuation at its end."""
    folded = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    return folded.strip("\"'").rstrip(" .,;:!\"'")


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def overlap(first: str, second: str) -> float:
    """ROUGE-L's F1 of the words: 2 · LCS / (n + m). LCS is the length of the longest common subsequence, and
    n and m are the numbers of words. The overlap of equal texts is 1."""
    first, second = words(first), words(second)
    if not first or not second:
        return float(first == second)
    lengths = [0] * (len(second) + 1)  # the LCS of the words so far with each prefix of `second`
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if word == other else max(above, lengths[column - 1])
            diagonal = above
    return 2 * lengths[-1] / (len(first) + len(second))


def sift(candidates: Sequence[Candidate], filters: Filters) -> tuple[list[Candidate], dict[str, int]]:
    """The candidates to keep, and how many are dropped for each of REASONS."""
    reasons = [filters.reason(candidate) for candidate in candidates]
    counts = Counter(reasons)
    remaining = [candidate for candidate, reason in zip(candidates, reasons, strict=True) if reason is None]
    return remaining, {reason: counts[reason] for reason in REASONS}


def balance(candidates: Sequence[Candidate], seed: int = 0) -> list[Candidate]:
    """Keeps equally many candidates with each chosen answer, for each kind of prompt and number of images.

    The kind is the prompt's field `kind`. Answers are the same if they have the same `answer_type` or,
    without that field, the same words. Which candidates remain is drawn at random; their order stays. Kinds with
    more than `ANSWERS` different answers do not change, because no constant answer fits them.
    """
    kinds: dict[tuple, dict[str, list[int]]] = {}
    for place, candidate in enumerate(candidates):
        extra = candidate.prompt.extra
        answer = str(extra.get("answer_type") or normalised(candidate.chosen))
        group = kinds.setdefault((str(extra.get("kind", "")), len(candidate.prompt.images)), {})
        group.setdefault(answer, []).append(place)
    rng, kept_places = np.random.default_rng([29, seed]), []
    for answers in kinds.values():
        fewest = min(map(len, answers.values()))
        for places in answers.values():
            kept_places += places if len(answers) > ANSWERS else rng.permutation(places)[:fewest].tolist()
    return [candidates[place] for place in sorted(kept_places)]


def hold_out(candidates: Sequence[Candidate], share: float, seed: int = 0) -> tuple[list[Candidate], list[Candidate]]:
    """Splits candidates into training and validation candidates that have no common images; their order stays.

    Candidates that share images, directly or through others, stay together. These groups are visited in random order,
    and a group is held out if the candidates held out so far and the group are at most `share` of all candidates.

    Raises:
        LVLMError: the groups are too large, so that one side would be empty.
    """
    groups = _image_groups(candidates)
    limit = min(max(1, round(share * len(candidates))), len(candidates) - 1)
    held_out: set[int] = set()
    for index in np.random.default_rng([seed, len(groups)]).permutation(len(groups)):
        if len(held_out) + len(groups[index]) <= limit:
            held_out.update(groups[index])
    if not held_out:
        raise LVLMError(
            f"{share:g} of {len(candidates)} pairs cannot be held out: pairs with a common image stay together, and "
            f"the smallest group has {min(map(len, groups))}; give more prompts, a larger --holdout, or --holdout 0"
        )
    training = [candidate for place, candidate in enumerate(candidates) if place not in held_out]
    return training, [candidates[place] for place in sorted(held_out)]


def _image_groups(candidates: Sequence[Candidate]) -> list[list[int]]:
    """Groups of indices of candidates that share images, directly or through others."""
    numbers: dict[Path | bytes, int] = {}
    images = [
        [
            numbers.setdefault(image if isinstance(image, bytes) else image.resolve(), len(numbers))
            for image in candidate.prompt.images
        ]
        for candidate in candidates
    ]
    edges = np.array([(first, other) for first, *others in images for other in others], int).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges)), edges.T), shape=(len(numbers), len(numbers)))
    _, labels = connected_components(graph, directed=False)
    groups: dict[int, list[int]] = {}
    for place, (first, *_) in enumerate(images):
        groups.setdefault(labels[first], []).append(place)
    return list(groups.values())


def statistics(
    prompts: int, candidates: Sequence[Candidate], pairs: Sequence[Candidate], dropped: dict[str, int]
) -> dict:
    """Figures about a set of pairs, as JSON values.

    Returns:
        prompts: number of prompts; failed: how many of them could not be answered.
        kept: number of pairs; dropped: how many candidates were dropped for each of REASONS.
        corrected: share of the kept pairs whose chosen answer the corrector changed.
        chosen_longer: share of the kept pairs whose chosen answer has more words.
        words: mean, median and largest number of words of the kept answers.
        images: how many kept pairs have one image, two images, and so on.
    """
    counts = Counter(len(candidate.prompt.images) for candidate in pairs)
    lengths = {
        side: np.array([len(words(getattr(candidate, side))) for candidate in pairs]) for side in ("chosen", "rejected")
    }
    return {
        "prompts": prompts,
        "failed": prompts - len(candidates),
        "kept": len(pairs),
        "dropped": dropped,
        "corrected": _share([candidate.corrected for candidate in pairs]),
        "chosen_longer": _share(lengths["chosen"] > lengths["rejected"]),
        "words": {
            side: {
                "mean": round(float(values.mean()), 2),
                "median": float(np.median(values)),
                "largest": int(values.max()),
            }
            for side, values in lengths.items()
            if len(values)
        },
        "images": {str(count): counts[count] for count in sorted(counts)},
    }


def _share(flags: Sequence[bool]) -> float | None:
    """The mean of flags; None if there are no flags."""
    return round(float(np.mean(flags)), 4) if len(flags) else None
