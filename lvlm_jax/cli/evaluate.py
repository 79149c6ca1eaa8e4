"""Score a benchmark, offline, from its usual folders, and record everything that determines the figures.

    lvlm evaluate --list
    lvlm evaluate --protocol pope/strict --data ~/data --model llava-1.5-7b-hf --method cmac --alpha 3
    lvlm evaluate --protocol pope/vcd --data ~/data --rescore random=a.jsonl popular=b.jsonl
    lvlm evaluate --protocol pope/strict --data ~/data --group random --rescore a.jsonl --against b.jsonl
    lvlm evaluate --protocol chair/opera-512 --data ~/coco --synonyms synonyms.txt --rescore captions.jsonl
    lvlm evaluate --protocol chair/opera-64 --data ~/coco --chair-pickle chair.pkl --rescore captions.jsonl
    lvlm evaluate --protocol pocket/multi-image --model pocket --method capl            draws its questions
    lvlm evaluate --protocol mme/hallucination --data ~/data --rescore answers_folder
    lvlm evaluate --protocol pope/vcd --data ~/data --model M --use_cd --cd_alpha 1 --cd_beta 0.2     VCD's flags

Answers are read in the benchmarks' own formats: answers.jsonl (question_id, text), CHAIR (image_id, caption), AMBER
[{id, response}], MME one text file per subtask. `--rescore` runs no model and opens no image.

With a model, answers are written in the same formats, beside a log: a stopped run resumes when it is started again.
Several processes, on one machine or on several with a shared folder, can divide the work:

    lvlm evaluate --protocol pope --data ~/data --model M --out DIR --processes 2 --process-index 0
    lvlm evaluate --protocol pope --data ~/data --model M --out DIR --processes 2 --process-index 1

A model that is too large for one host can be shared: processes started by SLURM, Open MPI or GKE (elsewhere set
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID) join if --tensor-parallel or --data-parallel need the
devices of all, and answer every question together. See docs/scaling.md.

`--controls` compares the method with trivial changes: greedy decoding, sampling, the plausibility cut alone, greedy
captions of the same length; for yes/no questions also a threshold, OLM and PBA (arXiv 2504.10020). The verdict is
"significantly better", "significantly worse" or "no difference shown"; below 30 questions there is no verdict.
"""

import dataclasses
from pathlib import Path

from lvlm_jax import LVLM, evaluation, parallel
from lvlm_jax.cli import common, habits
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import Data, Protocol, get, statistics
from lvlm_jax.evaluation import rescore as scoring
from lvlm_jax.evaluation.run import Options, Run
from lvlm_jax.evaluation.shares import Share
from lvlm_jax.generation import scheduler
from lvlm_jax.generation.questions import system_prompt
from lvlm_jax.methods import parse
from lvlm_jax.pocket import balanced
from lvlm_jax.weights import names
from lvlm_jax.weights.quantize import QUANTS

DRAWN = Path("runs/pocket_questions")  # where the pocket world's questions are drawn if no folder is given


