"""A parameter tree in two disjoint parts, the trained and the frozen one, which merge to the whole."""

import re
from collections.abc import Iterable, Mapping

from lvlm_jax.errors import LVLMError
from lvlm_jax.models.layers import INT8_LEAVES
from lvlm_jax.weights.tables import flatten, unflatten


def split(params: Mapping, pattern: str) -> tuple[dict, dict]:
    """(trainable, frozen): the parameters whose path `pattern` finds, and all others.

    Args:
        params: nested dict of parameters.
        pattern: a regular expression, searched in paths such as "language_model/layers_0/mlp/up_proj/kernel".

    Raises:
        LVLMError: not a regular expression, one that finds no parameter, or one that finds quantized ones.
    """
    flat = flatten(params)
    chosen = set(matching(pattern, flat, "the pattern of trained parameters"))
    if quantized := next((path for path in flat if path in chosen and path.endswith(INT8_LEAVES)), None):
        raise LVLMError(
            f"{quantized} is quantized and cannot be trained; load the model without quant, or train LoRA adapters"
        )
    trainable = {path: leaf for path, leaf in flat.items() if path in chosen}
    frozen = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten(trainable), unflatten(frozen)


def join(trainable: Mapping, frozen: Mapping) -> dict:
    """The tree that both parts make. Pure, so that it may run inside a transformed function.

    Raises:
        ValueError: the parts share a path.
    """
    first, second = flatten(trainable), flatten(frozen)
    if shared := first.keys() & second.keys():
        raise ValueError(f"both parts hold {sorted(shared)[0]}")
    return unflatten({**second, **first})


def matching(pattern: str, paths: Iterable[str], what: str) -> list[str]:
    """The paths that a regular expression finds something in, in order.

    Args:
        pattern: the regular expression.
        paths: parameter paths, or parts of them.
        what: names the pattern in errors.

    Raises:
        LVLMError: not a regular expression, or one that matches nothing.
    """
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise LVLMError(f"{what}, {pattern!r}, is not a regular expression: {error}") from error
    paths = list(paths)
    if not (found := [path for path in paths if regex.search(path)]):
        raise LVLMError(f"{what}, {pattern!r}, matches nothing; expected one that finds paths such as {paths[-1]!r}")
    return found
