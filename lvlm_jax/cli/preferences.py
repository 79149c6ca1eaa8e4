"""Make CAPL preference pairs: chosen answers under cross-image attention, rejected ones under truncated attention.

    lvlm preferences --pocket 400 --out runs/pairs --holdout 0.1
    lvlm preferences --prompts prompts.jsonl --model llava-1.5-7b-hf --rho 0.9
    lvlm preferences --prompts prompts.jsonl --model llava-1.5-7b-hf --corrector judge:correct
    lvlm preferences --prompts prompts.jsonl --model llava-1.5-7b-hf --rejected-by plain --out runs/dpo
    lvlm preferences --pairs rlhf_v.jsonl --holdout 0.1 --out runs/pairs

A prompt file has JSON lines {"images": [paths relative to the file], "prompt": text or chat messages, "id": optional}.
The pairs are TRL's JSON lines {images, prompt, chosen, rejected}; beside them are their statistics, the record of
the run, and a log of all answers, from which a stopped run resumes. Correctors and filters come after
the log, so they can be changed without asking the model again.

If there are pairs only where the model is wrong, they teach it to contradict itself: a policy that always does so wins
all of them. If such a policy wins more than --max-negation of the pairs, nothing is written, and an error states the
share. --ladder makes a pair of every prompt that has a truth; the rejected answer is the first wrong one of several.

--corrector pocket            the truth of each prompt, which --pocket writes
--corrector FILE              JSON lines {"id", "chosen"}, such as an edited answers.jsonl of an earlier run
--corrector module:function   function(prompt, answer) -> str; prompt has id, images, text, messages, truth
"""

import argparse
import dataclasses
from pathlib import Path

from lvlm_jax import files
from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.capl import CAPL
from lvlm_jax.pocket.pairs import SINGLE, Mix, write_prompts
from lvlm_jax.training.data import pairs, preferences
from lvlm_jax.training.data.pair_filters import Filters
from lvlm_jax.weights import names

FILTERS = Filters()
NEGATION = 0.5  # largest share of the pairs that are won by a policy that contradicts the model


def build_parser() -> common.Parser:
    """The flags."""
    parser = common.Parser(prog="lvlm preferences", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", type=Path, metavar="FILE", help="prompts to answer")
    source.add_argument("--pocket", type=common.number(int, 1), metavar="N",
                        help="draw this many prompts from the pocket world, with their truth")  # fmt: skip
    source.add_argument("--pairs", metavar="FILE",
                        help="use existing pairs (TRL, LLaMA-Factory, RLHF-V) instead of a model")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("runs/preferences"), metavar="DIR",
                        help="folder for all files (default runs/preferences)")  # fmt: skip
    parser.add_argument("--pocket-single", type=common.number(float, 0, 1), default=SINGLE, metavar="SHARE",
                        help=f"share of --pocket's prompts about one image (default {SINGLE})")  # fmt: skip
    parser.add_argument("--pocket-describe", type=common.number(float, 0, 1), default=0.0, metavar="SHARE",
                        help="share of the prompts about one image that ask for a description (default 0)")  # fmt: skip
    parser.add_argument("--pocket-question-first", action="store_true",
                        help="put questions over several images before the images")  # fmt: skip
    parser.add_argument("--corrector", metavar="WHAT",
                        help="none, or see above (default: pocket with --pocket, else none)")  # fmt: skip
    parser.add_argument("--seed", type=common.number(int, 0), default=0, metavar="N",
                        help="seed of --pocket, sampling and --holdout (default 0)")  # fmt: skip

    model = parser.add_argument_group("answers by a model")
    model.add_argument("--model-path", "--model", metavar="PATH",
                       help="checkpoint folder or hub id; pocket (default with --pocket): the model "
                       "inside the package")  # fmt: skip
    model.add_argument("--dtype", default="auto", choices=names.NUMBER_TYPES,
                       help="auto: float32 on a CPU, else bfloat16")  # fmt: skip
    model.add_argument("--batch-size", type=common.number(int, 1), default=16, metavar="N",
                       help="prompts at once (default 16)")  # fmt: skip
    model.add_argument("--max-new-tokens", type=common.number(int, 1), default=128, metavar="N",
                       help="longest answer (default 128)")  # fmt: skip
    model.add_argument("--temperature", type=common.number(float, 0), default=0.0, metavar="T",
                       help="0 (default): always the most probable token")  # fmt: skip
    model.add_argument("--rejected-temperature", type=common.number(float, 0), metavar="T",
                       help="temperature of rejected answers (default: as --temperature; 1 with "
                       "--rejected-by plain)")  # fmt: skip
    model.add_argument("--top-p", type=common.number(float, above=0, high=1), default=1.0, metavar="P",
                       help="sample from the fewest tokens that reach this probability (default 1)")  # fmt: skip

    attention = parser.add_argument_group("attention (CAPL)")
    attention.add_argument("--preset", choices=tuple(CAPL.PRESETS), help="published values of rho")
    attention.add_argument("--rho", type=common.number(float, 0, 1), metavar="R",
                           help="share of each image's tokens that see other images (default 0.95)")  # fmt: skip
    attention.add_argument("--sigma", type=common.number(float, 0, 1), metavar="S",
                           help="weight of the cross-image softmax (default 0.5)")  # fmt: skip
    attention.add_argument("--variant", default="paper", choices=("paper", "code-qwen"),
                           help="under truncated attention an image token attends to its image (paper, default), "
                           "or only to itself")  # fmt: skip
    attention.add_argument("--rejected-by", default="truncated", choices=preferences.REJECTED,
                           help="rejected answers under truncated attention (default), or sampled from the "
                           "unmodified model")  # fmt: skip
    attention.add_argument("--ladder", action=argparse.BooleanOptionalAction,
                           help="a wrong answer to every prompt: that of --rejected-by, else a wrong sample of it, "
                           "else an option from the prompt's field wrong (default with --pocket)")  # fmt: skip

    filters = parser.add_argument_group("filters (empty and equal answers are always dropped)")
    filters.add_argument("--near-duplicate", type=common.number(float, 0, 1), default=FILTERS.near_duplicate,
                      metavar="F", help="largest word overlap (ROUGE-L F1) of the two answers; 1 allows all "
                      f"(default {FILTERS.near_duplicate})")  # fmt: skip
    filters.add_argument("--max-words", type=common.number(int, 0), default=FILTERS.max_words, metavar="N",
                      help=f"largest number of words in an answer; 0: any (default {FILTERS.max_words})")  # fmt: skip
    filters.add_argument(
        "--keep-unfinished", action="store_true", help="keep answers that were cut at --max-new-tokens"
    )
    filters.add_argument("--balance", action="store_true",
                      help="equally many pairs with each chosen answer, for each kind of prompt")  # fmt: skip
    filters.add_argument("--max-negation", type=common.number(float, 0, 1), default=NEGATION, metavar="SHARE",
                      help="largest share of the pairs that a policy wins by contradicting the model; above it, "
                      f"nothing is written (default {NEGATION}; 1: any)")  # fmt: skip
    filters.add_argument("--holdout", type=common.number(float, 0, 0.9), default=0.0, metavar="SHARE",
                      help="share of the pairs for validation.jsonl, with separate images (default 0)")  # fmt: skip
    return parser


