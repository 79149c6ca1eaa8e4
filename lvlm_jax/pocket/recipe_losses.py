"""Supervised fine-tuning: next-token loss on the answers of conversations over images."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt8

from lvlm_jax.methods import Method
from lvlm_jax.pixels import CLIP
from lvlm_jax.training import forward
from lvlm_jax.training.losses import Mean, accuracy, cross_entropy

IMAGES = 4  # no conversation has more
MEAN, DEVIATION = (np.array(values, np.float32) for values in CLIP)


def pixels(images: UInt8[Array, "I Y X 3"]) -> Float[Array, "I 3 Y X"]:
    """Converts 8-bit RGB to the tower's input, as CLIP's image processor does for images of the right size."""
    return ((images.astype(jnp.float32) / 255.0 - MEAN) / DEVIATION).transpose(0, 3, 1, 2)


def image_id_of(tokens: Int[Array, "B T"], image_token: int, tokens_per_image: int) -> Int[Array, "B T"]:
    """0 at text tokens, k >= 1 at tokens of the k-th image; padding, which is on the right, counts as text."""
    placeholder = tokens == image_token
    order = (jnp.cumsum(placeholder, axis=1) - 1) // tokens_per_image + 1
    return jnp.where(placeholder, order, 0).astype(jnp.int32)


def next_token_logits(
    module: nn.Module,
    params: Any,
    tokens: Int[Array, "B T"],
    image_tokens: Float[Array, "I P E"],
    method: Method | None = None,
) -> Float[Array, "B T V"]:
    """Logits of every row, under a method or None: row t predicts token t + 1."""
    image_id = image_id_of(tokens, module.config.image_token_id, module.config.tokens_per_image)
    embedded = forward.embed(module, params, tokens, image_tokens)
    decoded = forward.decode(module, params, image_id, embedded, method, IMAGES)
    return module.apply({"params": params}, decoded.hidden[0], method="head")


def encode(module: nn.Module, params: Any, images: UInt8[Array, "I Y X 3"]) -> Float[Array, "I P E"]:
    """Image tokens of 8-bit images."""
    return forward.encode_images(module, params, pixels(images))


def answer_metrics(logits: Float[Array, "B T V"], batch: dict[str, jax.Array]) -> dict[str, Mean]:
    """`loss` and `accuracy` over the answer tokens of a batch with `tokens` and `answers`."""
    targets, mask = batch["tokens"][:, 1:], batch["answers"][:, 1:]
    return {"loss": cross_entropy(logits[:, :-1], targets, mask), "accuracy": accuracy(logits[:, :-1], targets, mask)}


def metrics(
    module: nn.Module, params: Any, batch: dict[str, jax.Array], method: Method | None = None
) -> dict[str, Mean]:
    """`answer_metrics` of a batch with `images`, `tokens` and `answers`."""
    image_tokens = encode(module, params, batch["images"])
    return answer_metrics(next_token_logits(module, params, batch["tokens"], image_tokens, method), batch)
