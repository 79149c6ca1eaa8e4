"""A program in floating-point types of twice the size, for what CPUs compute only in wider types than they are given.

XLA's CPU compiler multiplies bfloat16 and float16 as float32: its programs hold a float32 copy of every weight, which
no accelerator does. The same program with bfloat16 made float32, and float32 made float64, has arrays of exactly
twice the size in the same places, and products that the compiler takes as they are. So half of its memory is what the
16-bit program takes where 16-bit products exist. Integers and booleans keep their size; of activations they are little.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

WIDER = {
    np.dtype(jnp.bfloat16): np.dtype(np.float32),
    np.dtype(np.float16): np.dtype(np.float32),
    np.dtype(np.float32): np.dtype(np.float64),
}


def widened(jaxpr: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The same computation on wider numbers. To be lowered and compiled inside `jax.enable_x64(True)`."""
    return core.ClosedJaxpr(_jaxpr(jaxpr.jaxpr), [_value(const) for const in jaxpr.consts])


def shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """An argument of the wider program, in the place of the given one."""
    return jax.ShapeDtypeStruct(leaf.shape, dtype(leaf.dtype), sharding=getattr(leaf, "sharding", None))


def dtype(given: Any) -> Any:
    """The wider type; one that is no floating-point type stays."""
    return WIDER.get(given, given)


def _jaxpr(jaxpr: core.Jaxpr) -> core.Jaxpr:
    renamed: dict[core.Var, core.Var] = {}

    def atom(given: Any) -> Any:
        if isinstance(given, core.Literal):
            return core.Literal(_value(given.val), _aval(given.aval))
        if given not in renamed:
            renamed[given] = type(given)(_aval(given.aval))
        return renamed[given]

    def atoms(given: Any) -> list:
        return [atom(one) for one in given]

    return jaxpr.replace(
        constvars=atoms(jaxpr.constvars),
        invars=atoms(jaxpr.invars),
        eqns=[
            equation.replace(
                invars=atoms(equation.invars),
                outvars=atoms(equation.outvars),
                params={name: _parameter(value) for name, value in equation.params.items()},
            )
            for equation in jaxpr.eqns
        ],
        outvars=atoms(jaxpr.outvars),
    )


def _parameter(value: Any) -> Any:
    """A parameter of an operation: programs inside it and types that it names."""
    if isinstance(value, core.ClosedJaxpr):
        return widened(value)
    if isinstance(value, core.Jaxpr):
        return _jaxpr(value)
    if isinstance(value, np.dtype):
        return dtype(value)
    if type(value) in (tuple, list):
        return type(value)(_parameter(one) for one in value)
    return value


def _aval(given: Any) -> Any:
    return given.update(dtype=dtype(given.dtype)) if getattr(given, "dtype", None) in WIDER else given


def _value(given: Any) -> Any:
    wide = getattr(given, "dtype", None) in WIDER
    return np.asarray(given).astype(WIDER[np.dtype(given.dtype)]) if wide else given
