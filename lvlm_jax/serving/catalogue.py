"""Names of models that clients may ask for, and the methods behind them.

    pocket                     the model as it is
    pocket+cmac:alpha=3        with a method in words, as on the command line
    pocket+eah+cmac            several, chained
    careful                    an alias of the operator's: any method, also of his own files

Clients name registered methods alone. Words that import a module or read a file are the operator's to allow: what he
gives a name to.
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
OPERATORS_FILE = "{} names a file, which the server's operator alone may do; ask for one of its aliases"


class Catalogue:
    """What the server answers under which name.

    Attributes:
        name: of the model as it is.
        aliases: methods by the operator's names for the model with them.
    """

    def __init__(self, name: str, aliases: Mapping[str, str], only: bool = False):
        """Builds the methods of the aliases.

        Args:
            name: of the model.
            aliases: words of methods by names.
            only: whether clients are held to the aliases.

        Raises:
            LVLMError: a method that cannot be built, or two things of one name.
        """
        self.name, self._only = name, only
        self.aliases: dict[str, Method | None] = {}
        self._words: dict[str, str | None] = {}  # what clients may know of them
        for alias, words in aliases.items():
            if alias == name or "+" in alias or not alias:
                raise LVLMError(f"an alias is {alias!r}; expected a name without + that is not the model's, {name!r}")
            self.aliases[alias] = parse.as_method(words)
            self._words[alias] = words if _of_registry(words) else None

    def models(self) -> list[str]:
        """Names for a client to choose from: the model, the aliases, the model with each method as it comes."""
        methods = [] if self._only else registry.names()
        return [self.name, *self.aliases, *(f"{self.name}+{method}" for method in methods)]

    def described(self) -> list[dict[str, Any]]:
        """Methods and their settings, for a page that offers them."""
        found = []
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
            found.append({"id": name, "about": about, "settings": settings, "presets": list(method.PRESETS)})
        return found + [
            {"id": alias, "about": f"an alias of this server: {words or 'its own method'}", "words": words}
            | {"settings": [], "presets": []}
            for alias, words in self._words.items()
        ]

    def method(self, model: str, method: str | None = None, settings: Mapping[str, Any] | None = None) -> Method | None:
        """The method of a request.

        Args:
            model: the request's model, with or without a method in its name.
            method: words for a method; not beside one in the name.
            settings: of `method`, by name; `preset` too.

        Raises:
            ApiError: there is no such model (404), or no such method or setting (400).
        """
        base, plus, words = model[:LONGEST].partition("+")
        if model in self.aliases:
            base, plus = self.name, "+"
        if base != self.name or (plus and not words and model not in self.aliases):
            known = ", ".join([self.name, *self.aliases])
            raise ApiError(
                404,
                f"there is no model {model[:80]!r} here; expected one of {known}, or {self.name}+METHOD:SETTING=VALUE",
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
                raise LVLMError(f"this server has the methods of its aliases alone; expected one of {known}")
            _check_words(words)
            if any(FITTED.fullmatch(name.lower()) for name in settings):
                raise LVLMError(OPERATORS_FILE.format("fitted"))
            return build_method(words, settings, ()) if settings else parse.as_method(words)
        except LVLMError as error:
            raise ApiError(400, error, "invalid_method", param) from error


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _of_registry(words: str) -> bool:
    """Whether words name registered methods alone, which they then mean to anybody."""
    try:
        _check_words(words)
    except LVLMError:
        return False
    return True


def _check_words(words: str) -> None:
    """Refuses a class from a module or a file; parts that are no method's settings are left to the parser."""
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
                f"{part[:60]!r} names code or a file, which the server's operator alone may do; expected one of "
                f"{', '.join(registry.names())}"
            )
