"""Measures the abilities of a pocket checkpoint by greedy answers on the test split: POPE, captions, forced choice."""

import itertools
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lvlm_jax.journal.progress import Progress
from lvlm_jax.lvlm import LVLM
from lvlm_jax.pocket import catalogue, splits
from lvlm_jax.pocket.scenes import scene_at

ONE_WORD = "\nAnswer the question using a single word or phrase."
DETAILED = "Please describe this image in detail."
RESAMPLES = 2000
PARTS = ("pope", "descriptions", "questions", "spoken")
# Questions without an image that are in no training text of the two models, with a keyword of the right answer.
SPOKEN = {
    "What is the capital of France?": "paris",
    "What is the capital of Italy?": "rome",
    "What color is the sky on a clear day?": "blue",
    "How many legs does a dog have?": "four",
    "Who wrote Hamlet?": "shakespeare",
}
# Longest names first, so that a teddy bear is not a bear and a hot dog is not a dog.
FORMS = {form: name for name in catalogue.CATEGORIES for form in (name, catalogue.plural(name))}
NAMED = re.compile(r"\b(" + "|".join(sorted(map(re.escape, FORMS), key=len, reverse=True)) + r")\b")


def mentioned(text: str) -> set[str]:
    """Categories that a text names."""
    return {FORMS[form] for form in NAMED.findall(text.lower())}


def repeats(text: str) -> bool:
    """Whether a text repeats itself: some sentence occurs twice."""
    sentences = [part.strip() for part in text.split(".") if part.strip()]
    return len(set(sentences)) < len(sentences)


def interval(totals: np.ndarray, counts: np.ndarray) -> list[float]:
    """95 % bootstrap interval of sum(totals) / sum(counts), one entry per image, images resampled."""
    rng = np.random.default_rng(0)
    indices = rng.integers(0, len(totals), (RESAMPLES, len(totals)))
    values = totals[indices].sum(axis=1) / np.maximum(counts[indices].sum(axis=1), 1)
    return [round(float(bound), 4) for bound in np.quantile(values, (0.025, 0.975))]


def rate(scores: dict[str, list[float]]) -> dict:
    """The mean of scores that are grouped by image, with the mean's interval and the number of scores."""
    totals = np.array([sum(group) for group in scores.values()], float)
    counts = np.array([len(group) for group in scores.values()], float)
    value = totals.sum() / counts.sum()
    return {"value": round(float(value), 4), "interval": interval(totals, counts), "n": int(counts.sum())}


def grouped(keys: list[str], scores: list[float]) -> dict[str, list[float]]:
    """Scores by key, in order of first appearance."""
    groups: dict[str, list[float]] = {}
    for key, score in zip(keys, scores, strict=True):
        groups.setdefault(key, []).append(float(score))
    return groups


class Examiner:
    """Asks a model many questions about the images of one folder."""

    def __init__(self, model: LVLM, folder: Path, batch: int):
        self.model, self.folder, self.batch = model, folder, batch

    def ask(self, rows: list[dict], title: str, suffix: str = "", max_new_tokens: int = 12) -> list[tuple[str, bool]]:
        """Answers to `rows` (with `text` and `image` or `images`), and whether each answer ended by itself."""
        prompts = [(tuple(self._names(row)), row["text"]) for row in rows]
        first = {
            prompt: i for i, prompt in reversed(list(enumerate(prompts)))
        }  # POPE's splits share half of their questions
        # Similar prompts are batched together, so that there is little padding and few programs are compiled.
        order = sorted(first.values(), key=lambda i: (len(prompts[i][0]), len(prompts[i][1])))
        answers: dict[int, tuple[str, bool]] = {}
        with Progress(len(order), title=title) as progress:
            for start in range(0, len(order), self.batch):
                chosen = order[start : start + self.batch]
                padded = chosen + [chosen[-1]] * (self.batch - len(chosen))  # the last batch is padded to full size
                out = self.model.generate(
                    [self._conversation(rows[i], suffix) for i in padded], max_new_tokens=max_new_tokens
                )
                for position, i in enumerate(chosen):
                    answers[i] = (out.text[position].strip(), out.finish_reason[position] == "stop")
                progress.update(len(chosen))
        return [answers[first[prompt]] for prompt in prompts]

    def accuracy(self, rows: list[dict], title: str) -> list[bool]:
        """Whether each one-word answer equals the label."""
        answers = self.ask(rows, title, ONE_WORD)
        return [_bare(text) == _bare(row["label"]) for (text, _), row in zip(answers, rows, strict=True)]

    def _names(self, row: dict) -> list[str]:
        return row["images"] if "images" in row else [row["image"]]

    def _conversation(self, row: dict, suffix: str) -> list[dict]:
        pictures = [{"type": "image", "image": str(self.folder / "images" / name)} for name in self._names(row)]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": row["text"] + suffix}]}]


