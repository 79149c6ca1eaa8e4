"""Draws where a model looks while it answers: a page to click through, and the same as pictures.

    python tools/attention.py --method cmac --out runs/attention
    python tools/attention.py --model llava-1.5-7b-hf --image a.jpg --image b.jpg --prompt "What changed?" --method sevi

The folder gets index.html (open it in a browser; it needs no network) and PNG files: every word over each picture,
image mass by layer and head, the masking probe, drift, information flow, vision sinks.
"""

import argparse
import dataclasses
import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # a clone need not be installed

import jax
import numpy as np

from lvlm_jax import LVLM, analysis, methods
from lvlm_jax.analysis import figures, overlay, page
from lvlm_jax.cli import common
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation.questions import conversation
from lvlm_jax.methods import parse
from lvlm_jax.processors import text
from lvlm_jax.processors.images import open_image
from lvlm_jax.processors.layout import Inputs
from lvlm_jax.weights import names

SINK_WEIGHT = 0.002 * 576  # EAH's threshold times LLaVA's tokens of one image, for which it was found


def command_line(words: list[str]) -> argparse.Namespace:
    """The command line, with the methods to look at."""
    first = common.Parser(add_help=False)
    first.add_argument("--method", default="none")
    name = first.parse_known_args([parse.hyphenated(word) for word in words])[0].method
    parser = common.Parser(
        prog="tools/attention.py",
        description=__doc__,
        epilog="methods and their settings, flags once --method names the method:\n" + parse.methods_help(),
    )
    add = parser.add_argument
    add(
        "--model-path",
        "--model",
        default="pocket",
        metavar="PATH",
        help="checkpoint folder or hub id (default pocket)",
    )
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    add(
        "--image",
        action="append",
        metavar="FILE",
        help="a picture; repeat it for several (default the sample)",
    )
    add("--prompt", default="Please describe this image in detail.", metavar="TEXT", help="the question, with <image> "
        "where a picture belongs (without it pictures come first)")  # fmt: skip
    add("--method", default="none", metavar="NAME", help="none, or a method from the list below")
    add("--compare", default="greedy", metavar="NAME", help="what stands beside the method: greedy, none, or another "
        "method with its default settings (default greedy)")  # fmt: skip
    add(
        "--max-new-tokens",
        type=common.number(int, low=1),
        default=128,
        metavar="N",
        help="longest answer (default 128)",
    )
    add("--answer", metavar="TEXT", help="look at this answer instead of letting the model write its own")
    add(
        "--beta-sinks",
        type=common.number(float, low=0),
        metavar="B",
        help="weight above which a patch is a vision sink "
        f"(default {SINK_WEIGHT:.3f} / tokens of the largest image)",
    )
    add("--out", default="runs/attention", metavar="FOLDER", help="where to write (default runs/attention)")
    if name.lower() != "none":
        parse.add_method_flags(parser, name)
    arguments = parser.parse_args(words)
    arguments.image = arguments.image or [str(names.pocket_file("sample.png"))]
    arguments.methods = chosen_methods(name, arguments)
    return arguments


def chosen_methods(name: str, arguments: argparse.Namespace) -> dict[str, methods.Method | None]:
    """The answers to show, from left to right: the one to compare with, then the method."""
    method = parse.build_method(name, arguments)
    if method is None:
        return {"greedy": None}
    beside = arguments.compare.lower()
    other = {} if beside == "none" else {"greedy": None}
    if beside not in ("greedy", "none"):
        other = {methods.get(beside).__name__: methods.get(beside)()}
    title = method.label
    return other | {title if title not in other else f"{title}, set": method}


def settings(method: methods.Method | None) -> str:
    """A method's numbers in words, and its switches where they are not as they come."""
    if method is None:
        return "the model as it is"
    if members := getattr(method, "members", ()):
        return "; ".join(f"{member.label}: {settings(member)}" for member in members)
    parts, usual = [], type(method)()
    for field in dataclasses.fields(method):
        value, name = getattr(method, field.name), field.name.rstrip("_")
        if not field.metadata.get("static") and value is not None:
            parts.append(f"{name} {float(value):g}")
        elif field.metadata.get("static") and value != getattr(usual, field.name):
            parts.append(f"{name} {value}")
    return ", ".join(parts)


def answer_tokens(model: LVLM, prompt: Inputs, method, arguments) -> list[int]:
    """The tokens of the answer: given, or generated greedily."""
    if arguments.answer is None:
        return model.generate(prompt, method=method, max_new_tokens=arguments.max_new_tokens).tokens[0]
    tokens = model.processor.tokenizer(arguments.answer, add_special_tokens=False)["input_ids"]
    return list(tokens)