def build_parser(method: str) -> common.Parser:
    """The flags, including those of the method."""
    parser = common.Parser(
        prog="lvlm evaluate", description=__doc__, epilog="methods and settings:\n\n" + parse.methods_help()
    )
    parser.add_argument("--list", action="store_true", help="print all protocols and exit")
    parser.add_argument("--protocol", metavar="NAME", help="the questions and how they are scored; see --list")
    parser.add_argument("--data", type=Path, default=Path("."), metavar="DIR",
                        help="folder with the benchmark (default: the current folder)")  # fmt: skip
    parser.add_argument("--rescore", nargs="+", metavar="FILE",
                        help="score these answers; GROUP=FILE if each split has its own file")  # fmt: skip
    parser.add_argument("--against", nargs="+", default=[], metavar="FILE",
                        help="answers to the same questions, for comparison")  # fmt: skip
    parser.add_argument("--partial", action="store_true", help="score only the questions that have answers")
    parser.add_argument("--group", action="append", default=[], metavar="NAME",
                        help="only this split, subtask or kind; may be repeated")  # fmt: skip
    parser.add_argument("--limit", type=common.number(int, 1), metavar="N",
                        help="only the first N questions of each split, for trials; recorded, and never "
                        "compared with complete runs")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for scores.json (default runs/PROTOCOL)")
    parser.add_argument("--model-name", metavar="NAME", help="name of the model that answered, for the record")
    run = parser.add_argument_group("answers by a model")
    run.add_argument(
        "--model-path",
        "--model",
        metavar="PATH",
        help="checkpoint folder or hub id; pocket: the model inside the package",
    )
    run.add_argument("--dtype", default="auto", choices=names.NUMBER_TYPES,
                     help="auto: float32 on a CPU, else bfloat16")  # fmt: skip
    run.add_argument("--quant", default="none", choices=("none", *QUANTS),
                     help="int8: keep the decoder's weights as 8-bit integers (default none)")  # fmt: skip
    run.add_argument("--method", default="none", metavar="NAME", help="a method from the list below (default none)")
    run.add_argument("--system", metavar="TEXT|vicuna|none",
                     help="system prompt: a text, Vicuna's sentence, or none (default: the protocol's own, mostly "
                     "none)")  # fmt: skip
    run.add_argument(
        "--batch-size", type=common.number(int, 1), default=16, metavar="N", help="batch size (default 16)"
    )
    run.add_argument("--schedule", default="auto", choices=scheduler.SCHEDULES,
                     help="continuous: when an answer ends, the next question starts; batches: whole "
                     "batches; auto: continuous if answers may be long and the method allows it")  # fmt: skip
    run.add_argument(
        "--sampling-seed", type=common.number(int, 0), default=0, metavar="N", help="seed of sampling (default 0)"
    )
    run.add_argument("--controls", nargs="?", const="", metavar="DIR",
                     help="also run the controls; DIR: their folder, which several methods may share "
                     "(default controls in --out)")  # fmt: skip
    run.add_argument(
        "--processes", type=common.number(int, 1), metavar="N", help="number of processes that share the questions"
    )
    run.add_argument("--process-index", type=common.number(int, 0), metavar="K", help="index of this process, from 0")
    run.add_argument("--data-parallel", type=common.number(int, 1), default=1, metavar="N",
                     help="number of devices for each batch (default 1)")  # fmt: skip
    run.add_argument("--tensor-parallel", type=common.number(int, 1), default=1, metavar="N",
                     help="number of devices for the weights (default 1)")  # fmt: skip
    where = parser.add_argument_group("files outside the usual places of --data")
    where.add_argument("--question-file", type=Path, metavar="FILE", help="the question file")
    where.add_argument("--image-folder", type=Path, metavar="DIR", help="the images")
    where.add_argument("--source", default="coco", metavar="NAME", help="POPE: coco, aokvqa or gqa (default coco)")
    where.add_argument("--image-list", type=Path, metavar="FILE", help="CHAIR: image names or ids, one per line")
    where.add_argument("--synonyms", type=Path, metavar="FILE", help="CHAIR: synonym list, one category per line")
    where.add_argument("--chair-pickle", type=Path, metavar="FILE", help="CHAIR: chair.pkl instead of annotations")
    where.add_argument("--matching", default="auto", metavar="auto|exact|spacy",
                       help="AMBER: spacy: nltk's nouns, matched softly by spaCy's en_core_web_lg, as in "
                       "its own scorer; exact: equal words of its lists; auto: spacy if it is "
                       "installed (default)")  # fmt: skip
    sure = parser.add_argument_group("intervals")
    sure.add_argument("--resamples", type=common.number(int, 1), default=statistics.RESAMPLES, metavar="N",
                      help=f"bootstrap resamples over images (default {statistics.RESAMPLES})")  # fmt: skip
    sure.add_argument(
        "--seed", type=common.number(int, 0), default=0, metavar="N", help="seed of the bootstrap (default 0)"
    )
    # A method's flags come last, so that its --seed does not take the name of ours.
    common.method_flags(parser, method)
    return parser


def protocols() -> str:
    """All protocols, one per line, below the download links of their benchmark."""
    protocols_known = [get(name) for name in evaluation.names()]
    lines = []
    for benchmark in evaluation.BENCHMARKS.values():
        lines += [benchmark.name, *(f"  data: {link}" for link in benchmark.links)]
        lines += [f"  {one.name:30s} {one.about}" for one in protocols_known if one.benchmark == benchmark.name]
    return "\n".join(lines)


