"""Settings of a checkpoint's `generation_config.json`, for those who ask for them (`generation_config="checkpoint"`).

As it comes ("plain"), nothing but the stop tokens is taken from that file: an answer is greedy, without penalties,
whatever the checkpoint, so that measurements of different models can be compared. transformers takes all of it, such
as the `repetition_penalty` of 1.05 that every Qwen2.5-VL comes with. With "checkpoint" each setting that was left at
its default is the checkpoint's; one that was given another value stays, and so does `max_new_tokens`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lvlm_jax.errors import LVLMError, shown
from lvlm_jax.generation.settings import GREEDY, Decoding
from lvlm_jax.weights.checkpoint import read_optional

FILE = "generation_config.json"
CHOICES = ("plain", "checkpoint")
# What transformers draws with where a checkpoint that samples says nothing.
_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
_ALWAYS = {"repetition_penalty", "num_beams", "length_penalty"}
# Settings that would change an answer and that we do not have, with the value under which they do nothing.
_UNSUPPORTED = {
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": None,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": None,
    "num_beam_groups": 1,
    "min_length": 0,
    "min_new_tokens": None,
    "dola_layers": None,
}


def check(choice: Any) -> str:
    """The choice itself.

    Raises:
        LVLMError: it is not one of `CHOICES`.
    """
    if not isinstance(choice, str) or choice not in CHOICES:
        raise LVLMError(f"generation_config is {shown(choice)}; expected {' or '.join(CHOICES)}")
    return choice


def settled(decoding: Decoding, choice: Any, folder: Path | None) -> Decoding:
    """The settings of an answer, with those of the checkpoint in `folder` if `choice` is "checkpoint".

    Raises:
        LVLMError: another choice, or a file with a setting that is malformed or not supported.
    """
    if check(choice) == "plain" or folder is None:
        return decoding
    given = of_checkpoint(read_optional(folder, FILE), folder / FILE)
    left = {name: value for name, value in given.items() if getattr(decoding, name) == getattr(GREEDY, name)}
    try:
        return dataclasses.replace(decoding, **left)
    except LVLMError as error:
        raise LVLMError(f"{folder / FILE}: {error}") from error


def of_checkpoint(file: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The fields of `Decoding` that a `generation_config.json` sets; temperature, top-k and top-p where it samples.

    Raises:
        LVLMError: a setting that would change the answer and is not supported.
    """
    file = {name: value for name, value in file.items() if value is not None}
    for name, neutral in _UNSUPPORTED.items():
        if name in file and file[name] not in (neutral, 0, False):
            raise LVLMError(
                f'{where} sets {name}, which is not supported; use generation_config="plain" and give the settings'
            )
    samples = file.get("do_sample", False)
    if not isinstance(samples, bool):
        raise LVLMError(f"{where}: do_sample is {str(samples)[:40]!r}; expected true or false")
    settings = {name: file[name] for name in sorted(_ALWAYS & file.keys())}
    if samples:
        settings |= {name: file.get(name, default) for name, default in _SAMPLING.items()}
    return settings
