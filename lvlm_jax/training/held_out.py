"""Scores of training on held-out rows: one unit per row, so that figures have bootstrap intervals.

Preference pairs: whether a model finds the chosen answer more likely than the rejected one, and whether training has
moved it in this direction (DPO's reward accuracy: log π - log π_ref is larger for the chosen answer).

Answers under flow alignment: how far the next-token distributions of base and student are from the edited teacher's,
KL(teacher ‖ model) in nats per answer token.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from lvlm_jax import models
from lvlm_jax.evaluation.scores import Figure, Scores, Tally, divide, ratio
from lvlm_jax.journal.record import method_record
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods import Method
from lvlm_jax.methods.sevi import SEVI
from lvlm_jax.training.data import pair_batches, reference
from lvlm_jax.training.data.pair_batches import EncodedRow, Encoder
from lvlm_jax.training.objectives.flow_alignment import BASE, Alignment
from lvlm_jax.training.pairwise import Scorer

# For base and student: the sum of divergences, and the number of tokens with the teacher's most likely token.
DISTANCES = ("base_answer_kl", "answer_kl", "base_agreement", "agreement")
MILLI = 1000.0


def pair_logprobs(
    model: LVLM, rows: tuple[EncodedRow, ...], encoder: Encoder, method: Method | None, folder: Path, size: int
) -> Float[np.ndarray, "R 2"]:
    """Log-probability of each pair's chosen and rejected answer, the sum over its tokens, stop token included.

    Args:
        method: its attention is active; None for plain attention.
        folder: folder of the cache, see `reference.with_reference`.
        size: pairs at a time.
    """
    dtype = _dtype(model)
    scorer = Scorer(models.build(model.config, dtype), method, pair_batches.image_count(rows))
    identity = {"method": method_record(method), "dtype": str(dtype)}
    rows_with_logprobs = reference.with_reference(rows, encoder, scorer.alone, model.params, identity, folder, size)
    return np.array([[answer.sum(dtype=np.float64) for answer in row.reference] for row in rows_with_logprobs])


def pair_scores(
    ids: Mapping[str, Sequence[str]],
    policy: Mapping[str, Float[np.ndarray, "R 2"]],
    before: Mapping[str, Float[np.ndarray, "R 2"]] | None = None,
) -> Scores:
    """Figures "SET: chosen likelier" and "SET: moved", shares of pairs.

    "moved" counts pairs whose chosen answer has gained more over `before` than the rejected one.

    Args:
        ids: ids of the pairs of each set, by name; pairs of one prompt in several sets have one id.
        policy: results of `pair_logprobs` for each set.
        before: the same for the model before training; None leaves "moved" undefined.
    """
    tally = Tally()
    for name, members in ids.items():
        margins = policy[name][:, 0] - policy[name][:, 1]
        gains = None if before is None else margins - (before[name][:, 0] - before[name][:, 1])
        for place, identity in enumerate(members):
            preferred = bool(margins[place] > 0)
            tally.correct[name, identity] = preferred
            counts = {"asked": 1, "preferred": preferred}
            if gains is not None:
                counts |= {"trained": 1, "moved": bool(gains[place] > 0)}
            tally.add(identity, **{f"{name}/{count}": value for count, value in counts.items()})
    counts = [f"{name}/{count}" for name in ids for count in ("asked", "preferred", "trained", "moved")]
    figures = {}
    for name in ids:
        figures[f"{name}: chosen likelier"] = ratio([f"{name}/preferred"], [f"{name}/asked"])
        figures[f"{name}: moved"] = ratio([f"{name}/moved"], [f"{name}/trained"])
    return tally.scores(counts, figures, {})


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
        base, student: the mean divergence in thousandths of a nat per token; closer: how many times smaller the
            student's is than the base's; base agrees, student agrees: share of tokens with the teacher's most likely
            token.
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