def data_folder(flags, protocol: Protocol) -> Path:
    """The folder of the benchmark. If none is given, the pocket world's questions are drawn into a default folder."""
    folder = flags.data
    if protocol.benchmark != "pocket" or flags.question_file or folder not in (Path("."), DRAWN):
        return folder
    if folder == Path(".") and (folder / balanced.FILE).is_file():
        return folder
    count = balanced.write(DRAWN)
    print(f"{count} questions drawn into {DRAWN}")
    return DRAWN


def joined(flags) -> bool:
    """Joins the processes that the environment describes, if they share one model; returns whether it joined them."""
    spread = max(flags.data_parallel, flags.tensor_parallel) > 1
    return spread and flags.processes is None and parallel.start()


def answer_and_score(flags, protocol: Protocol, data: Data, out: Path) -> dict | None:
    """Runs the model, scores its answers and writes the scores; None if other processes have not finished their shares.

    Raises:
        LVLMError: an unusable model, method, benchmark folder or image, or a log of another run.
    """
    method = parse.build_method(flags.method, flags)
    controls = None if flags.controls is None else Path(flags.controls or out / "controls")
    share = Share(together=True) if joined(flags) else Share.of(flags.processes, flags.process_index)
    options = Options(
        flags.batch_size, flags.sampling_seed, controls,
        share, flags.against, flags.resamples, flags.seed,
        flags.schedule,
    )  # fmt: skip
    path, dtype, quant = (names.checkpoint(flags.model_path), names.dtype(flags.dtype), names.quant(flags.quant))
    run = Run(path, names.precision(dtype, quant), protocol, data, out, method, options)
    if not run.complete():
        mesh_sizes = flags.data_parallel, flags.tensor_parallel
        mesh = parallel.make_mesh(data=mesh_sizes[0], fsdp=1, tensor=mesh_sizes[1]) if max(mesh_sizes) > 1 else None
        run.ask(LVLM.from_pretrained(path, dtype=dtype, mesh=mesh, quant=quant))
    return run.score()


def main(arguments: list[str]) -> int:
    """Runs the command, prints the figures, and writes scores.json."""
    arguments = habits.translated(arguments, habits.EVALUATE_SAME, habits.EVALUATE_ANSWERS)
    flags = build_parser(common.ahead(arguments, method="none").method).parse_args(arguments)
    if flags.list:
        print(protocols())
        return 0
    if not flags.protocol:
        raise LVLMError("no protocol given; choose one with --protocol, --list shows them")
    if bool(flags.rescore) == bool(flags.model_path):
        raise LVLMError("give a model that answers (--model), or answers to score (--rescore FILE)")
    if flags.model_path and (flags.partial or flags.model_name):
        raise LVLMError("--partial and --model-name apply to existing answers; use them with --rescore")
    if flags.rescore and (flags.controls is not None or flags.processes):
        raise LVLMError("--controls and --processes need a model that answers; use them with --model")
    if flags.rescore and flags.system:
        raise LVLMError("--system needs a model that answers; use it with --model")
    protocol = get(flags.protocol)
    if flags.system:
        protocol = dataclasses.replace(protocol, system=system_prompt(flags.system))
    data = Data(
        data_folder(flags, protocol), flags.question_file, flags.image_folder, flags.image_list, flags.synonyms,
        flags.chair_pickle, flags.source, tuple(flags.group), matching=flags.matching, limit=flags.limit,
    )  # fmt: skip
    out = flags.out or Path("runs") / "-".join(
        (
            protocol.name.replace("/", "-"),
            *([Path(flags.model_path).name, flags.method.replace("/", "-")] if flags.model_path else []),
        )
    )
    if flags.model_path:
        scores = answer_and_score(flags, protocol, data, out)
        if scores is None:
            print("this process has finished its share; another one writes scores.json")
            return 0
        path = out / "scores.json"
    else:
        scores = scoring.rescore(
            protocol, data, flags.rescore, flags.against, partial=flags.partial, resamples=flags.resamples,
            seed=flags.seed, model=flags.model_name,
        )  # fmt: skip
        path = scoring.write(scores, out)
    print(scoring.table(scores))
    for control in scores.get("controls", {}).values():
        print(control["words"])
    print(f"\n{scoring.summary(scores)}\nwritten to {path}")
    return 0
