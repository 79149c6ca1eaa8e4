"""Figures without a screen, and PNG files of them."""

import pathlib
import warnings

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lvlm_jax.errors import LVLMError


def blank(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, whose parts keep clear of each other."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path) -> None:
    """Writes a figure as PNG, and makes its folder if there is none.

    Raises:
        LVLMError: the file cannot be written.
    """
    try:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # A letter that the font lacks is drawn as a box, which is as good as can be.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise LVLMError(f"the figure {str(path)!r} cannot be written: {error.strerror or error}") from error
