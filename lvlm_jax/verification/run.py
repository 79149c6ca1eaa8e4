"""A whole verification, check by check, with whatever is available: files, weights, torch."""

import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from lvlm_jax import LVLM, models, weights
from lvlm_jax.errors import LVLMError
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors import load
from lvlm_jax.verification import answers, machine, off, peer, processors, saving, tensors
from lvlm_jax.verification.conversations import prompts
from lvlm_jax.verification.results import FAILED, LEFT_OUT, PASSED, Result

CONFIG = "config"
WITH_WEIGHTS = (saving.NAME, answers.LOGITS, answers.GREEDY, off.NAME, answers.COST)


def checks(
    folder: Path, methods: tuple[str, ...], scratch: Path, vision_tower: str | None = None, files_only: bool = False
) -> Iterator[Result]:
    """Runs all checks of a checkpoint folder, as far as possible.

    Args:
        methods: names of the methods to run at strength zero.
        scratch: a folder with room for a copy of the weights.
        vision_tower: CLIP folder of an authors' LLaVA checkpoint.
        files_only: do not read the weights.
    """
    try:
        config = weights.model_config(folder, vision_tower)
        model_parameters = models.abstract_parameters(config)
    except LVLMError as error:
        yield Result(CONFIG, FAILED, str(error))
        return
    text = config.text
    yield Result(
        CONFIG,
        PASSED,
        f"{config.model_type}: {text.num_layers} decoder layers ({text.model_type}) of {text.hidden_size} channels, "
        f"{text.num_heads} heads, {text.vocab_size} words, {text.max_position_embeddings} positions",
        {"model_type": config.model_type, "decoder": text.model_type, "layers": text.num_layers},
    )
    fitting = _run_check(tensors.NAME, lambda: tensors.check(folder, config, vision_tower))
    yield fitting
    yield _run_check(processors.NAME, lambda: processors.check(folder, config))
    reason = "asked for files only" if files_only else None
    if not tensors.has_weights(folder):
        reason = reason or "no weights in the folder"
    elif fitting.status == FAILED:
        reason = reason or "the tensors do not fit"
    if reason:
        yield from (Result(name, LEFT_OUT, reason) for name in WITH_WEIGHTS)
        return
    with jax.default_matmul_precision("highest"):  # accelerators would multiply in fewer bits
        yield from _with_weights(folder, config, methods, scratch, vision_tower, _count(model_parameters))


def _with_weights(
    folder: Path, config: FamilyConfig, methods: tuple[str, ...], scratch: Path, vision_tower: str | None, count: int
) -> Iterator[Result]:
    speaks = load.has_processor(folder, config)
    _say("transformers' answers")
    theirs, ask = "no processor in the folder, so no prompts", None
    if speaks:
        try:
            theirs = answers.of_transformers(folder, config, count)
        except Exception as error:  # noqa: BLE001 - transformers raises whatever the first broken file provokes
            theirs = f"transformers does not answer: {peer.error_line(error)}"
    if not isinstance(theirs, str):
        (arrays, *_), theirs = theirs
        ask = arrays, theirs[0]
    yield _run_check(saving.NAME, lambda: saving.check(folder, config, vision_tower, scratch, ask))
    gc.collect()
    machine.forget_peak()
    start = time.monotonic()
    try:
        model = LVLM.from_pretrained(folder, vision_tower=vision_tower)
    except LVLMError as error:
        yield Result(answers.LOGITS, FAILED, str(error))
        return
    seconds_to_load = time.monotonic() - start
    if not speaks:
        yield from (Result(name, LEFT_OUT, theirs) for name in WITH_WEIGHTS[1:])
        return
    prompt = model.prepare(prompts()[0])
    cost = _run_check(
        answers.COST, lambda: answers.cost(model, seconds_to_load, prompt)
    )  # measured first, because later programs take memory too
    _say(answers.LOGITS)
    try:
        yield from answers.check(model, theirs)
    except LVLMError as error:
        yield Result(answers.LOGITS, FAILED, str(error))
    if methods:
        yield _run_check(off.NAME, lambda: off.check(model, prompt, methods))
    else:
        yield Result(off.NAME, LEFT_OUT, "asked for no methods")
    yield cost


def _run_check(name: str, check: Callable[[], Result]) -> Result:
    """The result of a check; an `LVLMError` makes it fail, and the other checks still run."""
    _say(name)
    try:
        return check()
    except LVLMError as error:
        return Result(name, FAILED, str(error))


def _say(name: str) -> None:
    print(f"checking {name} …", file=sys.stderr, flush=True)


def _count(parameters: dict) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(parameters))
