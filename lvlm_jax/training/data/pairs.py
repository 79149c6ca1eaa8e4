"""Preference pairs from a model's own answers: CAPL's data, arXiv 2603.07048, section "Preference learning".

Each prompt is answered twice. The chosen answer is written with the attention that the model should have (CAPL:
selective cross-image attention), and then corrected. The rejected answer is written with the attention that it should
not have (CAPL: truncated attention, in which images do not see each other). Candidates pass the filters of
`pair_filters` and are written in TRL's format, in one folder:

    answers.jsonl       log of both answers to each prompt; a killed run resumes from it
    corrections.jsonl   log of corrections by a user's function
    pairs.jsonl, validation.jsonl, statistics.json, pairs.jsonl.run.json    the results, and the record of the run
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lvlm_jax.errors import LVLMError, shown
from lvlm_jax.files import write_whole
from lvlm_jax.generation.jobs import Answer
from lvlm_jax.journal import progress
from lvlm_jax.journal.log import AnswerLog, expect, seed_of, text_of
from lvlm_jax.methods import Method
from lvlm_jax.training.data import ladder
from lvlm_jax.training.data.correctors import Corrector
from lvlm_jax.training.data.pair_files import write_pairs
from lvlm_jax.training.data.pair_filters import Candidate, Filters, balance, hold_out, normalised, sift, statistics
from lvlm_jax.training.data.prompts import Prompt

SIDES = ("chosen", "rejected")


@dataclasses.dataclass(frozen=True)
class Side:
    """How one of the two answers is generated: the method (None for the unmodified model) and the temperature."""

    method: Method | None
    temperature: float = 0.0


@dataclasses.dataclass(frozen=True)
class Plan:
    """How both answers are generated.

    Attributes:
        chosen, rejected: the two sides.
        top_p: limit of top-p sampling (nucleus sampling) on both sides.
        max_new_tokens: largest number of tokens of an answer.
        seed: each answer's seed is made from this one, its side and its prompt's id.
        samples: largest number of answers drawn on the rejected side, at temperature 1, for a prompt whose rejected
            answer is right (`ladder`); 0 draws none.
    """

    chosen: Side
    rejected: Side
    top_p: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0
    samples: int = 0


@dataclasses.dataclass(frozen=True)
class Answers:
    """A model's answers to one prompt, before any correction.

    Attributes:
        id: id of the prompt.
        chosen, rejected: the answers of the two sides.
        samples: further answers of the rejected side; unfinished ones are left out.
    """

    id: str
    chosen: Answer
    rejected: Answer
    samples: tuple[str, ...] = ()

    def entry(self) -> dict[str, Any]:
        """The line of the log: `{id, chosen, chosen_finish_reason, chosen_tokens, rejected, ...}`."""
        entry: dict[str, Any] = {"id": self.id}
        for side in SIDES:
            answer = getattr(self, side)
            entry |= {side: answer.text, f"{side}_finish_reason": answer.finish_reason, f"{side}_tokens": answer.tokens}
        return entry | ({"samples": list(self.samples)} if self.samples else {})

    @classmethod
    def of_entry(cls, entry: Mapping[str, Any]) -> tuple[str, "Answers"]:
        """The prompt's id and its answers, from a line of the log."""
        expect(entry, {"id": str})
        for side in SIDES:
            expect(entry, {side: str, f"{side}_finish_reason": str, f"{side}_tokens": int})
        sides = {side: Answer(entry[side], entry[f"{side}_finish_reason"], entry[f"{side}_tokens"]) for side in SIDES}
        samples = entry.get("samples", [])
        if not isinstance(samples, list) or not all(isinstance(sample, str) for sample in samples):
            raise LVLMError(f"samples is {shown(samples)}; expected a list of strings")
        return entry["id"], cls(entry["id"], **sides, samples=tuple(samples))


