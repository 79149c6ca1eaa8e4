"""A program in floating-point types of twice the size, to measure 16-bit programs on CPUs.

XLA's CPU compiler multiplies bfloat16 and float16 as float32, so its programs contain a float32 copy of every weight,
which no accelerator makes. If bfloat16 becomes float32, and float32 becomes float64, the program has arrays of exactly
twice the size in the same places, and the compiler needs no copies. So the 16-bit program takes half of its memory
on hardware with 16-bit products. Integers and booleans keep their size; they are a small part of activations.
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
    np.dtype(np.uint16): np.dtype(np.uint32),  # the bits of 16-bit numbers, as CPUs read and write them
}


def widened(jaxpr: core.ClosedJaxpr) -> core.ClosedJaxpr:
    """The same computation on wider numbers. Lower and compile it inside `jax.enable_x64(True)`."""
    return core.ClosedJaxpr(_jaxpr(jaxpr.jaxpr), [_value(const) for const in jaxpr.consts])


def shape(leaf: Any) -> jax.ShapeDtypeStruct:
    """An argument of the wider program."""
    return jax.ShapeDtypeStruct(leaf.shape, dtype(leaf.dtype), sharding=getattr(leaf, "sharding", None))


def dtype(narrow: Any) -> Any:
    """The wider type; types that are not floating-point stay."""
    return WIDER.get(narrow, narrow)


def _jaxpr(jaxpr: core.Jaxpr) -> core.Jaxpr:
    renamed: dict[core.Var, core.Var] = {}

    def atom(variable: Any) -> Any:
        if isinstance(variable, core.Literal):
            return core.Literal(_value(variable.val), _aval(variable.aval))
        if variable not in renamed:
            renamed[variable] = type(variable)(_aval(variable.aval))
        return renamed[variable]

    def atoms(variables: Any) -> list:
        return [atom(one) for one in variables]

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
    """Widens a parameter of an operation: programs inside it, and types."""
    if isinstance(value, core.ClosedJaxpr):
        return widened(value)
    if isinstance(value, core.Jaxpr):
        return _jaxpr(value)
    if isinstance(value, np.dtype):
        return dtype(value)
    if type(value) in (tuple, list):
        return type(value)(_parameter(one) for one in value)
    return value


def _aval(aval: Any) -> Any:
    return aval.update(dtype=dtype(aval.dtype)) if getattr(aval, "dtype", None) in WIDER else aval


def _value(value: Any) -> Any:
    wide = getattr(value, "dtype", None) in WIDER
    return np.asarray(value).astype(WIDER[np.dtype(value.dtype)]) if wide else value
