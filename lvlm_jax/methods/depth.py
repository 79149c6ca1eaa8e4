"""The layers a method acts in, given as layer numbers or as shares of the depth."""

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
        start, end: first layer, and the one after the last (None: to the end), from 0; a float in [0, 1] is a share of
            the depth, so that a setting carries over to another model.
        layers: explicit layers, or a single one; takes precedence over `start` and `end`.

    Raises:
        LVLMError: no layers remain.
    """

    def absolute(bound: int | float | np.floating) -> int:
        if not isinstance(bound, float | np.floating):
            return int(bound)
        return round(float(np.clip(bound, -1, 2)) * num_layers)  # clipped: still outside the model

    layers = (layers,) if isinstance(layers, int) else layers
    if layers is None:
        last = num_layers if end is None else absolute(end)
        requested = range(max(absolute(start), 0), min(last, num_layers))
    else:
        requested = layers
    # A range is tested, not iterated: it may be very long.
    candidates = range(num_layers) if isinstance(requested, range) else requested
    chosen = tuple(layer for layer in candidates if 0 <= layer < num_layers and layer in requested)
    if not chosen:
        description = f"layers from {start} to {end}"
        if layers is not None:
            description = f"layers {layers if isinstance(layers, range) else list(layers)}"
        raise LVLMError(
            f"{description} are none of this model's {num_layers} layers (0 to {num_layers - 1}); "
            "give others, or shares of the depth between 0.0 and 1.0"
        )
    return chosen
