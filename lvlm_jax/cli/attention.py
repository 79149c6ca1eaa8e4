"""Draws where a model looks while it answers: an interactive page, and PNG files.

    lvlm attention --method cmac --out runs/attention
    lvlm attention --model llava-1.5-7b-hf --image a.jpg --image b.jpg --prompt "What changed?" --method sevi

The folder gets index.html (open it in a browser; it needs no network) and PNG files: every word over each image,
image mass by layer and head, the masking probe, drift, information flow, vision sinks.
"""

import argparse
import pathlib

from lvlm_jax import LVLM, methods
from lvlm_jax.analysis import look
from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.questions import conversation
from lvlm_jax.methods import parse
from lvlm_jax.processors.images import open_image
from lvlm_jax.weights import names


def command_line(words: list[str]) -> argparse.Namespace:
    """Parses the command line; `methods` is the result of `chosen_methods`."""
    name = common.ahead(words, method="none").method
    parser = common.Parser(
        prog="lvlm attention",
        description=__doc__,
        epilog="methods and their settings, which are flags once --method names the method:\n" + parse.methods_help(),
    )
    add = parser.add_argument
    add(
        "--model-path", "--model", default="pocket", metavar="PATH", help="checkpoint folder or hub id (default pocket)"
    )
    add(
        "--dtype",
        default="auto",
        choices=names.NUMBER_TYPES,
        help="auto: float32 on a CPU, else bfloat16 (default auto)",
    )
    add("--image", action="append", metavar="FILE", help="an image; repeat it for several (default the sample)")
    add(
        "--prompt",
        default="Please describe this image in detail.",
        metavar="TEXT",
        help="the question, with <image> at the place of each image (without it, images come first)",
    )
    add("--method", default="none", metavar="NAME", help="none, or a method from the list below")
    add(
        "--compare",
        default="greedy",
        metavar="NAME",
        help="what to show beside the method: greedy, none, or another method with its default settings "
        "(default greedy)",
    )
    add(
        "--max-new-tokens",
        type=common.number(int, low=1),
        default=128,
        metavar="N",
        help="longest answer (default 128)",
    )
    add("--answer", metavar="TEXT", help="analyse this answer instead of one that the model writes")
    add(
        "--beta-sinks",
        type=common.number(float, low=0),
        metavar="B",
        help="weight above which a patch is a vision sink "
        f"(default {look.SINK_WEIGHT:.3f} / tokens of the largest image)",
    )
    add("--out", default="runs/attention", metavar="FOLDER", help="where to write (default runs/attention)")
    common.method_flags(parser, name)
    arguments = parser.parse_args(words)
    arguments.image = arguments.image or [str(names.pocket_file("sample.png"))]
    arguments.methods = chosen_methods(name, arguments)
    return arguments


def chosen_methods(name: str, arguments: argparse.Namespace) -> dict[str, methods.Method | None]:
    """Name -> method of the answers to show, from left to right: the comparison, then the method."""
    method = parse.build_method(name, arguments)
    if method is None:
        return {"greedy": None}
    beside = arguments.compare.lower()
    other = {} if beside == "none" else {"greedy": None}
    if beside not in ("greedy", "none"):
        comparison = parse.as_method(arguments.compare)
        other = {comparison.label: comparison}
    title = method.label
    return other | {title if title not in other else f"{title}, set": method}


def main(words: list[str]) -> int:
    """Lets the model answer, analyses its attention, and writes the page."""
    arguments = command_line(words)
    images = [open_image(path) for path in arguments.image]
    messages = conversation(images, arguments.prompt)
    folder = pathlib.Path(arguments.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LVLMError(f"--out {arguments.out!r} cannot be made: {error.strerror or error}") from error
    model = LVLM.from_pretrained(arguments.model_path, dtype=arguments.dtype)
    looker = look.Looker(model, images, messages, arguments.beta_sinks)
    answers = []
    for name, method in arguments.methods.items():
        tokens = looker.tokens(method, arguments.answer, arguments.max_new_tokens)
        answers.append(looker.answer(name, method, tokens))
        print(f"{name}: {answers[-1].text}")
    title = f"Where {pathlib.Path(arguments.model_path).name} looked"
    page, *files = look.write(folder, title, arguments.prompt.replace("<image>", "▣"), looker.pictures, answers)
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB), and beside it {', '.join(file.name for file in files)}")
    return 0
