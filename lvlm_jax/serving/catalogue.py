"""Names of models for clients, and their methods.

    pocket                     the model without a method
    pocket+cmac:alpha=3        with a method, as on the command line
    pocket+eah+cmac            several methods, chained
    careful                    an alias that the operator defined: any method, also from the operator's files

Clients can name only registered methods. Names that import a module or read a file are available only as aliases.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from lvlm_jax.errors import LVLMError
from lvlm_jax.integrations import build_method
from lvlm_jax.methods import Method, learned, parse, registry
from lvlm_jax.serving.errors import ApiError

LONGEST = 400  # characters of a name
FITTED = re.compile(r"\W*(\w+[-_])?fitted\W*")  # a setting that names a file of `lvlm fit`
OPERATORS_FILE = "{} names a file, which only the server's operator may do; use one of its aliases"


class Catalogue:
    """The models and methods of the server, by name.

    Attributes:
        name: name of the model without a method.
        aliases: methods, by the names that the operator gave them.
    """

    def __init__(self, name: str, aliases: Mapping[str, str], only: bool = False):
        """Builds the methods of the aliases.

        Args:
            name: name of the model.
            aliases: methods in words, by name.
            only: whether clients may use only the aliases.

        Raises:
            LVLMError: a method cannot be built, or a name is used twice.
        """
        self.name, self._only = name, only
        self.aliases: dict[str, Method | None] = {}
        self._words: dict[str, str | None] = {}  # descriptions that clients may see
        for alias, words in aliases.items():
            if alias == name or "+" in alias or not alias:
                raise LVLMError(f"an alias is {alias!r}; expected a name without + that is not the model's, {name!r}")
            self.aliases[alias] = parse.as_method(words)
            self._words[alias] = words if _of_registry(words) else None

    def models(self) -> list[str]:
        """Names that a client can choose: the model, the aliases, and the model with each method at its defaults."""
        methods = [] if self._only else registry.names()
        return [self.name, *self.aliases, *(f"{self.name}+{method}" for method in methods)]

    def described(self) -> list[dict[str, Any]]:
        """Methods and their settings, for the server's page."""
        descriptions = []
        for name in [] if self._only else registry.names():
            method = registry.get(name)
            settings = []
            for field in dataclasses.fields(method):
                if {"data", "fitted"} & field.metadata.keys():
                    continue
                static = "static" in field.metadata
                default = getattr(field, "default", None)
                settings.append(
                    {
                        "name": field.name.strip("_"),
                        "kind": "switch" if static else "strength",
                        "default": default,
                        "about": field.metadata["doc"],
                        "choices": field.metadata.get("choices") if static else None,
                        **({} if static else {bound: _finite(field.metadata[bound]) for bound in ("low", "high")}),
                    }
                )
            about = (method.__doc__ or "").splitlines()[0]
            descriptions.append({"id": name, "about": about, "settings": settings, "presets": list(method.PRESETS)})
        return descriptions + [
            {"id": alias, "about": f"an alias of this server: {words or 'its own method'}", "words": words}
            | {"settings": [], "presets": []}
            for alias, words in self._words.items()
        ]

    def method(self, model: str, method: str | None = None, settings: Mapping[str, Any] | None = None) -> Method | None:
        """The method of a request.

        Args:
            model: the request's model, with or without a method in its name.
            method: a method in words; not allowed if the name already has one.
            settings: settings of `method`, by name; also `preset`.

        Raises:
            ApiError: there is no such model (404), or no such method or setting (400).
        """
        base, plus, words = model[:LONGEST].partition("+")
        if model in self.aliases:
            base, plus = self.name, "+"
        if base != self.name or (plus and not words and model not in self.aliases):
            names = ", ".join([self.name, *self.aliases])
            raise ApiError(
                404,
                f"there is no model {model[:80]!r} here; expected one of {names}, or {self.name}+METHOD:SETTING=VALUE",
                "model_not_found",
                "model",
            )
        if plus and (method is not None or settings):
            message = f"model {model[:80]!r} has a method already; leave method and method_settings out, or ask for "
            raise ApiError(400, message + repr(self.name), "method_twice", "method")
        if model in self.aliases:
            return self.aliases[model]
        if settings and method is None:
            raise ApiError(400, "method_settings are given without method; name one", param="method_settings")
        chosen, param = (words, "model") if plus else (method, "method")
        return None if chosen is None else self._built(chosen, settings or {}, param)

    def _built(self, words: str, settings: Mapping[str, Any], param: str) -> Method | None:
        if words in self.aliases and not settings:
            return self.aliases[words]
        try:
            if self._only and words.strip().lower() != "none":
                known = ", ".join(self.aliases) or "none"
                raise LVLMError(f"this server allows only the methods of its aliases; expected one of {known}")
            _check_words(words)
            if any(FITTED.fullmatch(name.lower()) for name in settings):
                raise LVLMError(OPERATORS_FILE.format("fitted"))
            return build_method(words, settings, ()) if settings else parse.as_method(words)
        except LVLMError as error:
            raise ApiError(400, error, "invalid_method", param) from error


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _of_registry(words: str) -> bool:
    """Whether the words name only registered methods, so that they mean the same to everybody."""
    try:
        _check_words(words)
    except LVLMError:
        return False
    return True


def _check_words(words: str) -> None:
    """Refuses a class from a module or a file; other unknown parts are left to the parser."""
    if len(words) > LONGEST:
        raise LVLMError(f"the method has {len(words)} characters; expected at most {LONGEST}")
    if learned.path_of(words):
        raise LVLMError(OPERATORS_FILE.format(learned.WORD))
    for part in words.split("+"):
        name = part.partition(":")[0].partition("/")[0].strip().lower()
        if any(FITTED.fullmatch(setting.partition("=")[0].lower()) for setting in re.split("[:,]", part)):
            raise LVLMError(OPERATORS_FILE.format("fitted"))
        own = parse.OWN.match(part)
        if own or any(mark in name for mark in ".\\"):
            raise LVLMError(
                f"{part[:60]!r} names code or a file, which only the server's operator may do; expected one of "
                f"{', '.join(registry.names())}"
            )