def answer(
    prompts: Sequence[Prompt],
    plan: Plan,
    load: Callable[[], Any],
    log: Path,
    record: Mapping[str, Any],
    batch_size: int = 16,
) -> dict[str, Answers]:
    """Both answers to each prompt, by id, from the log or from the model.

    A prompt that cannot be answered (it is too long, an image is broken) is reported on stderr, left out, and tried
    again by the next run.

    Args:
        load: loads the `LVLM`; called once, and only if an answer is missing.
        log: path of the log of answers.
        record: everything that determines an answer, as JSON values.

    Raises:
        LVLMError: the log belongs to another run, or cannot be written.
    """
    ids = {prompt.id for prompt in prompts}
    with AnswerLog(log, record, Answers.of_entry, ids) as answers:
        finished = dict(answers.answers)
        waiting = [prompt for prompt in prompts if prompt.id not in finished]
        # Similar prompts are batched together, so that there is little padding and few programs are compiled.
        waiting.sort(key=lambda prompt: (len(prompt.images), len(prompt.text)))
        model = load() if waiting else None
        with progress.Progress(len(prompts), len(finished), "prompts") as bar:
            for start in range(0, len(waiting), batch_size):
                batch = waiting[start : start + batch_size]
                fresh = _answer_batch(model, batch, plan, batch_size)
                answers.append(one.entry() for one in fresh)
                finished |= {one.id: one for one in fresh}
                bar.update(len(batch))
    return finished


def _answer_batch(model: Any, batch: Sequence[Prompt], plan: Plan, batch_size: int) -> list[Answers]:
    """Answers to those prompts of a batch that can be answered."""
    try:
        return _generate(model, batch, plan, batch_size)
    except LVLMError as error:
        if len(batch) == 1:
            progress.say(f"prompt {batch[0].id}: {error}")
            return []
        # Some prompt cannot be answered; run alone, each succeeds or fails by itself.
        return [one for prompt in batch for one in _answer_batch(model, [prompt], plan, batch_size)]


def _generate(model: Any, batch: Sequence[Prompt], plan: Plan, batch_size: int) -> list[Answers]:
    padded = [*batch, *[batch[-1]] * (batch_size - len(batch))]  # the last batch is padded to full size
    prepared = model.prepare([prompt.conversation() for prompt in padded])

    def generate(side: Side, stream: str) -> list[Answer]:
        output = model.generate(
            prepared,
            method=side.method,
            max_new_tokens=plan.max_new_tokens,
            temperature=side.temperature,
            top_p=plan.top_p,
            seed=[seed_of(plan.seed, f"{stream}/{prompt.id}") for prompt in padded],
        )
        answers = zip(output.text, output.finish_reason, output.tokens, strict=True)
        return [Answer(text.strip(), reason, len(tokens)) for text, reason, tokens in answers]

    chosen, rejected = (generate(getattr(plan, name), name)[: len(batch)] for name in SIDES)
    samples: list[list[str]] = [[] for _ in batch]
    sampling = dataclasses.replace(plan.rejected, temperature=1.0)
    for number in range(plan.samples):
        texts = [[answer.text, *more] for answer, more in zip(rejected, samples, strict=True)]
        right = [
            all(ladder.alike(text, prompt.truth) for text in several)
            for prompt, several in zip(batch, texts, strict=True)
        ]
        if not any(right):
            break
        for place, answer in enumerate(generate(sampling, f"sample {number}")[: len(batch)]):
            if right[place] and answer.finish_reason == "stop":
                samples[place].append(answer.text)
    return [
        Answers(prompt.id, *answers, tuple(more))
        for prompt, *answers, more in zip(batch, chosen, rejected, samples, strict=True)
    ]


def correct(
    prompts: Sequence[Prompt],
    texts: Mapping[str, str],
    corrector: Corrector | None,
    log: Path,
    record: Mapping[str, Any],
) -> dict[str, str]:
    """The chosen answers by prompt id, corrected if there is a corrector.

    Args:
        texts: the answers by prompt id; prompts without an answer are left out.
        log: path of the log of corrections by a function.
        record: everything that determines the answers; this and the corrector's record are the first line of the log.

    Raises:
        LVLMError: the corrector fails, or the log belongs to another run or cannot be written.
    """
    prompts_with_text = [prompt for prompt in prompts if prompt.id in texts]
    if corrector is None:
        return {prompt.id: texts[prompt.id] for prompt in prompts_with_text}
    if not corrector.logged:
        return {prompt.id: corrector.correct(prompt, texts[prompt.id]).strip() for prompt in prompts_with_text}
    about = {"corrector": dict(corrector.record), "answers": dict(record)}
    with AnswerLog(log, about, text_of("chosen"), texts) as corrections:
        finished = dict(corrections.answers)
        waiting = [prompt for prompt in prompts_with_text if prompt.id not in finished]
        for prompt in progress.counted(waiting, len(prompts_with_text), len(finished), "corrections"):
            finished[prompt.id] = corrector.correct(prompt, texts[prompt.id]).strip()
            corrections.append([{"id": prompt.id, "chosen": finished[prompt.id]}])
    return finished


