"""Checks that logits and greedy answers equal those of transformers' model, and measures the cost of an answer."""

import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from lvlm_jax import LVLM
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors.layout import Inputs
from lvlm_jax.verification import machine, peer
from lvlm_jax.verification.conversations import prompts
from lvlm_jax.verification.results import LEFT_OUT, MEASURED, Result, compared

LOGITS, GREEDY, COST = "logits", "greedy answers", "memory and time"
NEW_TOKENS = 32
REPEATS, PATIENCE = 3, 60.0  # number of timed runs, of which the fastest counts; seconds after which one suffices
TOLERANCE = 1e-4  # relative to the largest logit


def of_transformers(
    folder: Path, config: FamilyConfig, parameters: int
) -> tuple[list[peer.Arrays], list[peer.Answers]] | str:
    """transformers' inputs and answers for the three prompts; or why they cannot be computed.

    Exceptions of transformers are passed through.

    Args:
        parameters: number of the model's parameters.
    """
    needed_bytes, free_bytes = 4 * parameters, machine.free_memory()
    if problem := peer.no_model() or peer.obstacle(folder):
        return problem
    if free_bytes is not None and needed_bytes > free_bytes:
        return (
            f"transformers' model takes {needed_bytes / 1e9:.1f} GB in float32, and {free_bytes / 1e9:.1f} GB are free"
        )
    theirs = peer.processor(folder, config)
    arrays = [theirs.arrays(prompt) for prompt in prompts()]
    with peer.model(folder) as model:
        answers = peer.ask(model, arrays, NEW_TOKENS)
    return arrays, answers


def check(model: LVLM, theirs: Sequence[peer.Answers] | str) -> list[Result]:
    """Compares logits at every token of each prompt alone, and greedy answers to all prompts in one padded batch."""
    if isinstance(theirs, str):
        return [Result(name, LEFT_OUT, theirs) for name in (LOGITS, GREEDY)]
    faults, largest, scale = [], 0.0, 1.0
    for number, (prompt, answer) in enumerate(zip(prompts(), theirs, strict=True)):
        laid_out = model.prepare(prompt)
        our_logits = np.asarray(model.logits(laid_out))[0][-len(answer.logits) :]
        if our_logits.shape != answer.logits.shape or laid_out.lengths[0] != len(answer.logits):
            faults.append(f"prompt {number} has {laid_out.lengths[0]} tokens instead of {len(answer.logits)}")
            continue
        difference = float(np.abs(our_logits - answer.logits).max())
        largest, scale = max(largest, difference), max(scale, float(np.abs(answer.logits).max()))
        if not difference <= TOLERANCE * max(1.0, float(np.abs(answer.logits).max())):
            faults.append(f"logits of prompt {number} differ by {difference:.2g}")
    words = (
        f"{len(theirs)} prompts with images, every token: differences up to {largest:.1e} of logits up to {scale:.3g}"
    )
    logits = compared(LOGITS, faults, words, largest_difference=largest, largest_logit=scale)
    return [logits, _greedy(model, theirs)]


def _greedy(model: LVLM, theirs: Sequence[peer.Answers]) -> Result:
    out = model.generate(prompts(), max_new_tokens=NEW_TOKENS, stop_token_ids=())
    faults = []
    for number, (ours, expected) in enumerate(zip(out.tokens, theirs, strict=True)):
        differ = [place for place, pair in enumerate(zip(ours, expected.tokens, strict=True)) if pair[0] != pair[1]]
        if differ:
            faults.append(
                f"answer {number} differs from token {differ[0]} on, which transformers chose by "
                f"{expected.margins[differ[0]]:.1e}"
            )
    margin = min(float(one.margins.min()) for one in theirs)
    different = len({token for one in theirs for token in one.tokens})
    words = (
        f"{NEW_TOKENS} tokens of each of {len(theirs)} prompts, together in a padded batch, equal ({different} "
        f"different ones; the closest choice by {margin:.1e})"
    )
    return compared(GREEDY, faults, words, closest_choice=margin, different_tokens=different)


def cost(model: LVLM, loaded: float, prompt: Inputs) -> Result:
    """Seconds and bytes of an answer to one prompt.

    Args:
        loaded: time of loading the model in seconds.
    """
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    seconds = {}
    for new_tokens in (1, NEW_TOKENS + 1):
        peaks = []
        while len(peaks) < 2 or (len(peaks) < 1 + REPEATS and sum(peaks) < PATIENCE):
            start = time.monotonic()
            model.generate(prompt, max_new_tokens=new_tokens, stop_token_ids=())
            peaks.append(time.monotonic() - start)
        seconds[new_tokens, "first"], seconds[new_tokens, "again"] = peaks[0], min(peaks[1:])
    token = (seconds[NEW_TOKENS + 1, "again"] - seconds[1, "again"]) / NEW_TOKENS
    compiled = sum(seconds[count, "first"] - seconds[count, "again"] for count in (1, NEW_TOKENS + 1))
    peak = machine.device_peak() or machine.peak_memory()
    pace = f"then {1000 * token:.1f} ms a token" if token > 0 else "then too little per token to measure"
    words = (
        f"float32: loaded in {loaded:.1f} s, compiled in {compiled:.1f} s; a prompt of {prompt.lengths[0]} tokens "
        f"{seconds[1, 'again']:.2f} s, {pace}; weights {weights / 1e9:.2f} GB"
        + ("" if peak is None else f", at most {peak / 1e9:.2f} GB taken")
    )
    figures = {
        "load_seconds": round(loaded, 2), "compile_seconds": round(compiled, 2),
        "prompt_tokens": int(prompt.lengths[0]), "prompt_seconds": round(seconds[1, "again"], 3),
        "token_milliseconds": round(1000 * token, 2) if token > 0 else None,
        "weight_bytes": weights, "peak_bytes": peak,
    }  # fmt: skip
    return Result(COST, MEASURED, words, figures)
