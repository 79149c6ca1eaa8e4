"""matplotlib figures without a display, saved as PNG."""

import pathlib
import warnings

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lvlm_jax.errors import LVLMError


def blank(width: float, height: float) -> Figure:
    """An empty figure of `width` and `height` inches; its layout avoids overlaps."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path) -> None:
    """Writes a figure as PNG; creates its folder if necessary.

    Raises:
        LVLMError: the file cannot be written.
    """
    try:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # Characters that the font lacks are drawn as boxes, without a warning.
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise LVLMError(f"the figure {str(path)!r} cannot be written: {error.strerror or error}") from error
