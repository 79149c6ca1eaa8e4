"""Score a benchmark, offline, from the folders people have; every figure carries the record that decides it.

    python tools/evaluate.py --list
    python tools/evaluate.py --protocol pope/vcd --data ~/data --rescore random=a.jsonl popular=b.jsonl
    python tools/evaluate.py --protocol pope/strict --data ~/data --group random --rescore a.jsonl --against b.jsonl
    python tools/evaluate.py --protocol chair/opera-512 --data ~/coco --synonyms synonyms.txt --rescore captions.jsonl
    python tools/evaluate.py --protocol chair/opera-64 --data ~/coco --chair-pickle chair.pkl --rescore captions.jsonl
    python tools/evaluate.py --protocol mme/hallucination --data ~/data --rescore answers_folder

Answers are read in the benchmarks' own formats: answers.jsonl (question_id, text), CHAIR (image_id, caption), AMBER
[{id, response}], MME one text file per subtask. `--rescore` runs no model and opens no picture.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from lvlm_jax import cli
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import Data, get, names, statistics
from lvlm_jax.evaluation import rescore as scoring


def build_parser() -> cli.Parser:
    """The flags of scoring."""
    parser = cli.Parser(prog="evaluate.py", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print all protocols and stop")
    parser.add_argument("--protocol", metavar="NAME", help="what is asked and how it is scored; see --list")
    parser.add_argument("--data", type=Path, default=Path("."), metavar="DIR",
                        help="folder that holds the benchmark (default: this one)")  # fmt: skip
    parser.add_argument("--rescore", nargs="+", metavar="FILE",
                        help="score these answers; GROUP=FILE where each split has a file of its own")  # fmt: skip
    parser.add_argument("--against", nargs="+", default=[], metavar="FILE",
                        help="compare with these answers to the same questions")  # fmt: skip
    parser.add_argument("--partial", action="store_true", help="score the questions that are answered")
    parser.add_argument("--group", action="append", default=[], metavar="NAME",
                        help="only this split, subtask or kind; may be repeated")  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where scores.json goes (default runs/PROTOCOL)"
    )
    parser.add_argument("--model-name", metavar="NAME", help="who answered, for the record")
    where = parser.add_argument_group("files, where they are not found in --data")
    where.add_argument("--question-file", type=Path, metavar="FILE", help="the question file")
    where.add_argument("--image-folder", type=Path, metavar="DIR", help="the images")
    where.add_argument(
        "--source", default="coco", metavar="NAME", help="POPE: coco, aokvqa or gqa (default coco)"
    )
    where.add_argument(
        "--image-list", type=Path, metavar="FILE", help="CHAIR: image names or ids, one a line"
    )
    where.add_argument(
        "--synonyms", type=Path, metavar="FILE", help="CHAIR: synonym list, one category a line"
    )
    where.add_argument(
        "--chair-pickle", type=Path, metavar="FILE", help="CHAIR: chair.pkl instead of annotations"
    )
    where.add_argument(
        "--matching", default="exact", metavar="NAME", help="AMBER: exact or spacy (default exact)"
    )
    sure = parser.add_argument_group("intervals")
    sure.add_argument("--resamples", type=cli.number(int, 1), default=statistics.RESAMPLES, metavar="N",
                      help=f"bootstrap resamples over images (default {statistics.RESAMPLES})")  # fmt: skip
    sure.add_argument(
        "--seed", type=cli.number(int, 0), default=0, metavar="N", help="of the bootstrap (default 0)"
    )
    return parser


def protocols() -> str:
    """All protocols, one a line."""
    found = [get(name) for name in names()]
    return "\n".join(f"{item.name:30s} {item.about}" for item in found)


def main(arguments: list[str]) -> int:
    """Score what the arguments name, print the figures, and write scores.json."""
    flags = build_parser().parse_args(arguments)
    if flags.list:
        print(protocols())
        return 0
    if not flags.protocol:
        raise LVLMError("no protocol given; choose one with --protocol, --list shows them")
    if not flags.rescore:
        raise LVLMError("no answers given; score answers with --rescore FILE")
    protocol = get(flags.protocol)
    data = Data(
        flags.data, flags.question_file, flags.image_folder, flags.image_list, flags.synonyms, flags.chair_pickle,
        flags.source, tuple(flags.group), matching=flags.matching,
    )  # fmt: skip
    found = scoring.rescore(
        protocol,
        data,
        flags.rescore,
        flags.against,
        partial=flags.partial,
        resamples=flags.resamples,
        seed=flags.seed,
        model=flags.model_name,
    )
    path = scoring.write(found, flags.out or Path("runs") / protocol.name.replace("/", "-"))
    print(scoring.table(found))
    print(f"\n{scoring.summary(found)}\nwritten to {path}")
    return 0


if __name__ == "__main__":
    cli.run(main)
