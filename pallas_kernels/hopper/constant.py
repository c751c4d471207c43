"""An array known when a call is traced that is no constant of the traced function's own.

A partitioned function may close over none, so the array is the parameter of a primitive.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.extend.core
import numpy as np
from jax import Array, lax
from jax.interpreters import mlir

__all__ = ["constant", "numbers"]


def constant(x: np.ndarray[Any, np.dtype[np.int32]]) -> Array:
    """x, int32, as an array of the program that is being traced."""
    out: Array = _constant_p.bind(data=x.tobytes(), shape=x.shape)
    return out


def numbers(count: int) -> Array:
    """0, 1 and so on, for which nothing runs.

    As a vector XLA knows it, whatever wrote it, and launches a kernel that counts, in every call.
    """
    out: Array = lax.optimization_barrier(constant(np.arange(count, dtype=np.int32)[None]))[0]
    return out


def _value(*, data: bytes, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.frombuffer(data, np.int32).reshape(shape)


_constant_p = jax.extend.core.Primitive("constant")
_constant_p.def_impl(lambda **parameters: jax.device_put(_value(**parameters)))
_constant_p.def_abstract_eval(
    lambda *, data, shape: jax.core.ShapedArray(shape, np.dtype(np.int32))
)
mlir.register_lowering(
    _constant_p, lambda ctx, **parameters: [mlir.ir_constant(_value(**parameters))]
)
