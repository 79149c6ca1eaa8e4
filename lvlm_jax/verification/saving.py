"""Checks that a checkpoint that is saved and loaded again is the same, here and in transformers."""

import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np

from lvlm_jax import weights
from lvlm_jax.models.family import FamilyConfig
from lvlm_jax.processors import inputs, load
from lvlm_jax.verification import peer
from lvlm_jax.verification.conversations import prompts
from lvlm_jax.verification.processors import token_ids
from lvlm_jax.verification.results import LEFT_OUT, Result, compared
from lvlm_jax.weights.tables import flatten

NAME = "save and load"


def check(folder: Path, config: FamilyConfig, vision_tower: str | None, scratch: Path, ask: tuple | None) -> Result:
    """Saves the parameters in their stored dtype in a temporary folder, and loads them again.

    Args:
        scratch: where the temporary folder is made; it takes as much space as the weights.
        ask: the arrays of a prompt, and the answer of transformers' model of `folder`; the model of the copy must give
            the same answer. None skips this comparison.
    """
    params = weights.load_parameters(folder, config, None, None, vision_tower)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    free = shutil.disk_usage(scratch).free
    if size > free:
        return Result(
            NAME, LEFT_OUT, f"--scratch has {free / 1e9:.1f} GB free, and the weights take {size / 1e9:.1f} GB"
        )
    with tempfile.TemporaryDirectory(prefix="lvlm-verify-", dir=scratch) as home:
        saved = weights.save_checkpoint(Path(home) / "saved", params, config, folder)
        return _compare(folder, saved, config, params, size, ask)


def _compare(folder: Path, saved: Path, config: FamilyConfig, params: dict, size: int, ask: tuple | None) -> Result:
    faults = []
    reloaded = weights.model_config(saved)
    faults += [] if reloaded == config else ["its configuration differs"]
    mine, read = flatten(params), flatten(weights.load_parameters(saved, reloaded, None))
    differ = [path for path in mine if path not in read or not _same(mine[path], read[path])]
    faults += (
        [f"{len(differ)} parameters differ: {', '.join(differ[:3])}"] if differ or read.keys() - mine.keys() else []
    )
    words = f"{len(mine)} parameters, {size / 1e9:.2f} GB, bit for bit"
    if load.has_processor(folder, config):
        ours = [load.load_processor(one, config) for one in (folder, saved)]
        for prompt in prompts():
            tokens = [token_ids(inputs.from_messages(one, config, prompt)) for one in ours]
            faults += [] if np.array_equal(*tokens) else ["its processor writes other token ids"]
        words += "; its processor writes the same token ids"
    if ask is not None:
        arrays, answer = ask
        try:
            with peer.model(saved) as model:
                theirs = peer.ask(model, [arrays], len(answer.tokens))[0]
            if not np.array_equal(theirs.logits, answer.logits) or theirs.tokens != answer.tokens:
                faults.append("transformers' model of the saved checkpoint answers differently")
        except Exception as error:  # noqa: BLE001 - transformers raises whatever the first broken file provokes
            faults.append(f"transformers cannot load what was saved: {peer.error_line(error)}")
        words += "; transformers' model of it gives the same bits"
    return compared(NAME, faults, words, bytes=size)


def _same(one: jax.Array, other: jax.Array) -> bool:
    return one.dtype == other.dtype and np.array_equal(np.asarray(one), np.asarray(other))
