"""Checks that conversations become the same token ids and pixels as in transformers."""

from pathlib import Path

import numpy as np

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors import inputs, load
from lvlm_jax.processors.layout import Inputs
from lvlm_jax.verification import peer
from lvlm_jax.verification.conversations import Conversation, forms
from lvlm_jax.verification.results import FAILED, LEFT_OUT, Result, compared

NAME = "ids and pixels"


def check(folder: Path, config: FamilyConfig) -> Result:
    """Compares every form of conversation with transformers' processor; see `differences`."""
    if not load.has_processor(folder, config):
        return Result(NAME, LEFT_OUT, "no processor in the folder")
    try:
        ours = load.load_processor(folder, config)
    except LVLMError as error:
        return Result(NAME, FAILED, str(error))
    conversations = forms()
    if problem := peer.obstacle(folder):
        try:
            for conversation in conversations.values():
                inputs.from_messages(ours, config, conversation)
        except LVLMError as error:
            return Result(NAME, FAILED, str(error))
        return Result(NAME, LEFT_OUT, f"{len(conversations)} conversations are read, but not compared: {problem}")
    try:
        theirs = peer.processor(folder, config)
    except Exception as error:  # noqa: BLE001 - transformers raises whatever the first broken file provokes
        return Result(NAME, FAILED, f"transformers cannot read the processor that we read: {peer.error_line(error)}")
    outcomes = {name: differences(ours, theirs, config, conversation) for name, conversation in conversations.items()}
    refused = [name for name, one in outcomes.items() if one is None]
    faults = [f"{name}: {one}" for name, one in outcomes.items() if one]
    words = f"{len(outcomes) - len(refused)} conversations as by {theirs.name}, bit for bit"
    if refused:
        words += f"; both refuse: {', '.join(refused)}"
    return compared(NAME, faults, words, conversations=len(outcomes), refused=refused, processor=theirs.name)


def differences(ours: object, theirs: peer.Peer, config: FamilyConfig, conversation: Conversation) -> str | None:
    """How our inputs and transformers' for a conversation differ, in words; "" if equal, None if both refuse it."""
    errors = []
    try:
        ours_laid_out = inputs.from_messages(ours, config, conversation)
    except LVLMError as error:
        errors.append(f"we refuse it: {error}")
    try:
        arrays = theirs.arrays(conversation)
    except Exception as error:  # noqa: BLE001 - templates and processors may raise anything
        errors.append(f"transformers refuses it: {peer.error_line(error)}")
    if errors:
        return errors[0] if len(errors) == 1 else None
    theirs_laid_out = inputs.from_arrays(arrays, config)
    mine, raw = token_ids(ours_laid_out), np.asarray(arrays["input_ids"])[0]
    if len(mine) == len(raw) and not np.array_equal(mine, raw):
        place = int(np.argmax(mine != raw))
        return f"token {place} is {mine[place]} instead of {raw[place]}"
    for name in ("tokens", "image_id", "pixels", "grids", "owner"):
        if not _same(getattr(ours_laid_out, name), getattr(theirs_laid_out, name)):
            return f"{name} differ"
    if ours_laid_out.geometry.keys() != theirs_laid_out.geometry.keys() or not all(
        _same(ours_laid_out.geometry[name], theirs_laid_out.geometry[name]) for name in ours_laid_out.geometry
    ):
        return "the tower's geometry of the images differs"
    return ""


def token_ids(prompt: Inputs) -> np.ndarray:
    """The token ids of a batch of one, without padding."""
    return prompt.tokens[0][prompt.image_id[0] >= 0]


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return (one is None and other is None) or (one is not None and other is not None and np.array_equal(one, other))
