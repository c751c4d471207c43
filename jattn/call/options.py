"""Options of a call as one value that compares, hashes and pickles: for what holds them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np

from jattn.call.arguments import attention_call

__all__ = ["Options", "frozen", "thawed"]

type Options = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, eq=False)
class _ByValue:
    """An array that equals one of the same dtype, shape and elements; a traced one only itself."""

    array: jax.Array | np.ndarray[Any, Any]

    @cached_property
    def _key(self) -> object:
        # What other processes hold a part of cannot be read here.
        if isinstance(self.array, jax.core.Tracer) or not getattr(
            self.array, "is_fully_addressable", True
        ):
            return id(self.array)
        x = np.asarray(self.array)
        return x.dtype.name, x.shape, x.tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByValue) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> tuple[Any, ...]:
        return _ByValue, (self.array,)


def frozen(options: Mapping[str, Any]) -> Options:
    """The options that are not the default, in one form and order.

    NumPy's arrays are copied, as they can change; JAX's stay where they are.
    """
    defaults = inspect.signature(attention_call).parameters
    plain = {name: _plain(x) for name, x in sorted(options.items())}
    return tuple(
        (name, x)
        for name, x in plain.items()
        if isinstance(x, _ByValue) or x != defaults[name].default
    )


def thawed(options: Options) -> dict[str, Any]:
    """The same as keyword arguments."""
    return {name: _given(x) for name, x in options}


def _plain(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return tuple(map(_plain, x))
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, np.ndarray):
        return _ByValue(x.copy())
    return _ByValue(x) if isinstance(x, jax.Array) else x


def _given(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(_given, x))
    return x.array if isinstance(x, _ByValue) else x
