"""Scores of flow alignment on held-out answers: the bootstrap of intervals resamples rows.

The score of base and student is the distance of their next-token distributions from the edited teacher's: KL(teacher ‖
model) in nats per answer token.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lvlm_jax import models
from lvlm_jax.evaluation.scores import Figure, Scores, Tally, divide, ratio
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods.sevi import SEVI
from lvlm_jax.training.data import pair_batches
from lvlm_jax.training.data.pair_batches import EncodedRow, Encoder
from lvlm_jax.training.objectives.flow_alignment import BASE, Alignment

# For base and student: the sum of divergences, and the number of tokens for which its likeliest token is the teacher's.
DISTANCES = ("base_answer_kl", "answer_kl", "base_agreement", "agreement")
MILLI = 1000.0


def distances(student: LVLM, base: LVLM, rows: Sequence[EncodedRow], encoder: Encoder, sevi: SEVI) -> list[dict]:
    """`id`, `tokens` and DISTANCES (sums over tokens) of each answer; the teacher is `base` under `sevi`."""
    alignment = Alignment(models.build(base.config, _dtype(base)), sevi, mu=1.0)
    measure = jax.jit(alignment.measure)
    result = []
    for row, batch in zip(rows, pair_batches.in_order(rows, encoder, 1), strict=True):
        means = jax.device_get(measure(student.params, {BASE: base.params}, batch))
        sums = {name: float(means[name].total) for name in DISTANCES}
        result.append({"id": row.id, "tokens": float(means["answer_kl"].count)} | sums)
    return result


def closeness(measured: Sequence[Mapping[str, Any]]) -> Scores:
    """Figures from the results of `distances`.

    Returns:
        base, student: the mean divergence in thousandths of a nat per token; closer: the base's mean
            divergence divided by the student's; base agrees, student agrees: share of tokens for which the model's most
            likely token is the teacher's.
    """
    tally = Tally()
    for row in measured:
        tally.add(row["id"], **{name: row[name] for name in ("tokens", *DISTANCES)})

    def mean(name: str) -> Figure:
        return Figure(lambda totals: MILLI * divide(totals[name], totals["tokens"]), ("tokens",), "mnat")

    figures = {
        "base": mean("base_answer_kl"),
        "student": mean("answer_kl"),
        "closer": Figure(lambda totals: divide(totals["base_answer_kl"], totals["answer_kl"]), ("tokens",), "times"),
        "base agrees": ratio(["base_agreement"], ["tokens"]),
        "student agrees": ratio(["agreement"], ["tokens"]),
    }
    return tally.scores(["tokens", *DISTANCES], figures, {})


def _dtype(model: LVLM) -> np.dtype:
    return model.params["language_model"]["embed_tokens"]["embedding"].dtype
