"""Kernels are traced as ever where JAX folds constants, as in `jax.ensure_compile_time_eval`.

There an operation on known values is done at once. A kernel's iotas, and the number of its program,
would be arrays that it captures, which neither Pallas nor the partitioner takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

# JAX does this itself, wherever it applies a primitive to values; it has no public name for it.
from jax._src import config

__all__ = ["none_folded"]


def none_folded[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """The same function, in whose trace each constant is an operation."""

    @wraps(function)
    def unfolded(*args: P.args, **kwargs: P.kwargs) -> R:
        with config.eager_constant_folding(False):
            return function(*args, **kwargs)

    return unfolded