def _bare(text: str) -> str:
    return re.sub(r"^(an?|the) |[.]$", "", text.strip().lower())


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pope(examiner: Examiner) -> dict:
    """Accuracy and share of yes on POPE's three files, and on the random file with the images exchanged."""
    strategies = ("random", "popular", "adversarial")
    rows_by_strategy = {name: _lines(examiner.folder / "pope" / f"pope_{name}.json") for name in strategies}
    names = sorted({row["image"] for row in rows_by_strategy["random"]})
    other = dict(zip(names, np.roll(names, 7).tolist(), strict=True))
    all_rows = rows_by_strategy | {
        "shuffled": [row | {"image": other[row["image"]]} for row in rows_by_strategy["random"]]
    }
    answers = iter(examiner.ask([row for rows in all_rows.values() for row in rows], "POPE", max_new_tokens=4))
    figures = {}
    for strategy in all_rows:
        rows = rows_by_strategy.get(strategy, rows_by_strategy["random"])
        is_yes = [text.lower().startswith("yes") for text, _ in itertools.islice(answers, len(rows))]
        right = [yes == (row["label"] == "yes") for yes, row in zip(is_yes, rows, strict=True)]
        keys = [row["image"] for row in rows]
        figures[f"POPE {strategy}: accuracy"] = rate(grouped(keys, right))
        figures[f"POPE {strategy}: yes share"] = rate(grouped(keys, is_yes))
    return figures


def descriptions(examiner: Examiner, images: int, seed: int) -> dict:
    """CHAIR of detailed descriptions; how often they name present objects, end by themselves and repeat themselves."""
    scenes = [scene_at("test", index, seed) for index in range(images)]
    names = [splits.file_name("test", index) for index in range(images)]
    answers = examiner.ask([{"image": name, "text": DETAILED} for name in names], "descriptions", "", 160)
    named_sets = [mentioned(text) for text, _ in answers]
    present_sets = [set(scene.counts) for scene in scenes]
    pairs = list(zip(names, named_sets, present_sets, strict=True))
    return {
        "descriptions: CHAIR_S": rate({name: [bool(s - t)] for name, s, t in pairs}),
        "descriptions: CHAIR_I": rate({name: [word not in t for word in s] for name, s, t in pairs}),
        "descriptions: objects named": rate({name: [word in s for word in t] for name, s, t in pairs}),
        "descriptions: end by themselves": rate(
            {name: [ended] for name, (_, ended) in zip(names, answers, strict=True)}
        ),
        "descriptions: run in circles": rate(
            {name: [repeats(text)] for name, (text, _) in zip(names, answers, strict=True)}
        ),
    }


def questions(examiner: Examiner) -> dict:
    """Accuracy by kind of question, and on questions about several images also by number of images."""
    figures = {}
    for kind in ("choice", "counting", "position", "color", "place"):
        rows = _lines(examiner.folder / "questions" / f"{kind}.jsonl")
        figures[f"{kind}: accuracy"] = rate(grouped([row["image"] for row in rows], examiner.accuracy(rows, kind)))
    rows = _lines(examiner.folder / "questions" / "multi_image.jsonl")
    right = examiner.accuracy(rows, "several images")
    for count in (2, 3, 4):
        chosen = [i for i, row in enumerate(rows) if len(row["images"]) == count]
        figures[f"{count} images: accuracy"] = rate(
            grouped([rows[i]["images"][0] for i in chosen], [right[i] for i in chosen])
        )
    for kind in sorted({row["kind"] for row in rows}):
        chosen = [i for i, row in enumerate(rows) if row["kind"] == kind]
        figures[f"several images, {kind}: accuracy"] = rate(
            grouped([rows[i]["images"][0] for i in chosen], [right[i] for i in chosen])
        )
    return figures


def spoken(examiner: Examiner) -> dict:
    """The share of correct answers to questions without an image; a language model can know the answers."""
    replies = examiner.ask([{"images": [], "text": text} for text in SPOKEN], "without an image", "", 40)
    right = [word in text.lower() for word, (text, _) in zip(SPOKEN.values(), replies, strict=True)]
    return {"questions without an image: answered": rate(grouped(list(SPOKEN), right))}


def examine(model: LVLM, images: int, batch: int, seed: int = 0, parts: Sequence[str] = PARTS) -> dict[str, dict]:
    """All figures, each `{value, interval, n}`, of a model on the first `images` scenes of the test split.

    Args:
        parts: the parts to run, from `PARTS`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "split"
        splits.write_split(folder, "test", images, seed)
        examiner = Examiner(model, folder, batch)
        figures: dict[str, dict] = {}
        runs = {
            "pope": lambda: pope(examiner),
            "descriptions": lambda: descriptions(examiner, images, seed),
            "questions": lambda: questions(examiner),
            "spoken": lambda: spoken(examiner),
        }
        for name in parts:
            figures |= runs[name]()
        return figures


def markdown(figures: dict, about: dict) -> str:
    """The figures as a Markdown table, below a line with `about`."""
    head = ", ".join(f"{key} {value}" for key, value in about.items())
    lines = [head, "", "| figure | value | 95 % interval | n |", "|---|---|---|---|"]
    for name, figure in figures.items():
        low, high = figure["interval"]
        lines.append(f"| {name} | {figure['value']:.3f} | {low:.3f} to {high:.3f} | {figure['n']} |")
    return "\n".join(lines) + "\n"
