"""Candidates for preference pairs from a model's answers or from a file, with a record of their origin.

Combines the steps of `pairs` for `lvlm preferences` and the pocket recipes.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvlm_jax import files
from lvlm_jax.errors import LVLMError
from lvlm_jax.journal.record import file_hash, method_record, run_record
from lvlm_jax.lvlm import LVLM
from lvlm_jax.methods.capl import CAPL
from lvlm_jax.training.data import correctors, ladder, pairs
from lvlm_jax.training.data.pair_files import read_pairs
from lvlm_jax.training.data.pair_filters import Candidate
from lvlm_jax.training.data.prompts import of_pair, read_prompts
from lvlm_jax.version import __version__
from lvlm_jax.weights import names

SAMPLES = 2  # largest number of answers to draw until one is wrong
REJECTED = ("truncated", "plain")  # rejected answers: under truncated attention, or of the unmodified model


@dataclasses.dataclass(frozen=True)
class Candidates:
    """Candidates for pairs.

    Attributes:
        items: the candidates.
        prompts: number of prompts.
        record: everything that determined the candidates, as JSON values.
    """

    items: list[Candidate]
    prompts: int
    record: dict[str, Any]


def plan(
    chosen: CAPL,
    rejected: str = "truncated",
    variant: str = "paper",
    temperature: float = 0.0,
    rejected_temperature: float | None = None,
    laddered: bool = False,
    **settings: Any,
) -> pairs.Plan:
    """The two sides of CAPL's pairs: chosen answers under CAPL's attention; rejected answers under truncated attention,
    or of the model without a method.

    Args:
        chosen: the attention of chosen answers.
        rejected: one of `REJECTED`.
        variant: variant of truncated attention, see `CAPL`.
        temperature: temperature of chosen answers.
        rejected_temperature: temperature of rejected answers. None: 1 for "plain" without a ladder, because greedy
            answers would often equal the chosen ones; otherwise `temperature`.
        laddered: whether every prompt gets a rejected answer that is wrong (`ladder`).
        settings: the other fields of `pairs.Plan`.
    """
    plain = rejected == "plain"
    if rejected_temperature is None:
        rejected_temperature = 1.0 if plain and not laddered else temperature
    method = None if plain else CAPL(mode="truncated", variant=variant)
    sides = pairs.Side(chosen, temperature), pairs.Side(method, rejected_temperature)
    return pairs.Plan(*sides, samples=SAMPLES if laddered else 0, **settings)


def answer_prompts(
    prompts_file: Path,
    plan: pairs.Plan,
    model: str,
    dtype: str,
    out: Path,
    corrector: str | None = None,
    batch_size: int = 16,
) -> Candidates:
    """Has a model answer the prompts of a file twice, and corrects the chosen answers; resumes from the logs in `out`.

    Args:
        model: as for `LVLM.from_pretrained`; loaded only if an answer is missing.
        dtype: as for `LVLM.from_pretrained`.
        out: folder of the logs of answers and corrections.
        corrector: as for `correctors.resolve`; None keeps the model's answers.

    Raises:
        LVLMError: an unusable file, model or corrector, or logs of another run.
    """
    prompts = read_prompts(prompts_file)
    if plan.samples:
        ladder.check(prompts)
    correct = None if corrector is None else correctors.resolve(corrector, prompts)
    path, dtype = names.checkpoint(model), names.dtype(dtype)
    generation = {
        "temperature": plan.chosen.temperature,
        "rejected_temperature": plan.rejected.temperature,
        "top_p": plan.top_p,
        "max_new_tokens": plan.max_new_tokens,
    }
    record = (
        run_record(path, dtype, plan.chosen.method, generation)
        | {
            "rejected_method": method_record(plan.rejected.method),
            "prompts": file_hash(prompts_file),
            "seed": plan.seed,
        }
        | ({"ladder": {"samples": plan.samples}} if plan.samples else {})
    )
    answers = pairs.answer(
        prompts, plan, lambda: LVLM.from_pretrained(path, dtype=dtype), out / "answers.jsonl", record, batch_size
    )
    texts = {key: answer_pair.chosen.text for key, answer_pair in answers.items()}
    texts_corrected = pairs.correct(prompts, texts, correct, out / "corrections.jsonl", record)
    record |= {"batch_size": batch_size, "corrector": correct and dict(correct.record)}
    return Candidates(pairs.candidates(prompts, answers, texts_corrected, plan), len(prompts), record)


def from_file(file: str, out: Path) -> Candidates:
    """The pairs of a file, without a model.

    Raises:
        LVLMError: an unusable file, or one that the results in `out` would overwrite.
    """
    outputs = [(out / name).resolve() for name in ("pairs.jsonl", "validation.jsonl")]
    if files.expand(file).resolve() in outputs:
        raise LVLMError(f"--pairs {file!r} would be overwritten; give another --out")
    pairs_read = read_pairs(file)
    candidates = [Candidate(of_pair(pair), pair.chosen, pair.rejected) for pair in pairs_read]
    return Candidates(candidates, len(pairs_read), {"version": __version__, "pairs": file})


def table(figures: Mapping[str, Any]) -> str:
    """The statistics that `pairs.write` returns, as lines of text."""
    lines = [("prompts", figures["prompts"]), ("failed", figures["failed"])]
    lines += [(f"dropped: {reason}", count) for reason, count in figures["dropped"].items()]
    lines += [(name, figures[name]) for name in ("kept", "training", "validation")]
    lines += [("share corrected", figures["corrected"]), ("share chosen longer", figures["chosen_longer"])]
    if figures["negation"] is not None:
        lines.append(("won by contradicting", figures["negation"]))
    if figures["rejected_by"]:
        lines.append(("rejected by", ", ".join(f"{key}: {value}" for key, value in figures["rejected_by"].items())))
    for side, words in figures["words"].items():
        lines.append((f"words of {side}", ", ".join(f"{name} {value:g}" for name, value in words.items())))
    lines.append(("pairs by images", ", ".join(f"{key}: {value}" for key, value in figures["images"].items())))
    return "\n".join(f"{name:24s} {value}" for name, value in lines)
