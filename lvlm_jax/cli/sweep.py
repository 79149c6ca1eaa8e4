"""Answer the same questions under many strengths of one method, in one program and one pass over the weights.

    lvlm sweep --method cmac --grid alpha=0,1,3 --grid gamma=1,2 --image a.jpg --prompt "What is this?"
    lvlm sweep --method sevi --grid omega=0.5,1,2,4 --question-file coco_pope_random.json \\
        --image-folder val2014 --out sweep.jsonl

Prints a table with a line for every setting: the share of answers that differ from greedy decoding, their mean length,
and, if the question file has labels "yes" and "no", the accuracy by the first of these words. `--out` saves every
answer.
"""

import argparse
from pathlib import Path

from lvlm_jax import LVLM
from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.evaluation import grid
from lvlm_jax.generation.defaults import CHOICES
from lvlm_jax.methods import parse
from lvlm_jax.weights import names


def command_line(words: list[str]) -> argparse.Namespace:
    """Parses the command line; `method` has the settings that are not swept, and `grid` is the list of grid points."""
    parser = common.Parser(
        prog="lvlm sweep", description=__doc__, epilog="methods and settings:\n\n" + parse.methods_help()
    )
    add = parser.add_argument
    add(
        "--model-path", "--model", metavar="PATH", default="pocket", help="checkpoint folder or hub id (default pocket)"
    )
    add(
        "--dtype",
        default="auto",
        choices=names.NUMBER_TYPES,
        help="auto: float32 on a CPU, else bfloat16 (default auto)",
    )
    add("--method", metavar="NAME", required=True, help="the method; settings that are not swept are flags")
    add(
        "--grid",
        metavar="NAME=A,B,…",
        action="append",
        required=True,
        help="values of one strength; with several --grid, all combinations",
    )
    add("--image", action="append", default=[], metavar="FILE", help="an image; repeat it for several")
    add("--prompt", action="append", default=[], metavar="TEXT", help="a question; repeat it for several")
    add("--question-file", metavar="FILE", help="JSON lines {question_id, image, text, label}")
    add("--image-folder", metavar="FOLDER", default=".", help="folder of those images")
    add("--limit", type=common.number(int, low=1), metavar="N", help="only the first questions of the file")
    add("--batch-size", type=common.number(int, low=1), default=8, metavar="N", help="batch size (default 8)")
    add("--points", type=common.number(int, low=1), default=16, metavar="N",
        help="settings per program; each has its own caches (default 16)")  # fmt: skip
    add("--generation-config", choices=CHOICES, default="plain",
        help="checkpoint: use the settings of its generation_config.json for all answers (default plain)")  # fmt: skip
    add("--allow-urls", action="store_true", help="download images that are http or https addresses")
    add("--max-new-tokens", type=common.number(int, low=1), default=64, metavar="N", help="longest answer (default 64)")
    add("--out", metavar="FILE", help="JSON lines {settings, question_id, text}")
    common.method_flags(parser, common.ahead(words, method="none").method)
    arguments = parser.parse_args(words)
    arguments.method = parse.build_method(arguments.method, arguments)
    if arguments.method is None:
        raise LVLMError("--method none has no strengths to sweep; name a method")
    arguments.grid = grid.points(arguments.method, arguments.grid)
    return arguments


def questions_of(arguments: argparse.Namespace) -> list[grid.GridQuestion]:
    """The questions that the command line names.

    Raises:
        LVLMError: there are none, or their file is unreadable.
    """
    if arguments.question_file:
        return grid.of_file(arguments.question_file, arguments.image_folder, arguments.limit)
    if not arguments.prompt:
        raise LVLMError('nothing to ask; give --prompt "…" or --question-file')
    return grid.of_prompts(arguments.prompt, arguments.image)


def main(words: list[str]) -> int:
    """Runs the grid and prints the table."""
    arguments = command_line(words)
    questions = questions_of(arguments)
    model = LVLM.from_pretrained(
        arguments.model_path,
        dtype=arguments.dtype,
        generation_config=arguments.generation_config,
        allow_urls=arguments.allow_urls,
    )
    answers = grid.answer(
        model,
        questions,
        arguments.method,
        arguments.grid,
        arguments.batch_size,
        arguments.points,
        arguments.max_new_tokens,
    )
    print(grid.table(questions, arguments.grid, answers))
    if arguments.out:
        grid.write(Path(arguments.out), questions, arguments.grid, answers)
    return 0
