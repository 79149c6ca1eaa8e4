"""Our models and methods inside other evaluation harnesses; one module per harness, imported only by that harness.

The modules share these functions, which turn a harness's settings (text from a command line, or Python values) into a
method and a `Decoding`. Sources: lmms-eval 0.7.3 and the development guide of VLMEvalKit; `docs/adapters.md` says how
each is started.
"""

import argparse
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from lvlm_jax import LVLM
from lvlm_jax.errors import LVLMError
from lvlm_jax.generation import settings
from lvlm_jax.generation.settings import Decoding
from lvlm_jax.methods import Method, parse

# The names of generation settings in harnesses; `decoding` turns them into ours.
GENERATION = (
    "max_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "repetition_penalty",
    "num_beams",
    "length_penalty",
)
SAMPLING = ("top_p", "top_k")  # ignored under greedy decoding, for which harnesses write 0


def manifest() -> Any:
    """The manifest for lmms-eval's entry point: our model's name, and the place of its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("lvlm_jax", simple_class_path="lvlm_jax.integrations.lmms_eval.LVLMJax", aliases=("lvlm-jax",))


def load(pretrained: Any, dtype: str) -> LVLM:
    """Loads the model called `pretrained`: "pocket" for the one inside the package, a folder, or a hub id.

    Raises:
        LVLMError: there is no name, or the checkpoint cannot be used.
    """
    if pretrained is None:
        raise LVLMError("no model is named; give pretrained= a checkpoint folder, a hub id, or pocket")
    return LVLM.from_pretrained(str(pretrained), dtype=str(dtype))


def build_method(name: str, fields: Mapping[str, Any], reserved: Sequence[str]) -> Method | None:
    """Builds the method called `name` (several joined by +; None for "none") with the given settings.

    Settings are those of the command line: `alpha`, `preset`, and for example `vcd_seed` if `seed` is taken.

    Args:
        fields: values as text, numbers, booleans or sequences; None means the default.
        reserved: the adapter's own settings, whose names a method's field cannot have.

    Raises:
        LVLMError: an unknown method or setting, or a value out of range.
    """
    parser = _Settings(add_help=False, allow_abbrev=False)
    for own in reserved:
        parser.add_argument(parse.hyphenated(f"--{own}".replace("_", "-")))
    if name.lower() != "none":
        parse.add_method_flags(parser, name)
    words = [_word(key, value) for key, value in fields.items() if value is not None]
    parsed, unknown = parser.parse_known_args(words)
    if unknown:
        setting_names = [field.rpartition(".")[2].replace("-", "_") for field in vars(parsed)]
        raise LVLMError(
            f"{unknown[0].removeprefix('--').partition('=')[0].replace('-', '_')} is not a setting of the adapter or "
            f"of method {name}; expected one of {', '.join(dict.fromkeys(setting_names))}"
        )
    return parse.build_method(name, parsed)


class _Settings(argparse.ArgumentParser):
    """Parses the settings; malformed ones raise an `LVLMError`."""

    def error(self, message):  # noqa: D102
        raise LVLMError(f"{message}; `lvlm infer --help` lists the settings of methods")


def _word(key: str, value: Any) -> str:
    """A setting as the command line takes it; "[8,9]", which lmms-eval does not split at the comma, becomes 8,9."""
    flag = "--" + key.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    if isinstance(value, (tuple, list)):
        value = ",".join(map(str, value))
    return f"{flag}={str(value).strip('[]')}"


def whole(name: str, value: Any, low: int, high: int = settings.LARGEST_INT) -> int:
    """Parses a whole number from text or a number.

    Raises:
        LVLMError: it is not a whole number, or out of range.
    """
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
        value = int(value)
    return settings.whole_number(name, value, low, high)


def decoding(harness_settings: Mapping[str, Any], max_new_tokens: int, stop: str | Sequence[str] = ()) -> Decoding:
    """Makes a `Decoding` of a harness's settings (keys of `GENERATION`; None means the default).

    `do_sample` decides whether to sample; without it, a temperature above 0 does. `do_sample=False` is greedy whatever
    the temperature; `do_sample=True` without a temperature uses 1, as in transformers.

    Args:
        harness_settings: the harness's settings.
        max_new_tokens: longest answer if the settings have none.
        stop: strings that end an answer.

    Raises:
        LVLMError: a value has the wrong type or is out of range.
    """
    harness_settings = {name: value for name, value in harness_settings.items() if value is not None}
    sampled = harness_settings.pop("do_sample", None)
    if not isinstance(sampled, Real | None):
        raise LVLMError(f"do_sample is {sampled!r}; expected true or false")
    temperature = Decoding(temperature=harness_settings.pop("temperature", 1.0 if sampled else 0.0)).temperature
    if sampled is not None and not sampled:
        temperature = 0.0
    if temperature == 0:
        harness_settings = {name: value for name, value in harness_settings.items() if name not in SAMPLING}
    return Decoding(**{"max_new_tokens": max_new_tokens} | harness_settings, temperature=temperature, stop=stop)
