"""Kernels that know of one device, as the schedules call them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jattn.call.row_arrays import BackwardRows
from jattn.call.spec import AttentionSpec, Operands
from jattn.transforms.context.parts import Part, context_of, device_index
from jattn.transforms.kernels import Pair

__all__ = ["Backward", "Forward", "Gradients", "added_bias"]


@dataclass(frozen=True)
class Forward:
    """Forward of one device's call."""

    run: Callable[[AttentionSpec, Operands], tuple[Array, Array, Array]]
    unit: float
    takes_halves: Callable[[AttentionSpec], bool]

    @staticmethod
    def of(kernels: Pair, spec: AttentionSpec) -> Forward:
        """Lowered once for all parts that are alike."""
        takes_halves = getattr(kernels, "takes_halves", lambda _: False)
        return Forward(jax.jit(kernels.forward, static_argnums=0), kernels.unit(spec), takes_halves)


class Gradients(NamedTuple):
    """That of query as it is wanted; of key and value, in float32 where they are sums of parts; of
    bias, if that is wanted, in float32.
    """

    query: Array
    key: Array
    value: Array
    bias: Array | None

    @staticmethod
    def zeros(spec: AttentionSpec, operands: Operands, *, wants_bias: bool) -> Gradients:
        """Sums before anything is added to them."""
        query, key, value = (
            jnp.zeros(x.shape, spec.accumulator)
            for x in (operands.query, operands.key, operands.value)
        )
        bias = None
        if wants_bias:
            assert spec.d_bias_shape is not None
            *rest, columns = spec.d_bias_shape
            held = context_of(spec).devices * operands.key.shape[1]
            bias = jnp.zeros((*rest, max(held, columns) if columns > 1 else 1), spec.accumulator)
        return Gradients(query, key, value, bias)


@dataclass(frozen=True)
class Backward:
    """Backward of one device's call.

    The gradient of query is that of the products where the scale's is wanted, and where parts of
    it are added up: there kernels give it in float32.
    """

    run: Callable[..., tuple[Array, ...]]
    wants_bias: bool
    wants_scale: bool

    @staticmethod
    def of(kernels: Pair, *, wants_bias: bool, wants_scale: bool) -> Backward:
        """Lowered once for all parts that are alike."""
        names = ("wants_bias", "wants_scale")
        run = jax.jit(kernels.backward, static_argnums=0, static_argnames=names)
        return Backward(run, wants_bias, wants_scale)

    def of_some_keys(
        self, spec: AttentionSpec, operands: Operands, rows: BackwardRows
    ) -> tuple[Array, ...]:
        """The part's gradients, that of query in float32 and not multiplied by the scale."""
        return self.run(spec, operands, rows, wants_bias=self.wants_bias, wants_scale=True)

    def of_all_keys(
        self, spec: AttentionSpec, operands: Operands, rows: BackwardRows
    ) -> tuple[Array, ...]:
        """Gradients of a part that has all keys, that of query as it is wanted."""
        wants = {"wants_bias": self.wants_bias, "wants_scale": self.wants_scale}
        return self.run(spec, operands, rows, **wants)

    def summed(self, spec: AttentionSpec, operands: Operands, d_query: Array) -> Array:
        """The gradient of query as it is wanted, from the sum of its parts."""
        if self.wants_scale:
            return d_query
        return (d_query * spec.scale_beside(d_query, operands)).astype(spec.dtype)

    def with_bias(self, spec: AttentionSpec, d_bias: Array, part: Part, found: Array) -> Array:
        """The bias's gradient with a part's added where it lies."""
        return added_bias(spec, d_bias, part, found)


def added_bias(spec: AttentionSpec, d_bias: Array, part: Part, found: Array) -> Array:
    """A bias's gradient with a part's added where it lies."""
    row, column = 0, jnp.zeros((), jnp.int32)
    if d_bias.shape[2] > 1:
        row = part.queries.first
    if d_bias.shape[3] > 1:
        column = part.keys.start(device_index(spec))
    at = tuple(jnp.asarray(x, jnp.int32) for x in (0, 0, row, column))
    old = lax.dynamic_slice(d_bias, at, found.shape)
    return lax.dynamic_update_slice(d_bias, old + found.astype(d_bias.dtype), at)
