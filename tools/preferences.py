"""Make CAPL preference pairs: chosen answers under cross-image attention, rejected ones under truncated attention.

    python tools/preferences.py --pocket 400 --out runs/pairs --holdout 0.1
    python tools/preferences.py --prompts prompts.jsonl --model llava-1.5-7b-hf --rho 0.9
    python tools/preferences.py --prompts prompts.jsonl --model llava-1.5-7b-hf --corrector judge:correct
    python tools/preferences.py --prompts prompts.jsonl --model llava-1.5-7b-hf --rejected-by plain --out runs/dpo
    python tools/preferences.py --pairs rlhf_v.jsonl --holdout 0.1 --out runs/pairs

A prompt file has JSON lines {"images": [paths relative to the file], "prompt": text or chat messages, "id": optional}.
The pairs are TRL's JSON lines {images, prompt, chosen, rejected}; beside them lie their statistics, the record of the
run, and a log of all answers: stopped and started again, a run goes on where it was. Correctors and filters come after
the log, so they can be changed without asking the model again.

--corrector pocket            the truth of each prompt, which --pocket writes
--corrector FILE              JSON lines {"id", "chosen"}, such as an edited answers.jsonl of an earlier run
--corrector module:function   function(prompt, answer) -> str; prompt has id, images, text, messages, truth
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone need not be installed

from lvlm_jax import LVLM, methods
from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.journal.record import file_hash, method_record, run_record
from lvlm_jax.pocket.pairs import SINGLE, write_prompts
from lvlm_jax.training.data import correctors, pairs
from lvlm_jax.training.data.pair_files import read_pairs
from lvlm_jax.training.data.pair_filters import Candidate, Filters
from lvlm_jax.training.data.prompts import Prompt, of_pair, read_prompts
from lvlm_jax.version import __version__
from lvlm_jax.weights import names

FILTERS = Filters()


def build_parser() -> common.Parser:
    """The flags."""
    parser = common.Parser(prog="preferences.py", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, metavar="FILE", help="prompts to answer")
    source.add_argument("--pocket", type=common.number(int, 1), metavar="N",
                        help="draw this many prompts from the pocket world, with their truth")  # fmt: skip
    source.add_argument("--pairs", metavar="FILE",
                        help="take pairs that are there (TRL, LLaMA-Factory, RLHF-V), no model")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/preferences"), metavar="DIR",
                        help="folder of everything that is written (default runs/preferences)")  # fmt: skip
    parser.add_argument("--pocket-single", type=common.number(float, 0, 1), default=SINGLE, metavar="SHARE",
                        help=f"share of --pocket's prompts about one picture (default {SINGLE})")  # fmt: skip
    parser.add_argument("--corrector", metavar="WHAT",
                        help="none, or see above (default: pocket with --pocket, else none)")  # fmt: skip
    parser.add_argument("--seed", type=common.number(int, 0), default=0, metavar="N",
                        help="of --pocket, of sampling and of --holdout (default 0)")  # fmt: skip

    model = parser.add_argument_group("answers by a model")
    model.add_argument("--model-path", "--model", metavar="PATH",
                       help="checkpoint folder or hub id; pocket (default with --pocket): the one inside")  # fmt: skip
    model.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"),
                       help="auto: float32 on a CPU, else bfloat16")  # fmt: skip
    model.add_argument("--batch-size", type=common.number(int, 1), default=16, metavar="N",
                       help="prompts at once (default 16)")  # fmt: skip
    model.add_argument("--max-new-tokens", type=common.number(int, 1), default=128, metavar="N",
                       help="longest answer (default 128)")  # fmt: skip
    model.add_argument("--temperature", type=common.number(float, 0), default=0.0, metavar="T",
                       help="0 (default): always the most probable token")  # fmt: skip
    model.add_argument("--rejected-temperature", type=common.number(float, 0), metavar="T",
                       help="of rejected answers (default: as --temperature; 1 with --rejected-by plain)")  # fmt: skip
    model.add_argument("--top-p", type=common.number(float, above=0, high=1), default=1.0, metavar="P",
                       help="sample from this share of probability (default 1)")  # fmt: skip

    attention = parser.add_argument_group("attention (CAPL)")
    attention.add_argument("--preset", choices=tuple(methods.CAPL.PRESETS), help="rho as published")
    attention.add_argument("--rho", type=common.number(float, 0, 1), metavar="R",
                           help="share of each image's tokens that see other images (default 0.95)")  # fmt: skip
    attention.add_argument("--sigma", type=common.number(float, 0, 1), metavar="S",
                           help="weight of the cross-image softmax (default 0.5)")  # fmt: skip
    attention.add_argument("--variant", default="paper", choices=("paper", "code-qwen"),
                           help="truncated: an image token sees its image, or only itself (default paper)")  # fmt: skip
    attention.add_argument("--rejected-by", default="truncated", choices=("truncated", "plain"),
                           help="truncated attention (default), or the unmodified model, sampled")  # fmt: skip

    kept = parser.add_argument_group("what is kept; empty and equal answers never are")
    kept.add_argument("--near-duplicate", type=common.number(float, 0, 1), default=FILTERS.near_duplicate,
                      metavar="F", help="largest word overlap (ROUGE-L F1) of the two answers; 1 allows all "
                      f"(default {FILTERS.near_duplicate})")  # fmt: skip
    kept.add_argument("--max-words", type=common.number(int, 0), default=FILTERS.max_words, metavar="N",
                      help=f"of either answer; 0: any number (default {FILTERS.max_words})")  # fmt: skip
    kept.add_argument("--keep-unfinished", action="store_true", help="also answers cut at --max-new-tokens")
    kept.add_argument("--holdout", type=common.number(float, 0, 0.9), default=0.0, metavar="SHARE",
                      help="share of the pairs for validation.jsonl, with pictures of its own (default 0)")  # fmt: skip
    return parser


def plan_of(flags) -> pairs.Plan:
    """How both answers are generated."""
    given = {name: getattr(flags, name) for name in ("rho", "sigma") if getattr(flags, name) is not None}
    given = (methods.CAPL.PRESETS[flags.preset] if flags.preset else {}) | given
    plain = flags.rejected_by == "plain"
    temperature = flags.rejected_temperature
    if temperature is None:
        temperature = 1.0 if plain else flags.temperature
    truncated = methods.CAPL(mode="truncated", variant=flags.variant)
    return pairs.Plan(
        chosen=pairs.Side(methods.CAPL(**given), flags.temperature),
        rejected=pairs.Side(None if plain else truncated, temperature),
        top_p=flags.top_p,
        max_new_tokens=flags.max_new_tokens,
        seed=flags.seed,
    )


def corrector_of(flags, prompts: list[Prompt]) -> correctors.Corrector | None:
    """The corrector that the flags name, or that the source of the prompts suggests."""
    name = flags.corrector or ("pocket" if flags.pocket else "none")
    return None if name == "none" else correctors.resolve(name, prompts)


def answered(flags) -> tuple[list[Candidate], int, dict]:
    """Candidates from a model's answers, the number of prompts, and the record."""
    if flags.pocket:
        file = write_prompts(flags.out, flags.pocket, flags.seed, flags.pocket_single)
    else:
        file = flags.prompts.expanduser()
    name = flags.model_path or ("pocket" if flags.pocket else None)
    if name is None:
        raise LVLMError("no model to answer the prompts; give one with --model")
    prompts = read_prompts(file)
    corrector = corrector_of(flags, prompts)
    plan, path, dtype = plan_of(flags), names.checkpoint(name), names.dtype(flags.dtype)
    generation = {
        "temperature": plan.chosen.temperature,
        "rejected_temperature": plan.rejected.temperature,
        "top_p": plan.top_p,
        "max_new_tokens": plan.max_new_tokens,
    }
    record = run_record(path, dtype, plan.chosen.method, generation) | {
        "rejected_method": method_record(plan.rejected.method),
        "prompts": file_hash(file),
        "seed": plan.seed,
    }
    answers = pairs.answer(
        prompts, plan, lambda: LVLM.from_pretrained(path, dtype=dtype), flags.out / "answers.jsonl", record,
        flags.batch_size,
    )  # fmt: skip
    texts = {key: said.chosen.text for key, said in answers.items()}
    corrected = pairs.correct(prompts, texts, corrector, flags.out / "corrections.jsonl", record)
    record |= {"batch_size": flags.batch_size, "corrector": corrector and dict(corrector.record)}
    return pairs.candidates(prompts, answers, corrected), len(prompts), record


