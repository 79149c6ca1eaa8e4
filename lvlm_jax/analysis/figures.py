"""The figures of the attention page as PNG files: curves, maps of layers x heads, words over images."""

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from lvlm_jax.analysis import canvas, overlay

COLOURS = ("#2f6f8f", "#b4532a", "#6b8e4e", "#7a5c99")
PER_LINE = 8  # panels per line on a sheet of words


def curves(
    path, title: str, label: str, series: Mapping[str, Sequence[Float[np.ndarray, "L"]]], names: Sequence[str] = ()
) -> None:
    """Draws curves over layers: a colour per answer, a line style per curve; `names` are the curves' names.

    Raises:
        LVLMError: the file cannot be written.
    """
    figure, axis = _figure(6.4, 3.6)
    for colour, (answer, lines) in zip(_cycle(COLOURS), series.items(), strict=False):
        for style, (number, values) in zip(_cycle(("-", "--", ":")), enumerate(lines), strict=False):
            line_label = f"{answer}, {names[number]}" if names else answer
            axis.plot(np.arange(len(values)), values, style, color=colour, label=line_label, linewidth=1.8)
    axis.set(xlabel="layer", ylabel=label)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    axis.set_title(title, fontsize=10, loc="left", parse_math=False)
    canvas.save(figure, path)


def matrices(path, title: str, label: str, maps_by_name: Mapping[str, Float[np.ndarray, "L H"]]) -> None:
    """Draws maps of layers x heads side by side with one colour scale.

    Raises:
        LVLMError: the file cannot be written.
    """
    layers, heads = next(iter(maps_by_name.values())).shape
    width = 1.2 + len(maps_by_name) * max(2.4, 0.16 * heads)
    figure, axes = _figure(width, 1.2 + max(2.0, 0.16 * layers), len(maps_by_name))
    top = max(values.max() for values in maps_by_name.values()) or 1.0
    for axis, (name, values) in zip(np.atleast_1d(axes), maps_by_name.items(), strict=True):
        image = axis.imshow(values, vmin=0, vmax=top, cmap="inferno", aspect="auto")
        axis.set(xlabel="head", ylabel="layer")
        axis.set_title(name, fontsize=9, parse_math=False)
    figure.colorbar(image, ax=axes, label=label)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, parse_math=False)
    canvas.save(figure, path)


def word_sheet(path, row: overlay.ImageRow, mass: Float[np.ndarray, "W"]) -> None:
    """Draws every word's map over one image, in reading order, with its share of attention on that image.

    Maps are relative to the answer's mean (`overlay.relative`).

    Raises:
        LVLMError: the file cannot be written.
    """
    lines = -(-len(row.words) // PER_LINE)
    height = 1.7 * min(row.image.height / row.image.width, 1.5) + 0.35
    figure, axes = _figure(1.7 * PER_LINE, lines * height + 0.6, PER_LINE, lines)
    for axis in axes.flat:
        axis.set_axis_off()
    maps = overlay.relative(row.maps)
    for axis, word, heat, share in zip(axes.flat, row.words, maps, mass, strict=False):
        overlay.panel(axis, row, heat, f"{textwrap.shorten(word, 16, placeholder='…')} {share:.0%}")
    figure.suptitle(row.title, x=0.01, ha="left", fontsize=10, parse_math=False)
    canvas.save(figure, path)


def _figure(width: float, height: float, columns: int = 1, rows: int = 1):
    figure = canvas.blank(width, height)
    return figure, figure.subplots(rows, columns)


def _cycle(items: Sequence):
    while True:
        yield from items
