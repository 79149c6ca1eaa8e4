"""OPERA: beam search with a penalty on over-trust and rollbacks from it. arXiv 2311.17911.

If an answer relies too much on one summary token, that token's column stands out in the attention among answer tokens.
With w[i, j] the last layer's weight of answer token j for answer token i, the largest over heads, tokens counted from
0, and t the newest,

    p[j] = Π_{i = j..t} σ w[i, j]        column products of the j among the newest `window` tokens
    φ = max_j p[j],  c = argmax_j p[j]

Each of a beam's `candidates` most likely tokens is run and gets its own φ; its score is log p - α φ, and no other token
may follow. The c of every answer token is stored. If one value s occurs more than `threshold` times among the newest
`window` c of every beam, all beams roll back to token s and continue with candidates that they have not used there. A
position gets at most `max_rollbacks` rollbacks; then the position before it is tried, and then none. Later rollbacks
never go to an earlier s.

That is `variant="paper"`. Its φ is unbounded and soon outweighs every log p (here α φ is clipped at 1e5), so the
default is `variant="code"`, the authors' program, which differs as follows. w is divided by its sum over all columns. φ
is 1e-7 times the product, in float16; while an answer has at most 10 tokens, φ is minus the weight on image columns.
Scores are log-softmax(l - α φ) over the candidates alone. After every token, each beam slot stores the mode of its
candidates' c; s is the mode over the slots (the smallest on ties). All beams roll back if s occurs at least `threshold`
times in every slot; slots keep their entries when beams are reordered. s must be at least 10, and an earlier s may
follow a later one.

Differs from the paper in: nothing known. Differs from the authors' code in: a rollback reruns only the answer, and
continues with one of the candidates (there: with any token, by its logit). A public copy of that code requires more
than `threshold` occurrences.

With α = 0 and no rollbacks it equals beam search, if there are at least twice as many candidates as beams, or under
"code" if the candidates are the whole vocabulary.

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

LARGEST_EXPONENT = 80.0  # bound on the logarithm of a column product, so that the product stays finite in float32
LARGEST_PENALTY = 1e5  # bound on one token's penalty, above any difference of log-probabilities
CODE_FACTOR = 1e-7  # factor of the authors' code on column products
CODE_IMAGE_TOKENS = 10  # up to this many tokens, the authors' code rewards attention to the image instead
CODE_FIRST_COLUMN = 10  # the authors' code does not roll back to earlier tokens


@register("opera")
class OPERA(Method):
    """Over-trust penalty and retrospection-allocation; see the module for the formulas."""

    alpha: Strength = strength(1.0, "penalty weight α", low=0, flat="part of a search")
    sigma: Strength = strength(50.0, "scale factor σ of attention weights", low=0, flat="part of a search")
    beams: int = switch(5, "beams per sample")
    candidates: int = switch(5, "tokens tried per beam")
    threshold: int = switch(15, "recurrences of a column that cause a rollback")
    max_rollbacks: int = switch(5, "rollbacks to one position")
    window: int = switch(512, "how many of the newest answer tokens count")
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
        """w in the rows of the newest tokens, for all columns; the module docstring defines w."""
        strongest = attention.max(axis=1)
        if self.variant == "code":
            return strongest / strongest.sum(axis=-1, keepdims=True)
        return strongest

    def products(
        self, before: Float[Array, "R M"], row: Float[Array, "R M"], newest: Int[Array, ""]
    ) -> Float[Array, "R M"]:
        """Logarithms of the column products after one more row, -inf in columns that are not written yet."""
        columns = jnp.arange(row.shape[1])
        factor = jnp.log(self.sigma * row)
        started = jnp.where(columns == newest, factor, -jnp.inf)
        return jnp.where(columns < newest, before + factor, started)

    def over_trust(
        self, products: Float[Array, "R M"], newest: Int[Array, ""], image_weight: Float[Array, "R"]
    ) -> tuple[Float[Array, "R"], Int[Array, "R"]]:
        """φ and c of each row (see the module); `image_weight` is the sum of the row's w over image columns."""
        inside = jnp.arange(products.shape[1]) > newest - self.window
        products = jnp.where(inside, products, -jnp.inf)
        if self.variant == "code":
            scores = (CODE_FACTOR * jnp.exp(jnp.minimum(products, LARGEST_EXPONENT))).astype(jnp.float16)
            scores = jnp.where(inside, scores, -1)  # if all products underflow in float16, c is still inside the answer
            largest = scores.max(axis=-1).astype(jnp.float32)
            largest = jnp.where(newest < CODE_IMAGE_TOKENS, -image_weight, largest)
            return largest, scores.argmax(axis=-1).astype(jnp.int32)
        largest = jnp.exp(jnp.minimum(products.max(axis=-1), LARGEST_EXPONENT))
        return largest, products.argmax(axis=-1).astype(jnp.int32)

    def gains(
        self, logits: Float[Array, "N C"], logprobs: Float[Array, "N C"], over_trust: Float[Array, "N C"]
    ) -> Float[Array, "N C"]:
        """The amounts that candidates add to the scores of their beams."""
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
        """The stored columns of each beam, with that of the newest token.

        Args:
            columns: the columns stored so far.
            candidates: c of all candidates of every beam.
            parents, chosen: for each new beam, the beam that it continues, and its candidate's index among those of all
                beams.
            newest: index of the newest token.
        """
        if self.variant == "code":
            modes = mode(candidates)
        else:
            columns, modes = columns[parents], candidates.reshape(-1)[chosen]
        return jax.lax.dynamic_update_index_in_dim(columns, modes, newest, axis=1)

    def recurring(self, columns: Int[np.ndarray, "N T"], alive: Bool[np.ndarray, "N"]) -> int | None:
        """Returns s if s recurs often enough in every beam that `alive` marks; otherwise None. Runs on the host.

        Args:
            columns: the result of `noted` for every token so far.
            alive: beams with an unfinished answer, at least one. Under "code", s must recur in all beams instead.
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
    """The most frequent number of each row; the smallest on ties."""
    counts = (numbers[:, :, None] == numbers[:, None, :]).sum(axis=-1)
    is_mode = counts == counts.max(axis=-1, keepdims=True)
    return jnp.where(is_mode, numbers, jnp.iinfo(jnp.int32).max).min(axis=-1).astype(jnp.int32)