def given(flags) -> tuple[list[Candidate], int, dict]:
    """Candidates from a file of pairs, their number, and the record."""
    if flags.model_path or flags.corrector:
        raise LVLMError("--pairs takes answers as they are; leave --model and --corrector out")
    written = [(flags.out / name).resolve() for name in ("pairs.jsonl", "validation.jsonl")]
    if Path(flags.pairs).expanduser().resolve() in written:
        raise LVLMError(f"--pairs {flags.pairs!r} would be overwritten; give another --out")
    found = read_pairs(flags.pairs)
    candidates = [Candidate(of_pair(pair), pair.chosen, pair.rejected) for pair in found]
    return candidates, len(found), {"version": __version__, "pairs": flags.pairs}


def table(figures: dict) -> str:
    """The statistics as lines of text."""
    lines = [("prompts", figures["prompts"]), ("failed", figures["failed"])]
    lines += [(f"dropped: {reason}", count) for reason, count in figures["dropped"].items()]
    lines += [(name, figures[name]) for name in ("kept", "training", "validation")]
    lines += [("share corrected", figures["corrected"]), ("share chosen longer", figures["chosen_longer"])]
    for side, words in figures["words"].items():
        lines.append((f"words of {side}", ", ".join(f"{name} {value:g}" for name, value in words.items())))
    lines.append(
        ("pairs by images", ", ".join(f"{key}: {value}" for key, value in figures["images"].items()))
    )
    return "\n".join(f"{name:24s} {value}" for name, value in lines)


def main(arguments: list[str]) -> int:
    """Make the pairs that the arguments ask for, and print their statistics."""
    flags = build_parser().parse_args(arguments)
    candidates, prompts, record = given(flags) if flags.pairs else answered(flags)
    filters = dataclasses.replace(
        FILTERS,
        near_duplicate=flags.near_duplicate,
        max_words=flags.max_words,
        unfinished=not flags.keep_unfinished,
    )
    figures = pairs.write(flags.out, candidates, prompts, record, filters, flags.holdout, flags.seed)
    print(table(figures))
    print(f"written to {flags.out / 'pairs.jsonl'}")
    return 0


if __name__ == "__main__":
    common.run(main)
