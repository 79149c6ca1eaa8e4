"""Splits a parameter tree into a trained and a frozen part, and joins them again."""

import re
from collections.abc import Iterable, Mapping

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.layers import INT8_LEAVES
from lvlm_jax.weights.tables import flatten, unflatten


def split(params: Mapping, pattern: str) -> tuple[dict, dict]:
    """(trainable, frozen): the parameters whose path matches `pattern`, and all others.

    Args:
        params: nested dict of parameters.
        pattern: a regular expression, searched in paths such as "language_model/layers_0/mlp/up_proj/kernel".

    Raises:
        LVLMError: it is not a regular expression, matches no parameter, or matches quantized parameters.
    """
    flat = flatten(params)
    chosen = set(match_paths(pattern, flat, "the pattern of trained parameters"))
    if quantized := next((path for path in flat if path in chosen and path.endswith(INT8_LEAVES)), None):
        raise LVLMError(
            f"{quantized} is quantized and cannot be trained; load the model without quant, or train LoRA adapters"
        )
    trainable = {path: leaf for path, leaf in flat.items() if path in chosen}
    frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten(trainable), unflatten(frozen)


def join(trainable: Mapping, frozen: Mapping) -> dict:
    """The union of both parts. Pure, so that it may run inside a transformed function.

    Raises:
        ValueError: the parts share a path.
    """
    first, second = flatten(trainable), flatten(frozen)
    if shared := first.keys() & second.keys():
        raise ValueError(f"both parts have {sorted(shared)[0]}")
    return unflatten({**second, **first})


def match_paths(pattern: str, paths: Iterable[str], what: str) -> list[str]:
    """The paths that match a regular expression, in order.

    Args:
        pattern: the regular expression.
        paths: parameter paths, or parts of them.
        what: name of the pattern in errors.

    Raises:
        LVLMError: it is not a regular expression, or matches nothing.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise LVLMError(f"{what}, {pattern!r}, is not a regular expression: {error}") from error
    paths = list(paths)
    if not (matches := [path for path in paths if regex.search(path)]):
        raise LVLMError(f"{what}, {pattern!r}, matches nothing; expected one that matches paths such as {paths[-1]!r}")
    return matches
