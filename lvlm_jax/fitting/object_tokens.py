"""AdaIAT's statistics: how much heads attend to generated text at real and at hallucinated object tokens.

Object tokens are those in which the aligned answers of a pair (`difflib`) differ: hallucinated ones in the bad answer,
real ones in the good answer. If the good answer has none, all of its tokens count as real.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from lvlm_jax import LVLM
from lvlm_jax.attention import Transform
from lvlm_jax.errors import LVLMError
from lvlm_jax.fitting.forced import SIDES, answer_tokens, forced
from lvlm_jax.generation import decode_loop
from lvlm_jax.training.data.pair_files import Pair


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AnswerAttention(Transform):
    """Sums each head's mean weight on the answer's earlier columns over chosen rows.

    The carry is one `Float[Array, "B H"]` per layer.

    Attributes:
        answer: columns of the answer.
        chosen: the rows.
    """

    answer: Bool[Array, "B T"]
    chosen: Bool[Array, "B T"]

    rows: ClassVar[str] = "all"

    def observe(self, site, weights):
        visible_answer = self.answer[:, None, :] & site.mask
        count = jnp.maximum(visible_answer.sum(axis=-1), 1)[:, None]
        mean = jnp.where(visible_answer[:, None], weights, 0).sum(axis=-1) / count
        return (*site.carry, jnp.where(self.chosen[:, None], mean, 0).sum(axis=-1))


def differing(good: Sequence[int], bad: Sequence[int]) -> dict[str, np.ndarray]:
    """Indices of real tokens in the good answer and of hallucinated tokens in the bad one."""
    places: dict[str, list[int]] = {side: [] for side in SIDES}
    for kind, g0, g1, b0, b1 in difflib.SequenceMatcher(None, good, bad, autojunk=False).get_opcodes():
        if kind != "equal":
            places["good"] += range(g0, g1)
            places["bad"] += range(b0, b1)
    return {"good": np.array(places["good"] or range(len(good)), int), "bad": np.array(places["bad"], int)}


def adaiat_collect(model: LVLM, pairs: Sequence[Pair]) -> dict[str, np.ndarray]:
    """Sums over the rows that produce object tokens, and the number of these rows, for both answers."""
    answers = {side: answer_tokens(model, pairs, side) for side in SIDES}
    places = [differing(*each) for each in zip(answers["good"], answers["bad"], strict=True)]
    sums = {}
    for side in SIDES:
        sequences = forced(model, pairs, side)
        chosen = np.zeros(sequences.answer.shape, bool)
        for row, (answer, place) in enumerate(zip(answers[side], places, strict=True)):
            # The row before a token produces it; before the first one, nothing was generated.
            later = place[side][place[side] > 0]
            chosen[row, chosen.shape[1] - len(answer) + later - 1] = True
        probe = AnswerAttention(jnp.asarray(sequences.answer), jnp.asarray(chosen))
        carry = decode_loop.probe(model.params, model.config, sequences.prompt, probe, sequences.static["image_count"])
        sums[side] = np.stack([np.asarray(layer).sum(axis=0) for layer in carry])[None]
        sums[f"{side}_count"] = np.array([chosen.sum()])
    return sums


def adaiat_finish(collected: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """M, the ratio of the means (1 if a head attends to nothing); and thresholds halfway between the sums over heads.

    Raises:
        LVLMError: no answer has an object token after its first token.
    """
    for side in SIDES:
        if not collected[f"{side}_count"].sum():
            raise LVLMError(f"no {side} answer has an object token after its first token; give pairs of longer answers")
    real, other = (collected[side].sum(axis=0) / collected[f"{side}_count"].sum() for side in SIDES)
    ratios = np.where(other > 0, real / np.where(other > 0, other, 1), 1)
    thresholds = (real.sum(axis=-1) + other.sum(axis=-1)) / 2
    return {"ratios": ratios.astype(np.float32), "thresholds": thresholds.astype(np.float32)}
