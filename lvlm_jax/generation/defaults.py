"""Reads the settings in a checkpoint's `generation_config.json` (`generation_config="checkpoint"`).

By default ("plain") only the stop tokens come from that file: answers are greedy and without penalties for every
checkpoint, so that measurements of different models can be compared. transformers uses the whole file, for example the
`repetition_penalty` of 1.05 of every Qwen2.5-VL. With "checkpoint", the file replaces every setting that has its
default value; settings with another value stay, and so does `max_new_tokens`.
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
# The settings of transformers for a checkpoint that samples and does not say how.
_SAMPLING = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
# Names of settings in the file -> those of `Decoding`.
_ALWAYS = {
    "repetition_penalty": "repetition_penalty",
    "num_beams": "num_beams",
    "length_penalty": "length_penalty",
    "stop_strings": "stop",
}
# Settings that would change an answer and that we do not support, with the values at which they do nothing.
_UNSUPPORTED = {
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": None,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
    "early_stopping": False,
    "num_beam_groups": 1,
    "force_words_ids": None,
    "min_length": 0,
    "min_new_tokens": None,
    "dola_layers": None,
}


def check_choice(choice: Any) -> str:
    """Returns `choice` if it is valid.

    Raises:
        LVLMError: it is not one of `CHOICES`.
    """
    if not isinstance(choice, str) or choice not in CHOICES:
        raise LVLMError(f"generation_config is {shown(choice)}; expected {' or '.join(CHOICES)}")
    return choice


def with_defaults(decoding: Decoding, choice: Any, folder: Path | None) -> Decoding:
    """The settings of an answer, with those of the checkpoint in `folder` if `choice` is "checkpoint".

    Raises:
        LVLMError: an unknown choice, or a setting in the file that is malformed or not supported.
    """
    if check_choice(choice) == "plain" or folder is None:
        return decoding
    file_settings = of_checkpoint(read_optional(folder, FILE), folder / FILE)
    used = {name: value for name, value in file_settings.items() if getattr(decoding, name) == getattr(GREEDY, name)}
    try:
        return dataclasses.replace(decoding, **used)
    except LVLMError as error:
        raise LVLMError(f"{folder / FILE}: {error}") from error


def of_checkpoint(file: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The fields of `Decoding` in a `generation_config.json`.

    Temperature, top-k and top-p are among them only if the file turns sampling on.

    Raises:
        LVLMError: it has a setting that would change the answer and is not supported.
    """
    file = {name: value for name, value in file.items() if value is not None}
    for name, neutral in _UNSUPPORTED.items():
        if name in file and file[name] not in (neutral, 0, False, [], {}):
            raise LVLMError(
                f'{where} sets {name}, which is not supported; use generation_config="plain" and give the settings'
            )
    samples = file.get("do_sample", False)
    if not isinstance(samples, bool):
        raise LVLMError(f"{where}: do_sample is {str(samples)[:40]!r}; expected true or false")
    settings = {ours: file[theirs] for theirs, ours in _ALWAYS.items() if theirs in file}
    if samples:
        settings |= {name: file.get(name, default) for name, default in _SAMPLING.items()}
    return settings
