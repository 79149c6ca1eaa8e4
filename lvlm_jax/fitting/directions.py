"""Directions between good and bad answers in the hidden states: VTI's, with those of its tower, and Nullu's."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lvlm_jax import LVLM
from lvlm_jax.attention import Tap
from lvlm_jax.fitting import masked_images
from lvlm_jax.fitting.forced import forced
from lvlm_jax.generation import forward
from lvlm_jax.generation.state import Prompt
from lvlm_jax.training.data.pair_files import Pair

KEPT = 16  # directions per layer in Nullu's file; a method uses the first few


@functools.partial(jax.jit, static_argnames=("config", "tail_rows", "image_count", "mean"))
def _states(
    params: dict, config, prompt: Prompt, answer: Bool[Array, "B T"], tail_rows: int, image_count: int, mean: bool
) -> Float[Array, "B L E"]:
    """The output of each layer, at the answer's last token or averaged over its tokens."""
    tap = Tap(hidden=tuple(range(1, config.text.num_layers + 1)), rows="all" if mean else "last")
    hidden = forward.full_forward(params, config, prompt, None, tail_rows, image_count, tap)[1].hidden[:, 0]
    hidden = hidden.astype(jnp.float32)
    if not mean:
        return hidden[:, :, -1].swapaxes(0, 1)
    shares = answer / answer.sum(axis=1, keepdims=True)
    return jnp.einsum("LBTE,BT->BLE", hidden, shares, precision=jax.lax.Precision.HIGHEST)


def differences(model: LVLM, pairs: Sequence[Pair], mean: bool) -> Float[np.ndarray, "B L E"]:
    """The hidden states of good answers minus the hidden states of bad answers."""
    states = []
    for side in ("good", "bad"):
        sequences = forced(model, pairs, side)
        states_of_side = _states(
            model.params, model.config, sequences.prompt, jnp.asarray(sequences.answer), **sequences.static, mean=mean
        )
        states.append(np.asarray(states_of_side))
    return states[0] - states[1]


def vti_collect(model: LVLM, pairs: Sequence[Pair], seed: int) -> dict[str, np.ndarray]:
    """The difference d of each pair, at the last token, and of each image in the tower."""
    return {
        "differences": differences(model, pairs, mean=False),
        "vision_differences": masked_images.differences(model, pairs, seed),
    }


def vti_finish(collected: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The directions of the decoder and of the tower."""
    return {
        "directions": _directions(collected["differences"]),
        "vision_directions": _directions(collected["vision_differences"]),
    }


def _directions(differences_found: Float[np.ndarray, "B L E"]) -> Float[np.ndarray, "L E"]:
    """v_l = mean d + the unit first principal component, with the sign that makes its largest score positive."""
    differences_found = differences_found.astype(np.float64)
    mean = differences_found.mean(axis=0)
    directions = []
    for layer in range(mean.shape[0]):
        centred = differences_found[:, layer] - mean[layer]
        scores, _, components = np.linalg.svd(centred, full_matrices=False)
        sign = np.sign(scores[np.abs(scores[:, 0]).argmax(), 0]) if len(differences_found) > 1 else 0
        directions.append(mean[layer] + sign * components[0])
    return np.stack(directions).astype(np.float32)


def nullu_collect(model: LVLM, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """D of each pair: half the difference of the means over the answers' tokens."""
    return {"differences": differences(model, pairs, mean=True) / 2}


def nullu_finish(collected: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The first right singular vectors of D_l, `Float[L, R, E]`, and their singular values."""
    differences_found = collected["differences"].astype(np.float64)
    directions, sizes = [], []
    for layer in range(differences_found.shape[1]):
        _, values, components = np.linalg.svd(differences_found[:, layer], full_matrices=False)
        directions.append(components[:KEPT])
        sizes.append(values[:KEPT])
    return {
        "directions": np.stack(directions).astype(np.float32),
        "singular_values": np.stack(sizes).astype(np.float32),
    }
