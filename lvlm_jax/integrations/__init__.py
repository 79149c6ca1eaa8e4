"""Our models and methods inside other people's harnesses, one module for each, imported by that harness alone.

What the modules share stands here: settings as a harness passes them on (text from a command line, or Python values
from its own configuration) become a method, and a `Decoding`. Sources: lmms-eval 0.7.3 and the
development guide of VLMEvalKit; `docs/adapters.md` says how each is started.
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

# What harnesses call the settings of a generation; `decoding` turns them into ours.
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
SAMPLING = ("top_p", "top_k")  # without meaning under greedy decoding, where harnesses write 0 for them


def manifest() -> Any:
    """What the entry point tells lmms-eval: our model's name, and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("lvlm_jax", simple_class_path="lvlm_jax.integrations.lmms_eval.LVLMJax", aliases=("lvlm-jax",))


def load(pretrained: Any, dtype: str) -> LVLM:
    """The model called `pretrained`: "pocket" for the one inside the package, a folder, or a hub id.

    Raises:
        LVLMError: no name, or a checkpoint that cannot be used.
    """
    if pretrained is None:
        raise LVLMError("no model is named; give pretrained= a checkpoint folder, a hub id, or pocket")
    return LVLM.from_pretrained(str(pretrained), dtype=str(dtype))


def build_method(name: str, fields: Mapping[str, Any], reserved: Sequence[str]) -> Method | None:
    """The method called `name` (several joined by +; None for "none") with the settings given.

    Settings are those of the command line: `alpha`, `preset`, and `vcd_seed` where the name is taken otherwise.

    Args:
        fields: values as text, numbers, booleans or sequences; None leaves the default.
        reserved: settings of the adapter itself, whose names a method's field cannot have.

    Raises:
        LVLMError: an unknown method or setting, or a value out of range.
    """
    parser = _Settings(add_help=False, allow_abbrev=False)
    for own in reserved:
        parser.add_argument(parse.hyphenated(f"--{own}".replace("_", "-")))
    if name.lower() != "none":
        parse.add_method_flags(parser, name)
    words = [_word(key, value) for key, value in fields.items() if value is not None]
    given, unknown = parser.parse_known_args(words)
    if unknown:
        known = [field.rpartition(".")[2].replace("-", "_") for field in vars(given)]
        raise LVLMError(
            f"{unknown[0].removeprefix('--').partition('=')[0].replace('-', '_')} is no setting of the adapter or "
            f"of method {name}; expected one of {', '.join(dict.fromkeys(known))}"
        )
    return parse.build_method(name, given)


class _Settings(argparse.ArgumentParser):
    """Reads the settings; what cannot be read is an `LVLMError`."""

    def error(self, message):  # noqa: D102
        raise LVLMError(f"{message}; `lvlm infer --help` lists the settings of methods")


def _word(key: str, value: Any) -> str:
    """A setting as the command line has it; "[8,9]", which keeps lmms-eval from cutting at the comma, as 8,9."""
    flag = "--" + key.replace("_", "-")
    if isinstance(value, bool):
        return flag if value else flag.replace("--", "--no-", 1)
    if isinstance(value, (tuple, list)):
        value = ",".join(map(str, value))
    return f"{flag}={str(value).strip('[]')}"


def whole(name: str, value: Any, low: int, high: int = settings.LARGEST_INT) -> int:
    """A whole number from text or a number.

    Raises:
        LVLMError: something else, or out of range.
    """
    if isinstance(value, str) and value.strip().lstrip("-").isdecimal():
        value = int(value)
    return settings.whole_number(name, value, low, high)


def decoding(given: Mapping[str, Any], max_new_tokens: int, stop: str | Sequence[str] = ()) -> Decoding:
    """How answers are decoded, from a harness's settings (keys of `GENERATION`; None leaves the default).

    Sampled where `do_sample` says so, and without it where the temperature is above 0; `do_sample=False` is greedy
    whatever the temperature, `do_sample=True` without one takes temperature 1, as in transformers.

    Args:
        max_new_tokens: longest answer where `given` names none.
        stop: strings that end an answer.

    Raises:
        LVLMError: a value of another kind or out of range.
    """
    given = {name: value for name, value in given.items() if value is not None}
    sampled = given.pop("do_sample", None)
    if not isinstance(sampled, Real | None):
        raise LVLMError(f"do_sample is {sampled!r}; expected true or false")
    temperature = Decoding(temperature=given.pop("temperature", 1.0 if sampled else 0.0)).temperature
    if sampled is not None and not sampled:
        temperature = 0.0
    if temperature == 0:
        given = {name: value for name, value in given.items() if name not in SAMPLING}
    return Decoding(**{"max_new_tokens": max_new_tokens} | given, temperature=temperature, stop=stop)
