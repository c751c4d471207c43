"""Any function of attention held to float64, by what the formula makes of it.

`eager` in the dtype of the arrays says how far off a result may be (`tests.tolerance`), and in
float64, in which tests/test_formula.py holds it to NumPy, what is right.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jattn
from tests import reference, tolerance
from tests.backends import quick_jit

__all__ = ["Expected", "check", "compare", "expected"]


class Expected(NamedTuple):
    """What eager gives in float64, and in the arrays' own dtype.

    peer: makes the latter, once; to compile it is most of the time, and few comparisons need it.
    kinds: its shapes and dtypes.
    """

    peer: Callable[[], Any]
    kinds: Any
    exact: Any


def expected(function: Callable[..., Any], *arrays: Any, exact: Any = None) -> Expected:
    """Of function(attention, *arrays), which casts whatever else it uses to the arrays' dtype.

    exact: what is right, if that is known.
    """
    formula = partial(function, jattn.eager_attention)
    if exact is None:
        with jax.enable_x64(True):
            exact = quick_jit(formula)(*jax.tree.map(_wide, arrays))
    return Expected(
        cache(lambda: quick_jit(formula)(*arrays)),
        jax.eval_shape(formula, *arrays),
        jax.tree.map(reference.float64, exact),
    )


def compare(found: Any, right: Expected, *, times: float | None = None) -> None:
    """`found`, a tree of a backend's results, is as exact as eager's.

    Twice its error are arrays named "out" and "lse" allowed, three times all others: gradients; or
    `times`.
    """
    assert jax.tree.structure(found) == jax.tree.structure(right.exact)
    named = jax.tree_util.tree_leaves_with_path(found)
    for i, ((path, got), kind, true) in enumerate(
        zip(named, *map(jax.tree.leaves, (right.kinds, right.exact)), strict=True)
    ):
        assert got.dtype == kind.dtype, path
        name = str(getattr(path[-1], "key", "")) if path else ""
        own = partial(lambda i: jax.tree.leaves(right.peer())[i], i)
        tolerance.check_against_peer(name, got, own, true, np.abs(true), got.dtype, times)


def check(found: Any, function: Callable[..., Any], *arrays: Any) -> None:
    """`found` is function(attention, *arrays) of some attention, as exact as eager's."""
    compare(found, expected(function, *arrays))


def _wide(x: Any) -> Any:
    x = jnp.asarray(x)
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x