def candidates_of_model(flags) -> preferences.Candidates:
    """Candidates from a model's answers to the prompts of a file or of the pocket world."""
    if flags.pocket:
        file = write_prompts(
            flags.out, flags.pocket, flags.seed,
            Mix(flags.pocket_single, flags.pocket_describe, question_first=flags.pocket_question_first),
        )  # fmt: skip
    else:
        file = files.expand(flags.prompts)
    model = flags.model_path or ("pocket" if flags.pocket else None)
    if model is None:
        raise LVLMError("no model to answer the prompts; give one with --model")
    strengths = {name: getattr(flags, name) for name in ("rho", "sigma") if getattr(flags, name) is not None}
    strengths = (CAPL.PRESETS[flags.preset] if flags.preset else {}) | strengths
    plan = preferences.plan(
        CAPL(**strengths),
        flags.rejected_by,
        flags.variant,
        flags.temperature,
        flags.rejected_temperature,
        bool(flags.pocket) if flags.ladder is None else flags.ladder,
        top_p=flags.top_p,
        max_new_tokens=flags.max_new_tokens,
        seed=flags.seed,
    )
    corrector = flags.corrector or ("pocket" if flags.pocket else "none")
    corrector = None if corrector == "none" else corrector
    return preferences.answer_prompts(file, plan, model, flags.dtype, flags.out, corrector, flags.batch_size)


def main(arguments: list[str]) -> int:
    """Makes the pairs, and prints their statistics."""
    flags = build_parser().parse_args(arguments)
    if flags.pairs and (flags.model_path or flags.corrector or flags.ladder):
        raise LVLMError("--pairs takes answers as they are; leave --model, --corrector and --ladder out")
    candidates = preferences.from_file(flags.pairs, flags.out) if flags.pairs else candidates_of_model(flags)
    filters = dataclasses.replace(
        FILTERS, near_duplicate=flags.near_duplicate, max_words=flags.max_words, unfinished=not flags.keep_unfinished
    )
    figures = pairs.write(
        flags.out, candidates.items, candidates.prompts, candidates.record, filters, flags.holdout, flags.seed,
        flags.balance, flags.max_negation,
    )  # fmt: skip
    print(preferences.table(figures))
    print(f"written to {flags.out / 'pairs.jsonl'}")
    return 0
