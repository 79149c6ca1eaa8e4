"""The layers a method acts in: bounds as layer numbers or as shares of the depth."""

from collections.abc import Sequence

import numpy as np

from lvlm_jax.errors import LVLMError


def layer_range(
    start: int | float | np.floating,
    end: int | float | np.floating | None,
    layers: Sequence[int] | int | None,
    num_layers: int,
) -> tuple[int, ...]:
    """The layers a method acts in.

    Args:
        start, end: first layer, and the one after the last (None: all the rest), counted from 0; a float in [0, 1]
            is a share of the depth, so that a setting carries over to another model.
        layers: explicit layers, or a single one, which overrule both.

    Raises:
        LVLMError: no layer is left.
    """

    def absolute(bound: int | float | np.floating) -> int:
        if not isinstance(bound, float | np.floating):
            return int(bound)
        return round(float(np.clip(bound, -1, 2)) * num_layers)  # what lies further out is out of the model

    layers = (layers,) if isinstance(layers, int) else layers
    if layers is None:
        last = num_layers if end is None else absolute(end)
        wanted = range(max(absolute(start), 0), min(last, num_layers))
    else:
        wanted = layers
    # A range is asked and not walked through: it may be as long as it likes.
    asked = range(num_layers) if isinstance(wanted, range) else wanted
    found = tuple(layer for layer in asked if 0 <= layer < num_layers and layer in wanted)
    if not found:
        given = f"layers from {start} to {end}"
        if layers is not None:
            given = f"layers {layers if isinstance(layers, range) else list(layers)}"
        raise LVLMError(
            f"{given} are none of this model's {num_layers} layers (0 to {num_layers - 1}); "
            "give others, or shares of the depth between 0.0 and 1.0"
        )
    return found
