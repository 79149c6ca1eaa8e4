"""What a pocket checkpoint can and cannot do: POPE, captions, forced choice and the rest, on the test split, greedy.

    python tools/pocket_report.py --model pocket --images 300 --out runs/pocket_report

Writes `report.json` and `report.md` (figures with 95 % bootstrap intervals, images resampled).
"""

import datetime
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

import numpy as np
from tqdm import tqdm

from lvlm_jax import LVLM
from lvlm_jax.cli import common
from lvlm_jax.pocket import catalogue, splits
from lvlm_jax.pocket.scenes import scene_at
from lvlm_jax.weights import names

ONE_WORD = "\nAnswer the question using a single word or phrase."
DETAILED = "Please describe this image in detail."
RESAMPLES = 2000
# Longest names first, so that a teddy bear is no bear and a hot dog no dog.
FORMS = {form: name for name in catalogue.CATEGORIES for form in (name, catalogue.plural(name))}
NAMED = re.compile(r"\b(" + "|".join(sorted(map(re.escape, FORMS), key=len, reverse=True)) + r")\b")


def mentioned(text: str) -> set[str]:
    """Categories that a text names."""
    return {FORMS[form] for form in NAMED.findall(text.lower())}


def repeats(text: str) -> bool:
    """Whether a text runs in circles: some sentence occurs in it twice."""
    sentences = [part.strip() for part in text.split(".") if part.strip()]
    return len(set(sentences)) < len(sentences)


