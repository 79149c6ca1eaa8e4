"""OPERA: beam search with a penalty on over-trust and rollbacks from it. arXiv 2311.17911.

An answer that leans on one summary token shows as a column in the attention among answer tokens. With w[i, j] the last
layer's weight of answer token j for answer token i, the largest over heads, tokens counted from 0, and t the newest,

    p[j] = Π_{i = j..t} σ w[i, j]        column products of the j among the newest `window` tokens
    φ = max_j p[j],  c = argmax_j p[j]

Each of a beam's `candidates` most likely tokens is run, and so gets a φ of its own; its score is log p - α φ, and no
other token may follow. Every token of an answer keeps its c. Once one s makes up more than `threshold` of the newest
`window` c in each beam, all beams go back to their answers up to token s and go on from there with other candidates
than those they took then. That happens at most `max_rollbacks` times at a position; after that the position before it
is tried, and after that none. Later rollbacks never go to an earlier s.

That is `variant="paper"`. Its φ has no bound and soon outweighs every log p (here α φ ends at 1e5), so the default is
`variant="code"`, the authors' program, which differs in the following. w is divided by its sum over all columns. φ is
1e-7 times the product, in float16; while an answer has at most 10 tokens φ is minus the weight on image columns
instead. Scores are log-softmax(l - α φ) over the candidates alone. After every token each beam notes the mode of its
candidates' c, and s is the mode of what the beams note (of equals the smallest). All beams go back once s stands at
least `threshold` times among the notes of each, which keep their places when beams change theirs. s must be at least
10, and an earlier s may follow a later one.

Differs from the paper in: nothing known. Differs from the authors' code in: a rollback runs nothing but the answer
again, and what follows it is one of the candidates (there any token, by its logit); a public copy of that code
compares with more than `threshold`.

With α = 0 and without rollbacks it is beam search: as long as the candidates are at least twice the beams, or under
"code" the whole vocabulary.

Rows, layers, stages: none; reads the last layer's attention. Cost: every token runs beams x candidates rows with a
cache each, in one pass over the weights, and waits for the host; a rollback runs up to the whole answer once more.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.base import Method, Strength, strength, switch
from lvlm_jax.methods.registry import register

LARGEST_EXPONENT = 80.0  # of a column product, so that it stays finite in float32
LARGEST_PENALTY = 1e5  # of a token: beyond any difference of log-probabilities, and sums of it keep the order
CODE_FACTOR = 1e-7  # what the authors' code multiplies column products by
CODE_IMAGE_TOKENS = 10  # for so many tokens the authors' code rewards looking at the image instead
CODE_FIRST_COLUMN = 10  # the authors' code does not go back to earlier tokens


@register("opera")
class OPERA(Method):
    """Over-trust penalty and retrospection-allocation; see the module for the formulas."""

    alpha: Strength = strength(1.0, "penalty weight α", low=0, flat="part of a search")
    sigma: Strength = strength(50.0, "scale factor σ of attention weights", low=0, flat="part of a search")
    beams: int = switch(5, "beams per sample")
    candidates: int = switch(5, "tokens tried per beam")
    threshold: int = switch(15, "how often a column recurs before a rollback")
    max_rollbacks: int = switch(5, "rollbacks to one position")
    window: int = switch(512, "newest answer tokens that count")
    variant: str = switch("code", "formulas of the paper or of the authors' program", ("paper", "code"))

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {"paper": dict(variant="paper"), "code": dict(variant="code")}
    search: ClassVar[str] = "opera"

    def __post_init__(self):
        super().__post_init__()
        lowest = dict(beams=1, candidates=2, threshold=1, max_rollbacks=0, window=1)
        for name, low in lowest.items():
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < low:
                raise LVLMError(f"OPERA: {name} is {value!r}; expected a whole number >= {low}")

    def weights_of_rows(self, attention: Float[Array, "R H S"]) -> Float[Array, "R S"]:
        """w of the newest tokens' rows, all columns."""
        strongest = attention.max(axis=1)
        if self.variant == "code":
            return strongest / strongest.sum(axis=-1, keepdims=True)
        return strongest

    def products(
        self, before: Float[Array, "R M"], row: Float[Array, "R M"], newest: Int[Array, ""]
    ) -> Float[Array, "R M"]:
        """Logarithms of the column products with one row more, -inf in columns that are not written yet."""
        columns = jnp.arange(row.shape[1])
        factor = jnp.log(self.sigma * row)
        started = jnp.where(columns == newest, factor, -jnp.inf)
        return jnp.where(columns < newest, before + factor, started)

    def over_trust(
        self, products: Float[Array, "R M"], newest: Int[Array, ""], image_weight: Float[Array, "R"]
    ) -> tuple[Float[Array, "R"], Int[Array, "R"]]:
        """φ and c of each row. `image_weight` is the sum of its w over image columns."""
        inside = jnp.arange(products.shape[1]) > newest - self.window
        products = jnp.where(inside, products, -jnp.inf)
        if self.variant == "code":
            scores = (CODE_FACTOR * jnp.exp(jnp.minimum(products, LARGEST_EXPONENT))).astype(jnp.float16)
            scores = jnp.where(inside, scores, -1)  # where all products are too small for float16, c lies inside too
            largest = scores.max(axis=-1).astype(jnp.float32)
            largest = jnp.where(newest < CODE_IMAGE_TOKENS, -image_weight, largest)
            return largest, scores.argmax(axis=-1).astype(jnp.int32)
        largest = jnp.exp(jnp.minimum(products.max(axis=-1), LARGEST_EXPONENT))
        return largest, products.argmax(axis=-1).astype(jnp.int32)

    def gains(
        self, logits: Float[Array, "N C"], logprobs: Float[Array, "N C"], over_trust: Float[Array, "N C"]
    ) -> Float[Array, "N C"]:
        """What candidates add to the scores of their beams."""
        penalty = jnp.minimum(self.alpha * over_trust, LARGEST_PENALTY)
        if self.variant == "code":
            return jax.nn.log_softmax(logits - penalty, axis=-1)
        return logprobs - penalty

    def noted(
        self,
        columns: Int[Array, "N M"],
        candidates: Int[Array, "N C"],
        parents: Int[Array, "N"],
        chosen: Int[Array, "N"],
        newest: Int[Array, ""],
    ) -> Int[Array, "N M"]:
        """The columns that beams keep, with those of the newest token.

        Args:
            columns: as they were.
            candidates: c of all candidates of every beam.
            parents, chosen: which beam each continues, and with which of the candidates of all beams.
        """
        if self.variant == "code":
            now = mode(candidates)
        else:
            columns, now = columns[parents], candidates.reshape(-1)[chosen]
        return jax.lax.dynamic_update_index_in_dim(columns, now, newest, axis=1)

    def recurring(self, columns: Int[np.ndarray, "N T"], alive: Bool[np.ndarray, "N"]) -> int | None:
        """s, if every beam that counts has come back to it often enough; on the host.

        Args:
            columns: what `noted` keeps, for every token so far.
            alive: beams that hold an answer; at least one. Under "code" all beams count.
        """
        if self.variant == "code":
            place = int(mode(columns[None, :, -1])[0])
            often = (columns == place).sum(axis=1) >= self.threshold
            return place if place >= CODE_FIRST_COLUMN and often.all() else None
        recent = columns[alive, max(0, columns.shape[1] - self.window) :]
        counts = (recent[:, :, None] == np.arange(columns.shape[1])).sum(axis=1)
        place = int(np.bincount(counts.argmax(axis=1)).argmax())
        return place if (counts[:, place] > self.threshold).all() else None


def mode(numbers: Int[Array, "N C"] | Int[np.ndarray, "N C"]) -> Int[Array, "N"]:
    """The most frequent number of each row; of equally frequent ones the smallest."""
    counts = (numbers[:, :, None] == numbers[:, None, :]).sum(axis=-1)
    most = counts == counts.max(axis=-1, keepdims=True)
    return jnp.where(most, numbers, jnp.iinfo(jnp.int32).max).min(axis=-1).astype(jnp.int32)
