"""Chooses tokens from next-token logits."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from lvlm_jax.errors import LVLMError
from lvlm_jax.methods.likeliest import likeliest

_RULES = ("sample", "top_k", "top_p", "repetition_penalty")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Numbers are array leaves; the set of rules is static.

    Attributes:
        temperature: divides the logits.
        top_k: only the k most likely tokens may be drawn.
        top_p: only the fewest tokens whose probability, after temperature and top-k, reaches p may be drawn.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen before (arXiv 1909.05858).
        rules: those of "sample", "top_k", "top_p", "repetition_penalty" that are on; without "sample" the most likely
            token is taken.
    """

    temperature: jax.Array | np.float32
    top_k: jax.Array | np.int32
    top_p: jax.Array | np.float32
    repetition_penalty: jax.Array | np.float32
    rules: frozenset[str] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, repetition_penalty: float = 1.0
    ) -> "Sampling":
        """Makes a `Sampling` of numbers that `settings.Decoding` has validated.

        Temperature 0 is greedy; `top_k` 0, `top_p` 1 and `repetition_penalty` 1 are off.
        """
        on = {
            "sample": temperature > 0,
            "top_k": temperature > 0 and top_k > 0,
            "top_p": temperature > 0 and top_p < 1,
            "repetition_penalty": repetition_penalty != 1,
        }
        return cls(
            np.float32(temperature),
            np.int32(top_k),
            np.float32(top_p),
            np.float32(repetition_penalty),
            frozenset(rule for rule, active in on.items() if active),
        )

    def pick(
        self,
        logits: Float[Array, "B V"],
        keys: Key[Array, "B"],
        step: Int[Array, ""] | Int[Array, "B"],
        seen_tokens: Bool[Array, "B V"] | None,
    ) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
        """Chooses one token per sample; also returns the token's log-probability under the unmodified `logits`.

        If a sample's logits define no distribution, its log-probability is NaN. They define none if one of them is NaN
        or positive infinity, or if none is finite. A logit of negative infinity is allowed: it rules its token out.

        Args:
            logits: `Step.combined`.
            keys: one random key per sample; the draw depends only on the key and the step.
            step: number of tokens generated before; one number, or one per sample.
            seen_tokens: tokens of prompt and answer so far; needed only by the repetition penalty.
        """
        scores = logits
        if "repetition_penalty" in self.rules:
            penalty = self.repetition_penalty
            penalised = jnp.where(scores > 0, scores / penalty, scores * penalty)
            scores = jnp.where(seen_tokens, penalised, scores)
        if "sample" in self.rules:
            step_keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(step, keys.shape))
            tokens = jax.vmap(jax.random.categorical)(step_keys, self._filter(scores / self.temperature))
        else:
            tokens = scores.argmax(axis=-1)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=-1)[:, 0]
        return tokens.astype(jnp.int32), logprobs

    def _filter(self, scores: Float[Array, "B V"]) -> Float[Array, "B V"]:
        if not {"top_k", "top_p"} & self.rules:
            return scores
        size = scores.shape[-1]
        if "top_k" in self.rules:
            scores = _from_lowest(scores, likeliest(scores, jnp.zeros_like(scores), jnp.inf, self.top_k))
        if "top_p" in self.rules:
            probabilities = jax.nn.softmax(scores, axis=-1)
            scores = _from_lowest(scores, likeliest(scores, probabilities, self.top_p, size))
        return scores


def _from_lowest(scores: Float[Array, "B V"], chosen: Bool[Array, "B V"]) -> Float[Array, "B V"]:
    """The scores of chosen tokens and of those that tie with the lowest of them, -inf for others."""
    lowest = jnp.where(chosen, scores, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(scores < lowest, -jnp.inf, scores)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSampling(Sampling):
    """A separate `Sampling` for every row, in one program for all rows. Its numbers are arrays `[B]`.

    The program contains all rules. To switch a rule off in a row, give the row the neutral value of `Sampling.of`.
    """

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[float, int, float, float]]) -> "RowSampling":
        """Makes a `RowSampling` of temperature, top-k, top-p and repetition penalty of each row; host arrays."""
        temperature, top_k, top_p, penalty = zip(*rows, strict=True)
        floats = [np.asarray(numbers, np.float32) for numbers in (temperature, top_p, penalty)]
        return cls(floats[0], np.asarray(top_k, np.int32), *floats[1:], frozenset(_RULES))

    def pick(self, logits, keys, step, seen_tokens):
        """Chooses as `Sampling.pick` does for each row alone. Filters and draws only if some row needs it."""
        penalty, scores = self.repetition_penalty[:, None], logits
        penalised = jnp.where(scores > 0, scores / penalty, scores * penalty)
        scores = jnp.where(seen_tokens & (penalty != 1), penalised, scores)
        sampled, filtered = self.temperature > 0, (self.top_k > 0) | (self.top_p < 1)

        def cut(scaled: jax.Array) -> jax.Array:
            def row(scores, top_k, top_p):
                k = jnp.where(top_k > 0, top_k, scores.shape[-1])
                by_k, by_both = (
                    Sampling(jnp.float32(1), k, top_p, jnp.float32(1), frozenset(rules))._filter(scores[None])[0]
                    for rules in (("top_k",), ("top_k", "top_p"))
                )
                # In float32, the probabilities of all tokens may sum to less than 1.
                return jnp.where(top_p < 1, by_both, by_k)

            return jax.vmap(row)(scaled, self.top_k, self.top_p)

        def draw(scores: jax.Array) -> jax.Array:
            scaled = scores / jnp.where(sampled, self.temperature, 1)[:, None]
            scaled = jax.lax.cond((sampled & filtered).any(), cut, lambda same: same, scaled)
            step_keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(step, keys.shape))
            return jnp.where(sampled, jax.vmap(jax.random.categorical)(step_keys, scaled), scores.argmax(axis=-1))

        tokens = jax.lax.cond(sampled.any(), draw, lambda scores: scores.argmax(axis=-1), scores)
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=-1)[:, 0]
        return tokens.astype(jnp.int32), logprobs


def sample_keys(seed: int | Sequence[int], batch: int) -> Key[Array, "B"]:
    """One random key per sample.

    With one seed, every sample of the batch gets its own random stream. With one seed per sample, each gets the stream
    that it would have alone.

    Raises:
        LVLMError: there is neither one seed nor one per sample.
    """
    if isinstance(seed, int | np.integer):
        return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch))
    if len(seed) != batch:
        raise LVLMError(f"{len(seed)} seeds were given for {batch} conversations; give one number or one each")
    alone = [jax.random.fold_in(jax.random.key(int(one)), 0) for one in seed]
    return jnp.stack(alone)