def interval(totals: np.ndarray, counts: np.ndarray) -> list[float]:
    """95 % bootstrap interval of sum(totals) / sum(counts), one entry per image, images resampled."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(totals), (RESAMPLES, len(totals)))
    values = totals[drawn].sum(axis=1) / np.maximum(counts[drawn].sum(axis=1), 1)
    return [round(float(bound), 4) for bound in np.quantile(values, (0.025, 0.975))]


def rate(scores: dict[str, list[float]]) -> dict:
    """A mean of scores that are grouped by image, with its interval and how many scores there are."""
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
    """Asks a model many questions about the pictures of one folder."""

    def __init__(self, model: LVLM, folder: Path, batch: int):
        self.model, self.folder, self.batch = model, folder, batch

    def ask(
        self, rows: list[dict], title: str, suffix: str = "", max_new_tokens: int = 12
    ) -> list[tuple[str, bool]]:
        """Answers to `rows` (of `text` and `image` or `images`), and whether each answer ended by itself."""
        # Alike prompts go together, so that little of a batch is padding and few programs are compiled.
        order = sorted(range(len(rows)), key=lambda i: (len(self._names(rows[i])), len(rows[i]["text"])))
        answers: list = [None] * len(rows)
        for start in tqdm(range(0, len(order), self.batch), desc=title, mininterval=5):
            chosen = order[start : start + self.batch]
            filled = chosen + [chosen[-1]] * (self.batch - len(chosen))  # the last batch keeps its shape
            out = self.model.generate(
                [self._conversation(rows[i], suffix) for i in filled], max_new_tokens=max_new_tokens
            )
            for position, i in enumerate(chosen):
                answers[i] = (out.text[position].strip(), out.finish_reason[position] == "stop")
        return answers

    def accuracy(self, rows: list[dict], title: str) -> list[bool]:
        """Whether each one-word answer is the label."""
        answers = self.ask(rows, title, ONE_WORD)
        return [_bare(text) == _bare(row["label"]) for (text, _), row in zip(answers, rows, strict=True)]

    def _names(self, row: dict) -> list[str]:
        return row["images"] if "images" in row else [row["image"]]

    def _conversation(self, row: dict, suffix: str) -> list[dict]:
        pictures = [
            {"type": "image", "image": str(self.folder / "images" / name)} for name in self._names(row)
        ]
        return [{"role": "user", "content": [*pictures, {"type": "text", "text": row["text"] + suffix}]}]


def _bare(text: str) -> str:
    return re.sub(r"^(an?|the) |[.]$", "", text.strip().lower())


def _lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def pope(examiner: Examiner) -> dict:
    """The three POPE files as they come, and the random one with every question put to another picture."""
    found = {}
    for strategy in ("random", "popular", "adversarial", "shuffled"):
        rows = _lines(
            examiner.folder / "pope" / f"pope_{'random' if strategy == 'shuffled' else strategy}.json"
        )
        asked = rows
        if strategy == "shuffled":
            names = sorted({row["image"] for row in rows})
            other = dict(zip(names, np.roll(names, 7).tolist(), strict=True))
            asked = [row | {"image": other[row["image"]]} for row in rows]
        said = [
            text.lower().startswith("yes")
            for text, _ in examiner.ask(asked, f"POPE {strategy}", max_new_tokens=4)
        ]
        right = [yes == (row["label"] == "yes") for yes, row in zip(said, rows, strict=True)]
        keys = [row["image"] for row in rows]
        found[f"POPE {strategy}: accuracy"] = rate(grouped(keys, right))
        found[f"POPE {strategy}: yes share"] = rate(grouped(keys, said))
    return found


def descriptions(examiner: Examiner, images: int, seed: int) -> dict:
    """CHAIR, coverage, loops and endings of detailed descriptions."""
    scenes = [scene_at("test", index, seed) for index in range(images)]
    names = [splits.file_name("test", index) for index in range(images)]
    answers = examiner.ask([{"image": name, "text": DETAILED} for name in names], "descriptions", "", 160)
    said = [mentioned(text) for text, _ in answers]
    there = [set(scene.counts) for scene in scenes]
    pairs = list(zip(names, said, there, strict=True))
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
    """Forced choice, counting, position, colour, place; and several images by how many there are."""
    found = {}
    for kind in ("choice", "counting", "position", "color", "place"):
        rows = _lines(examiner.folder / "questions" / f"{kind}.jsonl")
        found[f"{kind}: accuracy"] = rate(
            grouped([row["image"] for row in rows], examiner.accuracy(rows, kind))
        )
    rows = _lines(examiner.folder / "questions" / "multi_image.jsonl")
    right = examiner.accuracy(rows, "several images")
    for count in (2, 3, 4):
        chosen = [i for i, row in enumerate(rows) if len(row["images"]) == count]
        found[f"{count} images: accuracy"] = rate(
            grouped([rows[i]["images"][0] for i in chosen], [right[i] for i in chosen])
        )
    for kind in sorted({row["kind"] for row in rows}):
        chosen = [i for i, row in enumerate(rows) if row["kind"] == kind]
        found[f"several images, {kind}: accuracy"] = rate(
            grouped([rows[i]["images"][0] for i in chosen], [right[i] for i in chosen])
        )
    return found


def markdown(figures: dict, about: dict) -> str:
    """The figures as a table."""
    head = ", ".join(f"{key} {value}" for key, value in about.items())
    lines = [head, "", "| figure | value | 95 % interval | n |", "|---|---|---|---|"]
    for name, figure in figures.items():
        low, high = figure["interval"]
        lines.append(f"| {name} | {figure['value']:.3f} | {low:.3f} to {high:.3f} | {figure['n']} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Examine the checkpoint that the arguments name and write what was found."""
    parser = common.Parser(prog="pocket_report.py", description=__doc__)
    parser.add_argument(
        "--model", default="pocket", help="checkpoint folder (default: the one inside the package)"
    )
    parser.add_argument(
        "--images", type=common.number(int, 20), default=300, metavar="N", help="test images (default 300)"
    )
    parser.add_argument(
        "--batch", type=common.number(int, 1), default=32, metavar="N", help="questions at once (default 32)"
    )
    parser.add_argument(
        "--seed", type=common.number(int, 0), default=0, metavar="N", help="of the test split (default 0)"
    )
    parser.add_argument("--out", default="runs/pocket_report", metavar="DIR", help="where the report goes")
    flags = parser.parse_args(arguments)
    model = LVLM.from_pretrained(names.checkpoint(flags.model))
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "split"
        splits.write_split(folder, "test", flags.images, flags.seed)
        examiner = Examiner(model, folder, flags.batch)
        figures = pope(examiner) | descriptions(examiner, flags.images, flags.seed) | questions(examiner)
    about = {
        "date": datetime.date.today().isoformat(),
        "images": flags.images,
        "seed": flags.seed,
        "seconds": round(time.monotonic() - began),
    }
    out = Path(flags.out)
    os.makedirs(out, exist_ok=True)
    (out / "report.json").write_text(
        json.dumps({"about": about, "figures": figures}, indent=1), encoding="utf-8"
    )
    (out / "report.md").write_text(markdown(figures, about), encoding="utf-8")
    print(markdown(figures, about))
    return 0


if __name__ == "__main__":
    common.run(main)
