"""What every method does to the pocket model: POPE and detailed descriptions of the test split, against greedy.

    python tools/pocket_methods.py --images 200 --out runs/pocket_methods

Writes `table.md` and `table.json`: figures with 95 % bootstrap intervals (images resampled), the difference to greedy
with its paired interval, how many answers changed. Stopped and started again, it goes on where it was.
"""

import dataclasses
import datetime
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from lvlm_jax import LVLM, cli
from lvlm_jax.evaluation import BENCHMARKS, Data, engine, get, record, statistics
from lvlm_jax.pocket import splits

SETTINGS = Path(__file__).resolve().parents[1] / "configs" / "pocket_methods.py"
FIGURES = {  # column of the table -> protocol and figure
    "POPE random": ("pope", "random: accuracy"),
    "POPE popular": ("pope", "popular: accuracy"),
    "POPE adversarial": ("pope", "adversarial: accuracy"),
    "yes ratio": ("pope", "mean: yes ratio"),
    "CHAIR_S": ("chair", "C_S"),
    "CHAIR_I": ("chair", "C_I"),
    "recall": ("chair", "recall"),
}


def protocols() -> dict:
    """The benchmarks as they are put to the pocket model, whose answers are short."""
    return {
        "pope": dataclasses.replace(
            get("pope/strict"), name="pope/strict, no suffix", suffix="", max_new_tokens=16
        ),
        "chair": dataclasses.replace(get("chair/opera-512"), name="chair/opera-160", max_new_tokens=160),
    }


def settings() -> dict:
    """Name -> method, from configs/pocket_methods.py."""
    spec = importlib.util.spec_from_file_location("pocket_methods", SETTINGS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_methods()


def examine(model, name: str, method, asked: dict, batch: int, out: Path) -> dict:
    """Scores of one method on every benchmark, and its answers."""
    found = {}
    for benchmark, (protocol, questions, files) in asked.items():
        about = record(protocol, questions, files, model="pocket", method=method, seed=0)
        log = out / f"{name.replace(' ', '_')}.{benchmark}.jsonl"
        said = engine.ask(
            model,
            questions,
            protocol,
            method,
            batch_size=batch,
            log=log,
            record=about,
            title=f"{name}, {benchmark}",
        )
        texts = {key: one.text for key, one in said.items()}
        scores = BENCHMARKS[protocol.benchmark].score(questions, texts, protocol)
        found[benchmark] = {"scores": scores, "said": said}
    return found


def compared(found: dict, greedy: dict) -> dict:
    """Figures with intervals and, where this is not greedy itself, differences to it and shares of changed answers."""
    row = {}
    for column, (benchmark, figure) in FIGURES.items():
        scores = found[benchmark]["scores"]
        row[column] = {
            "value": float(scores.values()[figure]),
            "interval": statistics.bootstrap(scores)[figure],
        }
        if found is not greedy:
            change = statistics.paired_bootstrap(scores, greedy[benchmark]["scores"])[figure]
            row[column]["change"] = {"value": change.value, "interval": change.interval}
    for benchmark in found:
        ours, theirs = (one[benchmark]["said"] for one in (found, greedy))
        row[f"changed, {benchmark}"] = sum(ours[key].text != theirs[key].text for key in ours) / len(ours)
    captions = found["chair"]["said"].values()
    row["tokens"] = sum(one.tokens for one in captions) / len(captions)
    return row


def markdown(rows: dict[str, dict]) -> str:
    """The table: value, and in brackets the 95 % interval of the difference to greedy (for greedy of the value)."""
    columns = [*FIGURES, "changed, pope", "changed, chair", "tokens"]
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        cells = []
        for column in FIGURES:
            one = row[column]
            if "change" in one:
                low, high = one["change"]["interval"]
                cells.append(f"{one['value']:.3f} ({low:+.3f} to {high:+.3f})")
            else:
                low, high = one["interval"]
                cells.append(f"{one['value']:.3f} ({low:.3f} to {high:.3f})")
        cells += [f"{row['changed, pope']:.2f}", f"{row['changed, chair']:.2f}", f"{row['tokens']:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    """Run every method and write the table."""
    parser = cli.Parser(prog="pocket_methods.py", description=__doc__)
    parser.add_argument(
        "--images", type=cli.number(int, 20), default=200, metavar="N", help="test images (default 200)"
    )
    parser.add_argument(
        "--batch", type=cli.number(int, 1), default=64, metavar="N", help="questions at once (default 64)"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="only these rows of configs/pocket_methods.py"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/pocket_methods"), metavar="DIR", help="answers and tables"
    )
    flags = parser.parse_args(arguments)
    began = time.monotonic()
    model = LVLM.from_pretrained(cli.checkpoint("pocket"))
    rows: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "split"
        splits.write_split(folder, "test", flags.images, 0)
        asked = {}
        for name, protocol in protocols().items():
            benchmark = BENCHMARKS[protocol.benchmark]
            questions = benchmark.read(Data(folder), protocol, need_images=True)
            asked[name] = (protocol, questions, benchmark.question_files(Data(folder), protocol))
        chosen = {name: one for name, one in settings().items() if not flags.only or name in flags.only}
        greedy = None
        for name, method in {"greedy": None, **chosen}.items():
            found = examine(model, name, method, asked, flags.batch, flags.out)
            greedy = greedy or found
            rows[name] = compared(found, greedy)
            about = {
                "date": datetime.date.today().isoformat(),
                "images": flags.images,
                "seconds": round(time.monotonic() - began),
            }
            (flags.out / "table.json").write_text(json.dumps({"about": about, "rows": rows}, indent=1))
            (flags.out / "table.md").write_text(markdown(rows))
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    cli.run(main)
