"""Validates the fields of methods; an error says in one line what was expected."""

import dataclasses
import functools
import types
import typing
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lvlm_jax.attention.layered import Layered
from lvlm_jax.errors import LVLMError, shown
from lvlm_jax.methods.cuts import Soft
from lvlm_jax.methods.fitted import as_fitted

LARGEST = float(np.finfo(np.float32).max)
NUMBERS = (int, float, np.integer, np.floating)


def checked(owner: type, field: dataclasses.Field, value: Any) -> Any:
    """Validates and converts the value of a field: numbers to float32, lists to tuples, files of `lvlm fit` to their
    content.

    Raises:
        LVLMError: the value has the wrong type, is out of range, or is not one of the choices.
    """
    name = f"{owner.__name__}: {field.name}"
    if "fitted" in field.metadata:
        return as_fitted(owner.__name__, owner.__name__.lower(), value)
    return _static(owner, name, field, value) if "static" in field.metadata else _number(name, field, value)


def _number(name: str, field: dataclasses.Field, value: Any) -> Any:
    if value is None and field.default is None:
        return None
    if isinstance(value, Soft) and field.metadata.get("cuts"):
        return Soft(_number(name, field, value.value), value.softness)
    is_list = isinstance(value, list | tuple) and field.metadata.get("per", "model") != "model"
    if is_list or isinstance(value, Layered) or getattr(value, "shape", ()) != ():
        return _layered(name, field, value)
    low, high = field.metadata["low"], field.metadata["high"]
    expected = f"expected {_range(low, high)}" + (" or None" if field.default is None else "")
    real = isinstance(value, NUMBERS) and not isinstance(value, bool)
    if isinstance(value, jax.Array | jax.ShapeDtypeStruct | np.ndarray):
        real = jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating)
    if not real:
        raise LVLMError(f"{name} is {shown(value)}; {expected}")
    abstract = isinstance(value, jax.core.Tracer | jax.ShapeDtypeStruct)
    if not abstract and getattr(value, "is_fully_addressable", True):
        number = value if isinstance(value, int) else float(value)  # an int may be too large for a float
        if not low <= number <= high or abs(number) > LARGEST:
            limit = f" within float32 (up to {LARGEST:.2g})" if abs(number) > LARGEST else ""
            raise LVLMError(f"{name} is {shown(number)}; {expected}{limit}")
    if isinstance(value, jax.Array):
        return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(jnp.float32)
    return value if abstract else np.float32(value)


def _layered(name: str, field: dataclasses.Field, value: Any) -> Layered:
    """Validates values per layer, or per layer and head.

    Raises:
        LVLMError: the strength takes only one number, or a value is not a number in its range.
    """
    low, high, per = (field.metadata.get(key, "model") for key in ("low", "high", "per"))
    expected = f"expected {_range(low, high)}{FORMS[per]}"
    values = value.values if isinstance(value, Layered) else value
    if not isinstance(values, jax.Array | jax.ShapeDtypeStruct):
        try:
            values = np.asarray(values)
        except (TypeError, ValueError) as error:  # rows of different lengths
            raise LVLMError(f"{name} is {shown(values)}; {expected}") from error
    if not (jnp.issubdtype(values.dtype, jnp.integer) or jnp.issubdtype(values.dtype, jnp.floating)):
        raise LVLMError(f"{name} is {shown(value)}; {expected}")
    if values.ndim not in DIMENSIONS[per] or not values.size:
        raise LVLMError(
            f"{name} has shape {values.shape}; {expected}. To try several values, give sweep one method for each, or "
            "build the method inside jax.vmap"
        )
    if isinstance(values, jax.core.Tracer | jax.ShapeDtypeStruct) or not getattr(values, "is_fully_addressable", True):
        return Layered(values)
    host = np.asarray(values, np.float64)
    if not (np.isfinite(host) & (host >= low) & (host <= high) & (abs(host) <= LARGEST)).all():
        raise LVLMError(f"{name} has values from {host.min():g} to {host.max():g}; each must be {_range(low, high)}")
    result = isinstance(values, jax.Array) and jnp.issubdtype(values.dtype, jnp.floating)
    return Layered(values if result else jnp.asarray(host, jnp.float32))


# Finest form that is allowed -> numbers of axes that a strength may have besides 0, and words for these forms.
DIMENSIONS = {"model": (), "layer": (1,), "head": (1, 2)}
FORMS = {"model": "", "layer": ", or one for each layer", "head": ", or one for each layer, or layer and head"}


def _range(low: float, high: float) -> str:
    if np.isinf(low) and np.isinf(high):
        return "a number"
    return f"a number >= {low}" if np.isinf(high) else f"a number in [{low}, {high}]"


def _static(owner: type, name: str, field: dataclasses.Field, value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple):  # the static structure must be hashable, and lists are not
        value = tuple(one.item() if isinstance(one, np.generic) else one for one in value)
    choices = field.metadata["choices"]
    if choices:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise LVLMError(f"{name} is {shown(value)}; expected one of {', '.join(map(repr, choices))}")
        return value
    kinds = _kinds(owner).get(field.name, ())
    if tuple[int, ...] in kinds and int not in kinds and _is(value, int):
        value = (value,)
    if float in kinds and int not in kinds and _is(value, int) and abs(value) < LARGEST:
        value = float(value)
    if kinds and not any(_is(value, kind) for kind in kinds):
        words = [WORDS.get(kind) or getattr(kind, "__name__", str(kind)) for kind in kinds]
        raise LVLMError(f"{name} is {shown(value)}; expected {' or '.join(dict.fromkeys(words))}")
    try:
        hash(value)
    except TypeError as error:
        raise LVLMError(f"{name} is {shown(value)}, not hashable; expected numbers, texts or tuples") from error
    return value


WORDS = {
    types.NoneType: "None",
    bool: "True or False",
    int: "a whole number",
    float: "a number with a decimal point",
    str: "a text",
    tuple[int, ...]: "a tuple of whole numbers",
}


@functools.cache
def _kinds(owner: type) -> dict[str, tuple]:
    """The types that annotations allow, by field; `Any` is left out."""
    try:
        hints = typing.get_type_hints(owner)
    except Exception:  # a quoted name that only type checkers can resolve
        return {}
    unions = (typing.Union, types.UnionType)
    return {
        name: typing.get_args(hint) if typing.get_origin(hint) in unions else (hint,)
        for name, hint in hints.items()
        if hint is not Any
    }


def _is(value: Any, kind: Any) -> bool:
    """Whether a value has a type: a bool is not a number, and numbers are finite and have at most 64 bits."""
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    if kind is float:
        return isinstance(value, float) and bool(np.isfinite(value))
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return isinstance(value, range) or (isinstance(value, tuple) and all(_is(one, inner) for one in value))
    return isinstance(value, kind) if isinstance(kind, type) else True
