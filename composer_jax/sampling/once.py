"""Work that a loop would repeat, done before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from composer_jax.models.convolution import winograd_kernel

ONCE = (winograd_kernel.__name__,)  # jitted functions of weights alone


def hoisted(function: Callable, *shapes: Any) -> Callable:
    """`function`, for arguments of these shapes, with the calls of `ONCE` in it made here and now.

    XLA takes what is the same in every turn out of a loop, but not out of a branch in it.
    """
    traced, out = jax.make_jaxpr(function, return_shape=True)(*shapes)
    known = dict(zip(traced.jaxpr.constvars, traced.consts, strict=True))
    rest = []
    for equation in traced.jaxpr.eqns:
        if equation.params.get("name") in ONCE and all(v in known for v in equation.invars):
            found = jaxpr_as_fun(equation.params["jaxpr"])(*(known[v] for v in equation.invars))
            known |= zip(equation.outvars, found, strict=True)
        else:
            rest.append(equation)
    left = traced.jaxpr.replace(eqns=rest, constvars=list(known))
    flat = jaxpr_as_fun(ClosedJaxpr(left, list(known.values())))
    return lambda *args: jax.tree.unflatten(jax.tree.structure(out), flat(*jax.tree.leaves(args)))