def candidates(
    prompts: Sequence[Prompt], answers: Mapping[str, Answers], corrected: Mapping[str, str], plan: Plan | None = None
) -> list[Candidate]:
    """The candidates of all answered prompts, in the order of the prompts.

    Args:
        plan: if its `samples` is above 0, the ladder chooses the rejected answers (`ladder.rejected`).
    """
    result = []
    for prompt in prompts:
        if prompt.id not in answers:
            continue
        answer_pair, chosen = answers[prompt.id], corrected[prompt.id]
        is_corrected = normalised(chosen) != normalised(answer_pair.chosen.text)
        rejected, rung = answer_pair.rejected.text, ""
        if plan is not None and plan.samples:
            rejected, rung = ladder.rejected(prompt, rejected, answer_pair.samples, plan.seed)
        # A corrected answer counts as finished, and so does one from the upper rungs.
        cut = rung in ("", ladder.RUNGS[0]) and answer_pair.rejected.finish_reason != "stop"
        cut |= not is_corrected and answer_pair.chosen.finish_reason != "stop"
        result.append(Candidate(prompt, chosen, rejected, is_corrected, cut, answer_pair.chosen.text, rung))
    return result


def write(
    out: Path,
    candidates: Sequence[Candidate],
    prompts: int,
    record: Mapping[str, Any],
    filters: Filters,
    holdout: float = 0.0,
    seed: int = 0,
    balanced: bool = False,
    max_negation: float = 1.0,
) -> dict[str, Any]:
    """Filters candidates, splits the rest, and writes the pairs with their statistics and record.

    Args:
        out: the folder.
        candidates: the candidates.
        prompts: number of prompts.
        record: everything that determined the candidates; the settings of this step are added.
        holdout: share of the pairs for validation.jsonl; 0 writes no such file.
        seed: seed of the choice of validation pairs, and of the pairs that remain after balancing.
        balanced: whether to make each kind's chosen answers equally frequent (`pair_filters.balance`).
        max_negation: largest share of the pairs that contradicting the model may win (`ladder.explained`).

    Returns:
        The statistics.

    Raises:
        LVLMError: no candidate passes the filters, contradicting the model wins too many of the remaining pairs, no
            pair can be held out, or a file cannot be written.
    """
    remaining, drop_counts = sift(candidates, filters)
    if not remaining:
        reasons = ", ".join(f"{reason} {count}" for reason, count in drop_counts.items() if count)
        raise LVLMError(
            f"none of {prompts} prompts became a pair ({reasons or 'none was answered'}); "
            "give more prompts, sample with --temperature, or loosen the filters"
        )
    if balanced:
        before, remaining = len(remaining), balance(remaining, seed)
        drop_counts |= {"unbalanced": before - len(remaining)}
    negation = ladder.explained(remaining)
    ladder.refuse_negation(negation, len(remaining), max_negation)
    training, validation = hold_out(remaining, holdout, seed) if holdout else (remaining, [])
    figures = statistics(prompts, candidates, remaining, drop_counts)
    rungs = Counter(candidate.rung for candidate in remaining if candidate.rung)
    figures |= {"negation": negation, "rejected_by": {rung: rungs[rung] for rung in ladder.RUNGS if rungs}}
    figures |= {"training": len(training), "validation": len(validation)}
    settings = {"filters": dataclasses.asdict(filters), "holdout": {"share": holdout, "seed": seed}}
    settings |= {"balanced": balanced, "max_negation": max_negation}
    for name, chosen in (("pairs.jsonl", training), ("validation.jsonl", validation)):
        if chosen:
            write_pairs(out / name, [one.prompt.paired(one.chosen, one.rejected) for one in chosen])
        else:
            (out / name).unlink(missing_ok=True)  # that of an earlier run would share images with pairs.jsonl
    write_whole(out / "pairs.jsonl.run.json", json.dumps({**record, **settings}, indent=1) + "\n")
    write_whole(out / "statistics.json", json.dumps(figures, indent=1) + "\n")
    return figures
