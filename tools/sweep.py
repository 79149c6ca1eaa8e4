"""Answer the same questions under many strengths of one method, in one program and one pass over the weights.

    python tools/sweep.py --method cmac --grid alpha=0,1,3 --grid gamma=1,2 --image a.jpg --prompt "What is this?"
    python tools/sweep.py --method sevi --grid omega=0.5,1,2,4 --question-file coco_pope_random.json \
        --image-folder val2014 --out sweep.jsonl

Prints a table: for every setting how many answers differ from greedy, their mean length, and, where the question
file has labels "yes" and "no", the accuracy by the first of these words. `--out` keeps every answer.
"""

import dataclasses
import itertools
import json
import pathlib
import re
import sys

if __name__ == "__main__":  # so that it runs from a clone that is not installed
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from lvlm_jax import LVLM, methods
from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.questions import conversation, read_questions
from lvlm_jax.methods import parse
from lvlm_jax.weights import names


def command_line(words: list[str]):
    """The command line, with `method` built (the point all others differ from) and `points`, the grid."""
    first = common.Parser(add_help=False)
    first.add_argument("--method")
    chosen, _ = first.parse_known_args([parse.hyphenated(word) for word in words])
    parser = common.Parser(
        prog="sweep.py", description=__doc__, epilog="methods and settings:\n\n" + parse.methods_help()
    )
    add = parser.add_argument
    add(
        "--model-path",
        "--model",
        metavar="PATH",
        default="pocket",
        help="checkpoint folder or hub id (default pocket)",
    )
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="(default auto)")
    add("--method", metavar="NAME", required=True, help="the method; other settings than swept ones as flags")
    add(
        "--grid",
        metavar="NAME=A,B,…",
        action="append",
        required=True,
        help="values of one strength; repeat it for a product",
    )
    add("--image", action="append", default=[], metavar="FILE", help="a picture; repeat it for several")
    add("--prompt", action="append", default=[], metavar="TEXT", help="a question; repeat it for several")
    add("--question-file", metavar="FILE", help="JSON lines {question_id, image, text, label}")
    add("--image-folder", metavar="FOLDER", default=".", help="where those images are")
    add("--limit", type=common.number(int, low=1), metavar="N", help="only the first questions of the file")
    add(
        "--batch-size",
        type=common.number(int, low=1),
        default=8,
        metavar="N",
        help="questions at once (default 8)",
    )
    add("--points", type=common.number(int, low=1), default=16, metavar="N",
        help="settings in one program; each keeps its own caches (default 16)")  # fmt: skip
    add("--max-new-tokens", type=common.number(int, low=1), default=64, metavar="N", help="(default 64)")
    add("--out", metavar="FILE", help="JSON lines {settings, question_id, text}")
    if chosen.method:
        parse.add_method_flags(parser, chosen.method)
    arguments = parser.parse_args(words)
    arguments.method = parse.build_method(arguments.method, arguments)
    arguments.points_of_grid = grid(arguments.method, arguments.grid)
    return arguments


def grid(method: methods.Method, axes: list[str]) -> list[dict[str, float]]:
    """The product of `name=a,b,…` axes, as settings of `method`.

    Raises:
        LVLMError: not a list of numbers, or not a strength of the method.
    """
    known = [f.name for f in dataclasses.fields(method) if "low" in f.metadata]
    values = {}
    for axis in axes:
        name, _, text = axis.partition("=")
        name = name.replace("-", "_")
        if name not in known:
            raise LVLMError(
                f"--grid {axis}: {method.label} has no strength {name!r}; expected one of {', '.join(known)}"
            )
        try:
            values[name] = [float(one) for one in text.split(",")]
        except ValueError as error:
            raise LVLMError(f"--grid {axis}: expected numbers, as in {name}=0,0.5,1") from error
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def questions_of(arguments) -> list[tuple[object, list[dict], str | None]]:
    """(id, conversation, label or None) of every question.

    Raises:
        LVLMError: no question, or an unreadable file, line or image.
    """
    if arguments.question_file:
        found, wrong = read_questions(arguments.question_file)
        if wrong:
            line, what = next(iter(wrong.items()))
            raise LVLMError(f"{arguments.question_file}, line {line}: {what}")
        labels = _labels(arguments.question_file)
        folder = pathlib.Path(arguments.image_folder)
        return [
            (
                q.question_id,
                conversation([folder / name for name in q.image_names], q.text),
                labels.get(q.line),
            )
            for q in found[: arguments.limit]
        ]
    if not arguments.prompt:
        raise LVLMError('nothing to ask; give --prompt "…" or --question-file')
    return [(i, conversation(arguments.image, text), None) for i, text in enumerate(arguments.prompt)]


def _labels(path: str) -> dict[int, str]:
    lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    entries = {number: json.loads(line) for number, line in enumerate(lines, 1) if line.strip()}
    return {number: str(entry["label"]).lower() for number, entry in entries.items() if "label" in entry}


def said(text: str) -> str | None:
    """The first "yes" or "no" of an answer."""
    found = re.search(r"\b(yes|no)\b", text.lower())
    return found and found[1]


def main(words: list[str]) -> int:
    """Run the grid and print the table."""
    arguments = command_line(words)
    asked = questions_of(arguments)
    points = arguments.points_of_grid
    settings = [dataclasses.replace(arguments.method, **point) for point in points]
    model = LVLM.from_pretrained(names.checkpoint(arguments.model_path), dtype=names.dtype(arguments.dtype))
    size = arguments.batch_size
    greedy: list[str] = []
    texts: list[list[str]] = [[] for _ in points]
    lengths: list[list[int]] = [[] for _ in points]
    for start in tqdm(range(0, len(asked), size), desc="batches", disable=len(asked) <= size):
        messages = [one[1] for one in asked[start : start + size]]
        greedy += model.generate(messages, max_new_tokens=arguments.max_new_tokens).text
        for first in range(0, len(points), arguments.points):
            part = slice(first, first + arguments.points)
            outputs = model.sweep(messages, settings[part], arguments.max_new_tokens)
            for index, output in enumerate(outputs, first):
                texts[index] += output.text
                lengths[index] += map(len, output.tokens)
    labels = [one[2] for one in asked]
    rows = [["greedy", "", "", _accuracy(greedy, labels)]]
    for point, answers, counts in zip(points, texts, lengths, strict=True):
        changed = sum(a != b for a, b in zip(answers, greedy, strict=True)) / len(answers)
        name = " ".join(f"{key}={value:g}" for key, value in point.items())
        rows.append([name, f"{changed:.3f}", f"{sum(counts) / len(counts):.1f}", _accuracy(answers, labels)])
    _print([["settings", "changed", "tokens", "accuracy"], *rows])
    if arguments.out:
        with open(arguments.out, "w", encoding="utf-8") as file:
            for point, answers in zip(points, texts, strict=True):
                for (identity, _, _), text in zip(asked, answers, strict=True):
                    file.write(json.dumps({"settings": point, "question_id": identity, "text": text}) + "\n")
    return 0


def _accuracy(answers: list[str], labels: list[str | None]) -> str:
    pairs = [
        (said(text), label) for text, label in zip(answers, labels, strict=True) if label in ("yes", "no")
    ]
    return f"{sum(a == b for a, b in pairs) / len(pairs):.3f}" if pairs else ""


def _print(table: list[list[str]]) -> None:
    table = [row[: 4 if any(line[3] for line in table[1:]) else 3] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    common.run(main)
