"""Computes everything that the attention page shows, and writes the page and its figures."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from lvlm_jax import analysis, files
from lvlm_jax.analysis import figures, overlay, page
from lvlm_jax.attention.layered import Layered
from lvlm_jax.errors import LVLMError
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods import Method
from lvlm_jax.processors import text

SINK_WEIGHT = 0.002 * 576  # EAH's threshold times the number of LLaVA's tokens per image, for which it was tuned


def settings_of(method: Method | None) -> str:
    """A method's numbers and its changed switches, in words."""
    if method is None:
        return "the model without a method"
    if members := getattr(method, "members", ()):
        return "; ".join(f"{member.label}: {settings_of(member)}" for member in members)
    parts, usual = [], type(method)()
    for field in dataclasses.fields(method):
        value, name = getattr(method, field.name), field.name.rstrip("_")
        if isinstance(value, Layered):
            lowest, highest = float(value.values.min()), float(value.values.max())
            parts.append(f"{name} {lowest:g} to {highest:g} by layer")
        elif "low" in field.metadata and value is not None:
            parts.append(f"{name} {float(value):g}")
        elif field.metadata.get("static") and value != getattr(usual, field.name):
            parts.append(f"{name} {value}")
    return ", ".join(parts)


class Looker:
    """Observes a model while it answers one prompt, under several methods.

    Args:
        model: a model with a processor.
        images: the images of the messages, in their order.
        messages: the conversation to answer.
        sink_weight: weight above which an image patch is a vision sink; None: `SINK_WEIGHT` divided by the tokens of
            the largest image.

    Attributes:
        pictures: the images as the page shows them.

    Raises:
        LVLMError: the model cannot process the prompt.
    """

    def __init__(self, model: LVLM, images: Sequence[Image.Image], messages: Any, sink_weight: float | None = None):
        self._model = model
        self._prompt = model.prepare(messages)
        self._places = analysis.token_places(model.config, self._prompt, len(images))
        if sink_weight is None:
            sink_weight = SINK_WEIGHT / int(self._prompt.pictures.token_counts.max())
        self._sink_weight = sink_weight
        fit = overlay.fitted(model, len(images))
        self.pictures = [page.Picture(image, overlay.seen_region(*image.size, fit)) for image in images]

    def tokens(self, method: Method | None, answer_text: str | None = None, longest: int = 128) -> list[int]:
        """The tokens of the answer: those of `answer_text`, or at most `longest` tokens that are generated greedily."""
        if answer_text is None:
            return self._model.generate(self._prompt, method=method, max_new_tokens=longest).tokens[0]
        return list(self._model.processor.tokenizer(answer_text, add_special_tokens=False)["input_ids"])

    def answer(self, name: str, method: Method | None, tokens: list[int]) -> page.Answer:
        """Everything that the page shows about one answer.

        Raises:
            LVLMError: the answer has no words.
        """
        model, prompt = self._model, self._prompt
        answer, words = analysis.words_of(tokens, functools.partial(text.decode, model.processor.tokenizer))
        if not words:
            raise LVLMError(f"{name} answered {answer!r}, which has no words to look at; ask another question")
        by_word = functools.partial(analysis.word_maps, words=words)
        # Words, layers, heads, image tokens.
        weights = by_word(model.attention(prompt, [tokens], method)[0].transpose(1, 0, 2, 3))
        maps = analysis.patch_maps(weights, self._places)
        probe = analysis.masking_probe(model, analysis.with_answer(model, prompt, tokens[:-1]), rows=len(tokens))
        curves = jax.jit(jax.vmap(analysis.drift_curve))
        drifts = [curves(one.reshape(*one.shape[:3], -1)) for one in maps]
        rows, image_id = analysis.mean_attention(model, prompt, tokens, method)
        return page.Answer(
            name=name,
            settings=settings_of(method),
            text=answer,
            words=words,
            maps=[one.transpose(1, 2, 0, 3, 4) for one in maps],
            mass=weights.sum(-1).transpose(1, 2, 0),
            sinks=analysis.head_sinks(model, prompt, self._sink_weight, method)[:, 0],
            flow=np.asarray(analysis.information_flow(rows, image_id).text_share[:, 0]),
            probe=by_word(probe[:, 0].T),
            drift=tuple(np.mean([getattr(one, name) for one in drifts], axis=0) for name in ("noise", "anchor")),
        )


def write(
    folder: Path, title: str, prompt: str, pictures: list[page.Picture], answers: list[page.Answer]
) -> list[Path]:
    """Writes the page, and its figures as PNG files, into an existing folder.

    Returns:
        The files, `index.html` first.

    Raises:
        LVLMError: the page cannot be written.
    """
    html = page.build(title, prompt, pictures, answers)
    figures_written = _draw(folder, pictures, answers)
    files.write_whole(folder / "index.html", html)
    return [folder / "index.html", *figures_written]


def _draw(folder: Path, pictures: list[page.Picture], answers: list[page.Answer]) -> list[Path]:
    by_name = {answer.name: answer for answer in answers}
    figures.matrices(
        folder / "image_mass.png",
        "Attention on the images, mean over words",
        "share of the row's weight",
        {name: answer.mass.mean(-1) for name, answer in by_name.items()},
    )
    figures.matrices(
        folder / "sinks.png",
        "Vision sinks in the prompt (EAH)",
        "share of image patches",
        {name: answer.sinks for name, answer in by_name.items()},
    )
    figures.curves(
        folder / "flow.png",
        "Information flow (SEVI), after each number of layers",
        "share on text positions",
        {name: [answer.flow] for name, answer in by_name.items()},
    )
    figures.curves(
        folder / "probe.png",
        "Masking probe: images hidden from a layer on, model without a method, mean over words",
        "JSD, nats",
        {f"reading {name}'s answer": [answer.probe.mean(0)] for name, answer in by_name.items()},
    )
    figures.curves(
        folder / "drift.png",
        "Drift (reconstruction of CLVA), mean over words",
        "cosine",
        {name: [curve.mean(0) for curve in answer.drift] for name, answer in by_name.items()},
        ("with the early layers", "with the anchor"),
    )
    paths = [folder / f"{name}.png" for name in ("image_mass", "sinks", "flow", "probe", "drift")]
    for answer in answers:
        for number, picture in enumerate(pictures):
            maps = answer.maps[number].mean((0, 1))
            title = f"{answer.name}, image {number + 1}: each word against the mean of all; share of its attention here"
            words = [word.text for word in answer.words]
            row = overlay.ImageRow(title, picture.image, answer.text, words, maps, picture.region)
            paths.append(folder / f"words_{answer.name.lower().replace(', ', '_')}_{number + 1}.png")
            figures.word_sheet(paths[-1], row, maps.sum((1, 2)))
    return paths