def look(
    model: LVLM, prompt: Inputs, places: list, tokens: list[int], name: str, method, beta: float
) -> page.Answer:
    """Everything the page shows of one answer; `places` are those of `analysis.token_places`."""
    answer, words = analysis.words_of(tokens, functools.partial(text.decode, model.processor.tokenizer))
    if not words:
        raise LVLMError(f"{name} answered {answer!r}, which has no words to look at; ask another question")
    by_word = functools.partial(analysis.word_maps, words=words)
    # Words, layers, heads, image tokens.
    weights = by_word(model.attention(prompt, [tokens], method)[0].transpose(1, 0, 2, 3))
    maps = analysis.patch_maps(weights, places)
    probe = analysis.masking_probe(model, analysis.with_answer(model, prompt, tokens[:-1]), rows=len(tokens))
    curves = jax.jit(jax.vmap(analysis.drift_curve))
    drifts = [curves(one.reshape(*one.shape[:3], -1)) for one in maps]
    rows, image_id = analysis.mean_attention(model, prompt, tokens, method)
    return page.Answer(
        name=name,
        settings=settings(method),
        text=answer,
        words=words,
        maps=[one.transpose(1, 2, 0, 3, 4) for one in maps],
        mass=weights.sum(-1).transpose(1, 2, 0),
        sinks=analysis.head_sinks(model, prompt, beta, method)[:, 0],
        flow=np.asarray(analysis.information_flow(rows, image_id).text_share[:, 0]),
        probe=by_word(probe[:, 0].T),
        drift=tuple(np.mean([getattr(one, name) for one in drifts], axis=0) for name in ("noise", "anchor")),
    )


def draw(folder: pathlib.Path, pictures: list[page.Picture], answers: list[page.Answer]) -> list[str]:
    """Write the PNG files and return their names."""
    named = {answer.name: answer for answer in answers}
    figures.matrices(
        folder / "image_mass.png", "Attention on the images, mean over words", "share of the row's weight",
        {name: answer.mass.mean(-1) for name, answer in named.items()},
    )  # fmt: skip
    figures.matrices(
        folder / "sinks.png", "Vision sinks in the prompt (EAH)", "share of image patches",
        {name: answer.sinks for name, answer in named.items()},
    )  # fmt: skip
    figures.curves(
        folder / "flow.png", "Information flow (SEVI): held by text positions", "share of visual information",
        {name: [answer.flow] for name, answer in named.items()},
    )  # fmt: skip
    figures.curves(
        folder / "probe.png", "Masking probe: images hidden from a layer on, mean over words", "JSD, nats",
        {name: [answer.probe.mean(0)] for name, answer in named.items()},
    )  # fmt: skip
    figures.curves(
        folder / "drift.png", "Drift (reconstruction of CLVA), mean over words", "cosine",
        {name: [curve.mean(0) for curve in answer.drift] for name, answer in named.items()},
        ("with the early layers", "with the anchor"),
    )  # fmt: skip
    files = ["image_mass.png", "sinks.png", "flow.png", "probe.png", "drift.png"]
    for answer in answers:
        for number, picture in enumerate(pictures):
            maps = answer.maps[number].mean((0, 1))
            title = f"{answer.name}, image {number + 1}: each word against the mean of all; share of its attention here"
            shown = [word.text for word in answer.words]
            row = overlay.Row(title, picture.image, answer.text, shown, maps, picture.region)
            files.append(f"words_{answer.name.lower().replace(', ', '_')}_{number + 1}.png")
            figures.word_sheet(folder / files[-1], row, maps.sum((1, 2)))
    return files


def main(words: list[str]) -> int:
    """Answer, look, write."""
    arguments = command_line(words)
    images = [open_image(path) for path in arguments.image]
    messages = conversation(images, arguments.prompt)
    folder = pathlib.Path(arguments.out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LVLMError(f"--out {arguments.out!r} cannot be made: {error.strerror or error}") from error
    model = LVLM.from_pretrained(names.checkpoint(arguments.model_path), dtype=names.dtype(arguments.dtype))
    prompt = model.prepare(messages)
    places = analysis.token_places(model.config, prompt, len(images))
    beta = arguments.beta_sinks
    if beta is None:
        beta = SINK_WEIGHT / int(prompt.pictures.token_counts.max())
    fit = overlay.fitted(model, len(images))
    pictures = [page.Picture(image, overlay.seen_region(*image.size, fit)) for image in images]
    answers = []
    for name, method in arguments.methods.items():
        tokens = answer_tokens(model, prompt, method, arguments)
        answers.append(look(model, prompt, places, tokens, name, method, beta))
        print(f"{name}: {answers[-1].text}")
    title = f"Where {pathlib.Path(arguments.model_path).name} looked"
    built = page.build(title, arguments.prompt.replace("<image>", "▣"), pictures, answers)
    files = draw(folder, pictures, answers)
    try:
        (folder / "index.html").write_text(built, encoding="utf-8")
    except OSError as error:
        raise LVLMError(
            f"{str(folder / 'index.html')!r} cannot be written: {error.strerror or error}"
        ) from error
    print(f"{folder / 'index.html'} ({len(built.encode()) / 1e6:.1f} MB), and beside it {', '.join(files)}")
    return 0


if __name__ == "__main__":
    common.run(main)
