"""`adapter_config.json` of PEFT: which modules an adapter changes, with which ranks and scales.

Modules are named by endings or by regular expressions, as in PEFT. Because the file comes from somebody else, an
expression that takes too long to match is refused.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import regex

from lvlm_jax import files
from lvlm_jax.errors import LVLMError, shown
from lvlm_jax.weights.lora import scale_of

CONFIG = "adapter_config.json"

# Settings of PEFT that are read below, or that do not change what a trained adapter computes. Any other setting that is
# set belongs to a variant of LoRA, or to an addition, that is not supported here.
_KNOWN = frozenset(
    "peft_type task_type base_model_name_or_path revision auto_mapping peft_version inference_mode runtime_config "
    "r lora_alpha lora_dropout rank_pattern alpha_pattern use_rslora target_modules exclude_modules "
    "layers_to_transform fan_in_fan_out bias init_lora_weights eva_config megatron_core qalora_group_size".split()
)
_DEFAULTS = {
    "lora_dropout": 0.0,
    "bias": "none",
    "init_lora_weights": True,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
}
# Other initialisations of A and B move part of the base weights into them.
_HARMLESS_INITIAL = (True, False, None, "gaussian", "eva", "orthogonal")
_LARGEST = 1e9  # of ranks and scales; real adapters are far below
_SECONDS = 0.2  # for one expression and one name


def read_settings(folder: Path) -> dict[str, Any]:
    """`adapter_config.json` with PEFT's defaults for absent fields.

    Raises:
        LVLMError: it is missing, malformed, or requires more than LoRA on projections.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise LVLMError(f"no {CONFIG} in {folder}; expected a folder that PEFT saved an adapter to")
    settings = {**_DEFAULTS, **files.read_json(path, "adapter configuration", dict)}
    if settings.get("peft_type") != "LORA":
        raise LVLMError(f"{path} is of peft_type {str(settings.get('peft_type'))[:60]!r}; only LORA is supported")
    unknown = sorted(name for name, value in settings.items() if value and name not in _KNOWN)
    unknown += ["bias"] * (settings["bias"] != "none")
    unknown += ["init_lora_weights"] * (settings["init_lora_weights"] not in _HARMLESS_INITIAL)
    if unknown:
        values = ", ".join(f"{name} = {shown(settings[name])}" for name in unknown[:5])
        raise LVLMError(
            f"{path} sets {values}, which is not supported; merge the adapter with PEFT and load the merged model"
        )
    _check_types(path, settings)
    return settings


def _check_types(path: Path, settings: dict[str, Any]) -> None:
    """Raises an LVLMError if a setting has a type or a value that PEFT would not write."""

    def expect(name: str, right: bool, expected: str) -> None:
        if not right:
            raise LVLMError(f"{path}: {name} is {shown(settings.get(name))}; expected {expected}")

    for name in ("rank_pattern", "alpha_pattern"):
        settings[name] = settings[name] or {}
        expect(name, isinstance(settings[name], dict), "an object")
    expect("use_rslora", isinstance(settings["use_rslora"], bool), "true or false")
    layers = settings["layers_to_transform"]
    numbers = layers if isinstance(layers, list) else [layers] * (layers is not None)
    expect("layers_to_transform", all(type(one) is int for one in numbers), "a number, or a list of them")
    ranks = [("r", settings.get("r")), *settings["rank_pattern"].items()]
    scales = [("lora_alpha", settings.get("lora_alpha")), *settings["alpha_pattern"].items()]
    for name, value in (*ranks, *scales):
        if not (_is_number(value) and 0 < value <= _LARGEST):
            raise LVLMError(f"{path}: {name[:60]} is {shown(value)}; expected a positive number")
    for name, value in ranks:
        if value != int(value):
            raise LVLMError(f"{path}: {name[:60]} is {shown(value)}; expected a whole number")
    settings["r"] = int(settings["r"])
    settings["rank_pattern"] = {pattern: int(value) for pattern, value in settings["rank_pattern"].items()}
    rate = settings["lora_dropout"]
    expect("lora_dropout", _is_number(rate) and 0 <= rate < 1, "a rate from 0 to below 1")
    for name in ("target_modules", "exclude_modules"):
        value = settings[name]
        words = value if isinstance(value, list) else [value] * (value is not None)
        if not all(isinstance(word, str) for word in words):
            raise LVLMError(f"{path}: {shown(value)} is neither a list of modules nor an expression")
        if isinstance(value, str):
            _check_expression(path, value, value)
    for pattern in (*settings["rank_pattern"], *settings["alpha_pattern"]):
        _check_expression(path, pattern, _ending(pattern))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_expression(path: Path, text: str, whole: str) -> None:
    """Raises an LVLMError if `whole`, an expression made from a setting's `text`, is not a regular expression."""
    try:
        regex.compile(whole)
    except (regex.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
        raise LVLMError(f"{path}: {text[:60]!r} is not a regular expression: {error}") from error


def is_targeted(module: str, settings: Mapping[str, Any]) -> bool:
    """Whether PEFT adapts a module under these settings, which have targets.

    Raises:
        LVLMError: an expression takes too long to match.
    """
    if _names(module, settings["exclude_modules"] or ()):
        return False
    layers = settings["layers_to_transform"]
    if isinstance(settings["target_modules"], list) and layers not in (None, []):
        number = regex.search(r"\.(\d+)\.", module)
        if number is None or int(number[1]) not in (layers if isinstance(layers, list) else [layers]):
            return False
    return _names(module, settings["target_modules"])


def _names(module: str, pattern: str | list[str]) -> bool:
    """Whether `pattern` names a module: a regular expression for its whole name, or a list of names or endings."""
    if isinstance(pattern, str):
        return _matches(regex.fullmatch, pattern, module)
    return any(module == name or module.endswith(f".{name}") for name in pattern)


def _matches(match: Callable, expression: str, module: str) -> bool:
    try:
        return match(expression, module, timeout=_SECONDS) is not None
    except TimeoutError as error:
        raise LVLMError(
            f"{CONFIG}: matching the expression {expression[:60]!r} with module names takes too long; write the "
            "modules as a list"
        ) from error


def _ending(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _of_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, as in PEFT."""
    values = (value for pattern, value in patterns.items() if _matches(regex.match, _ending(pattern), module))
    return next(values, default)


def rank(module: str, settings: Mapping[str, Any]) -> int:
    """The rank of a module's adapter."""
    return _of_pattern(settings["rank_pattern"], module, settings["r"])


def scale(module: str, settings: Mapping[str, Any]) -> float:
    """The factor on the product of a module's A and B."""
    alpha = _of_pattern(settings["alpha_pattern"], module, settings["lora_alpha"])
    own = rank(module, settings)
    return scale_of(alpha, own, settings["use_rslora"])
