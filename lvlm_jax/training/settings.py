"""The configuration of a fine-tuning run: every field with its default and its allowed values.

Fields that all objectives share are here; those of one objective are in its file (`registry.Objective`). A file of
`configs/` starts from `base(recipe)` and changes some fields; the command line can change them again.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from lvlm_jax import config_files
from lvlm_jax.errors import LVLMError, shown
from lvlm_jax.generation.settings import LARGEST_FLOAT, LARGEST_INT
from lvlm_jax.training import registry
from lvlm_jax.training.registry import Check, Objective
from lvlm_jax.weights.lora import TARGETS
from lvlm_jax.weights.quantize import QUANTS

DTYPES = ("float32", "bfloat16")


class Field(NamedTuple):
    """A field of a config: its dotted name, its default, and its meaning."""

    name: str
    default: Any
    doc: str


# The fields that all objectives share.
FIELDS = (
    Field("recipe", "", "the objective, a name in lvlm_jax.training.registry"),
    Field("seed", 0, "seed of adapters, dropout and the order of the data"),
    Field("model", "pocket", "pocket (the model inside the package), a checkpoint folder, or a hub id"),
    Field("dtype", "float32", "number format of products and frozen weights; that of trained weights is master"),
    Field("quant", "", "int8: the decoder's frozen weights as 8-bit integers; empty: in dtype"),
    Field("master", "float32", "number format of the trained weights and of the optimizer's moments"),
    Field(
        "remat",
        None,
        "recompute layers in the backward pass: less memory, a third more time; None: only in models of a billion "
        "parameters",
    ),
    Field("data", "", "the training file, or several, separated by commas; required"),
    Field("data_shares", "", "shares of several training files in the batches, as in 2,1; empty: by their rows"),
    Field("validation", "", "the held-out file, or several; empty: no evaluation"),
    Field("ignore", "", "columns of the data files that the run may ignore, separated by commas"),
    Field("train", r"^(language_model|connector)/", "parameters trained without LoRA, a regex on their paths"),
    Field("lora.enabled", True, "train adapters beside frozen weights; False: the weights themselves"),
    Field("lora.rank", 16, "rank of each adapter"),
    Field("lora.alpha", 32.0, "an adapter's product is scaled by alpha / rank"),
    Field(
        "lora.rslora",
        False,
        "scale an adapter's product by alpha / √rank (rsLoRA), so that large ranks learn as fast as small ones",
    ),
    Field("lora.dropout", 0.0, "dropout rate of an adapter's input"),
    Field("lora.targets", TARGETS, "modules that get an adapter, a regex on their paths"),
    Field("lora.start", "", "continue from this adapter, ours or PEFT's, a folder or a hub id; empty: a new one"),
    Field("mesh.data", -1, "devices over which a batch is spread; -1: all devices that the other two axes do not use"),
    Field("mesh.fsdp", 1, "devices over which batch and parameters are spread"),
    Field("mesh.tensor", 1, "devices over which each product is spread"),
    Field("optimizer.peak", 1e-5, "highest learning rate"),
    Field("optimizer.final", 0.0, "learning rate at the end, as a share of the peak"),
    Field("optimizer.warmup", 0.03, "steps until the peak; below 1: a share of all steps"),
    Field("optimizer.clip", 1.0, "largest norm of the gradient"),
    Field("optimizer.beta1", 0.9, "decay of AdamW's mean of gradients"),
    Field("optimizer.beta2", 0.999, "decay of AdamW's mean of squared gradients"),
    Field("optimizer.weight_decay", 0.0, "weight decay of AdamW; multiplied by the learning rate"),
    Field("epochs", 1.0, "passes over the data"),
    Field("steps", 0, "number of updates; 0: computed from epochs"),
    Field("batch", 16, "samples in one update"),
    Field(
        "length_groups",
        1,
        "batches that are cut from one group of samples sorted by length, for less padding; 1: samples as drawn",
    ),
    Field("accumulate", 1, "parts into which a batch is split, to save memory"),
    Field("length", 1024, "tokens of the longest sample, image tokens included"),
    Field("too_long", "error", "longer samples: error, or drop (they are left out and counted)"),
    Field("loop.workers", 1, "processes that make batches"),
    Field("loop.log_every", 10, "steps from one line of the log to the next"),
    Field("loop.evaluate_every", 100, "steps from one evaluation to the next"),
    Field("loop.save_every", 100, "steps from one checkpoint to the next"),
    Field("loop.keep", 2, "number of newest checkpoints to keep"),
    Field("loop.keep_best", "", "also keep the checkpoint with the lowest value of this metric, such as val/loss"),
    Field("loop.patience", 0, "stop after this number of evaluations without a lower keep_best; 0: never"),
    Field("loop.answers", 0, "number of held-out prompts answered at each evaluation, for you to read"),
    Field("loop.answer_tokens", 64, "maximum number of new tokens of answers to held-out prompts"),
    Field("loop.logger", "", "a further destination of records: wandb, or module:function of (step, values)"),
)


def base(recipe: str = "") -> ConfigDict:
    """The defaults of an objective's run; other keys cannot be set.

    Args:
        recipe: a name that `registry.find` accepts. Without one the config has the sections of all objectives, for a
            file that sets `config.recipe` itself; `check` then requires that other objectives' sections are unchanged.

    Raises:
        LVLMError: no objective has that name.
    """
    config = _shared()
    config.recipe = recipe
    for objective in (_objective(recipe),) if recipe else registry.all_objectives():
        # "capl" and "dpo" share a section; the defaults are those of the first.
        if objective.section and objective.section not in config:
            config[objective.section] = ConfigDict(dict(objective.defaults))
        if recipe:
            config.update_from_flattened_dict(objective.shared)
    return config.lock()


def _objective(recipe: str) -> Objective:
    entry = registry.find(recipe)
    if not isinstance(entry, Objective):
        raise LVLMError(f"recipe {recipe!r} has its own configuration; start from its file in configs/")
    return entry


def _shared() -> ConfigDict:
    """The fields that all objectives share, with their defaults."""
    config = ConfigDict()
    for name, default, _ in FIELDS:
        section, _, field = name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        (config[section] if section else config)[field] = default
    return config


_CHECKS = (
    Check("dtype", " or ".join(DTYPES), lambda value: value in DTYPES),
    Check("master", " or ".join(DTYPES), lambda value: value in DTYPES),
    Check("quant", "int8, or empty for none", lambda value: value in ("", *QUANTS)),
    Check("seed", "at least 0", lambda value: value >= 0),
    Check("epochs", "a number above 0", lambda value: 0 < value < math.inf),
    Check("steps", "at least 0; 0 means computed from epochs", lambda value: value >= 0),
    Check("batch", "at least 1", lambda value: value >= 1),
    Check("length_groups", "at least 1", lambda value: value >= 1),
    Check("accumulate", "at least 1", lambda value: value >= 1),
    Check("length", "at least 2 tokens", lambda value: value >= 2),
    Check("too_long", "error or drop", lambda value: value in ("error", "drop")),
    Check("lora.rank", "at least 1", lambda value: value >= 1),
    Check("lora.alpha", "a number above 0", lambda value: 0 < value < math.inf),
    Check("lora.dropout", "a rate from 0 to below 1", lambda value: 0 <= value < 1),
    Check("optimizer.peak", "a learning rate above 0", lambda value: 0 < value < math.inf),
    Check("optimizer.final", "a share from 0 to 1", lambda value: 0 <= value <= 1),
    Check("optimizer.warmup", "at least 0", lambda value: 0 <= value < math.inf),
    Check("optimizer.clip", "a norm above 0", lambda value: value > 0),
    Check("optimizer.beta1", "from 0 to below 1", lambda value: 0 <= value < 1),
    Check("optimizer.beta2", "from 0 to below 1", lambda value: 0 <= value < 1),
    Check("optimizer.weight_decay", "at least 0", lambda value: 0 <= value < math.inf),
    Check("loop.workers", "at least 0", lambda value: value >= 0),
    Check("loop.log_every", "at least 1", lambda value: value >= 1),
    Check("loop.evaluate_every", "at least 1", lambda value: value >= 1),
    Check("loop.save_every", "at least 1", lambda value: value >= 1),
    Check("loop.keep", "at least 1", lambda value: value >= 1),
    Check("loop.patience", "at least 0", lambda value: value >= 0),
    Check("loop.answers", "at least 0", lambda value: value >= 0),
    Check("loop.answer_tokens", "at least 1", lambda value: value >= 1),
)


_UNBOUNDED = ("optimizer.clip",)  # may be infinite


def check(config: ConfigDict) -> None:
    """Refuses a config that no run can use.

    Raises:
        LVLMError: unknown or missing keys, or a value out of range.
    """
    entry = registry.find(config.recipe)
    if not isinstance(entry, Objective):
        return
    expected, values = _flat(base(entry.name)), _flat(config)
    for key in sorted(values.keys() - expected.keys()):
        if not _untouched(key, values[key]):
            raise LVLMError(f"the config has an unknown key {key}{_hint(key, list(expected), entry.name)}")
    for key in sorted(expected.keys() - values.keys()):
        raise LVLMError(f"the config has no {key}; begin it with lvlm_jax.training.settings.base({entry.name!r})")
    for key, value in values.items():
        if isinstance(value, int | float) and not _fits(value) and not (value == math.inf and key in _UNBOUNDED):
            raise LVLMError(f"{key} is {shown(value)}; expected a number within {_range(value)}")
    own = (check._replace(field=f"{entry.section}.{check.field}") for check in entry.checks)
    for key, expectation, holds in (*_CHECKS, *own):
        if key.startswith("lora.") and not config.lora.enabled:
            continue
        if not holds(values[key]):
            raise LVLMError(f"{key} is {shown(values[key])}; expected {expectation}")
    if config.batch % config.accumulate:
        raise LVLMError(
            f"batch is {config.batch} and accumulate {config.accumulate}; expected a batch that is a multiple of "
            "accumulate"
        )
    if not config.lora.enabled and (config.lora.start or config.lora.rslora):
        raise LVLMError("lora.start and lora.rslora belong to adapters and lora.enabled is False; leave them out")
    if config.loop.patience and not config.loop.keep_best:
        raise LVLMError("loop.patience needs a metric to watch; set loop.keep_best, such as val/loss")
    if config.loop.answers and not config.validation:
        raise LVLMError("loop.answers needs held-out prompts and there are none; set validation, or loop.answers=0")
    if entry.check:
        entry.check(config)


def _fits(value: int | float) -> bool:
    """Whether a number fits into int32 or float32."""
    return abs(value) <= (LARGEST_INT if isinstance(value, int) else LARGEST_FLOAT)


def _range(value: int | float) -> str:
    return f"int32 (up to {LARGEST_INT})" if isinstance(value, int) else f"float32 (up to {LARGEST_FLOAT:.2g})"


def _untouched(key: str, value: Any) -> bool:
    """Whether a key is another objective's field and has its default, as in a config from `base()` without a name."""
    section, _, field = key.partition(".")
    return any(
        other.section == section and field in other.defaults and other.defaults[field] == value
        for other in registry.all_objectives()
    )


