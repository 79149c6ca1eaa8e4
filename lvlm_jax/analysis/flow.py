"""Information flow from image to text (SEVI, arXiv 2505.14257), and a masking probe that measures it from outside."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.methods import Method, chain, strength
from lvlm_jax.methods.base import Strength, frozen


class Flow(NamedTuple):
    """Where visual information is, before the first layer and after each of L layers.

    Attributes:
        text_share: share of all visual information that is at text positions.
        last_row: share of the last position's information that is visual.
    """

    text_share: Float[Array, "L+1 B"]
    last_row: Float[Array, "L+1 B"]


def information_flow(attention: Float[Array, "L B S S"], image_id: Int[Array, "B S"]) -> Flow:
    """Attention rollout, read as a flow of information.

        F^0 = I,   F^l = ½ (I + W^l) F^{l-1},   v_i^l = Σ_{j in image} F^l_ij
        text share = Σ_{i in text} v_i^l / Σ_i v_i^l

    with W^l the mean over heads. Row i of F^l says how much of each input is at position i after layer l; half comes
    through the residual stream, half through attention. F^l is linear in F^{l-1}, so only the sums over image columns
    are kept from layer to layer, and memory is that of the attention itself.

    Args:
        attention: head-mean weights of all rows, `Tap(layers=None, rows="all", mean_heads=True)`; zero above the
            diagonal and at padding columns.
        image_id: 0 for text, k >= 1 for the k-th image, -1 for padding, whose rows are ignored.

    Returns:
        The two shares; zero in a sample without an image.
    """
    image, text = image_id > 0, image_id == 0
    visual = image.astype(jnp.float32)

    def layer(visual, weights):
        mixed = jnp.einsum("BTS,BS->BT", weights, visual, precision=jax.lax.Precision.HIGHEST)
        visual = 0.5 * (visual + mixed)
        return visual, visual

    _, outputs = jax.lax.scan(layer, visual, jnp.asarray(attention, jnp.float32))
    levels = jnp.concatenate([visual[None], outputs])
    on_text = jnp.where(text, levels, 0.0).sum(-1)
    total = jnp.where(image_id >= 0, levels, 0.0).sum(-1)
    return Flow(on_text / jnp.where(total > 0, total, 1.0), levels[:, :, -1])


@frozen
class HideImages(Method):
    """Text rows see no image column from layer `from_layer` on.

    The layer is an array leaf, so a sweep over it is one program. All text rows after an image are affected. Image rows
    still see images, but no later text row can read them.
    """

    from_layer: Strength = strength(0, "first layer in which text rows do not see images")

    rows: ClassVar[str] = "all"
    by_rows: ClassVar[bool] = True

    def mask(self, site, mask):
        text_row = site.image_id[:, site.row_index] == 0
        hidden = text_row[:, None, :, None] & site.image[:, None, None, :] & (site.layer >= self.from_layer)
        return mask & ~hidden


def masking_probe(model, prompt, rows: int = 1, method: Method | None = None) -> Float[np.ndarray, "L B R"]:
    """How much the next-token distribution changes when images are hidden from layer l on, for every l.

        probe_l = JSD(softmax(logits), softmax(logits with images hidden in layers l ... L-1))

    in nats, between 0 and ln 2. From the layer where it drops to zero, no layer needs the image any more: the text
    positions already contain the information from it.

    Args:
        model: an `LVLM`.
        prompt: anything `LVLM.prepare` takes; append an answer to probe its tokens.
        rows: how many of the last rows to probe; row -1 predicts the token after the prompt.
        method: a method without a contrast branch, to probe the model under it; None for the plain model.

    Raises:
        LVLMError: fewer prompt rows than `rows`.
    """
    prompt = model.prepare(prompt)
    shortest = int(prompt.lengths.min())
    if not 1 <= rows <= shortest:
        raise LVLMError(f"rows is {rows}; expected 1 to {shortest}, the tokens of the shortest prompt")

    def distribution(from_layer: int) -> jax.Array:
        hide = HideImages(from_layer=from_layer)
        logits = model.logits(prompt, hide if method is None else chain(method, hide))
        return jax.nn.softmax(logits[:, -rows:])

    depth = model.config.text.num_layers
    plain = distribution(depth)
    return np.stack([np.asarray(divergence(plain, distribution(layer))) for layer in range(depth)])


def divergence(first: Float[Array, "*any V"], second: Float[Array, "*any V"]) -> Float[Array, "*any"]:
    """Jensen-Shannon divergence of two distributions, ½ KL(p‖m) + ½ KL(q‖m) with m = ½ (p + q), in nats."""
    mean = 0.5 * (first + second)

    def to_mean(p):
        ratio = jnp.where(p > 0, p / jnp.where(mean > 0, mean, 1.0), 1.0)
        return (p * jnp.log(ratio)).sum(-1)

    return jnp.maximum(0.5 * to_mean(first) + 0.5 * to_mean(second), 0.0)