def read(path: str | Path, words: Sequence[str] = ()) -> ConfigDict:
    """Reads the config of a file and applies changes from the command line.

    Args:
        path: Python file with a function `get_config()`.
        words: the changes, such as "--config.optimizer.peak=1e-4".

    Raises:
        LVLMError: there is no such file, a key is unknown, or a value has the wrong type.
    """
    config = config_files.load_config(path)
    values, words = flags.FlagValues(), ["", *words]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=words)
        rest = values(words)[1:]
    except flags.UnrecognizedFlagError as error:
        raise LVLMError(f"{error}; settings are given as --config.key=value") from error
    except (AttributeError, KeyError) as error:  # ml_collections raises these errors for unknown keys
        key = next((_key(word) for word in words[1:] if _key(word) not in _flat(config)), str(error))
        hint = _hint(key, list(_flat(config)), config.get("recipe", ""))
        raise LVLMError(f"the config has no key {key}{hint}") from error
    except (flags.Error, TypeError, ValueError) as error:
        raise LVLMError(" ".join(str(error).split())) from error
    if rest:
        raise LVLMError(f"{rest[0]!r} is not understood; settings are given as --config.key=value")
    return config


def describe(config: ConfigDict) -> list[Field]:
    """The fields of a config with its values as defaults, for help texts; `doc` is empty for undocumented fields."""
    entry, docs = registry.find(config.recipe), {}
    if isinstance(entry, Objective):
        docs = {field.name: field.doc for field in FIELDS}
        docs |= {f"{entry.section}.{name}": doc for name, doc in entry.docs.items()}
    return [Field(name, value, docs.get(name, "")) for name, value in _flat(config).items()]


def _key(word: str) -> str:
    return word.lstrip("-").removeprefix("config.").partition("=")[0]


def _hint(key: str, known: list[str], recipe: str) -> str:
    section = key.partition(".")[0]
    owners = [other.name for other in registry.all_objectives() if other.section == section]
    if owners and not any(other.startswith(f"{section}.") for other in known):
        return (
            f", which belongs to recipe {' and '.join(owners)}, and recipe is {recipe!r}; leave it out, or begin the "
            f"config with lvlm_jax.training.settings.base({owners[0]!r})"
        )
    last = key.rpartition(".")[2]
    close = [other for other in known if other.endswith(f".{last}")] or difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; expected one of {', '.join(known)}"


def _flat(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """The values of a nested config by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        inner = isinstance(value, ConfigDict | dict)
        flat |= _flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return flat
