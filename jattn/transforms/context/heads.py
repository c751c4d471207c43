"""Heads: every device computes all queries and keys of some heads, as one device would.

    kernel                 |  piece 0  |    piece 1      |  piece 2  |
    exchange   |  Q K V 0  |  Q K V 1  |  Q K V 2, O 0   |    O 1    |  O 2  |

Of K key heads device i of n has K / n, in pieces, and the query heads that share them (Jacobs et
al., "DeepSpeed Ulysses", 2023). An exchange is one all-to-all: XLA has one transfer under way at a
time, and the kernel of the piece before runs beside it. What it brings is what the next kernel
takes, and what it takes along is what the last one made, so that none begins too early.

No result is merged or summed over devices: gradients of keys too are whole where they are made, and
are sent in the call's dtype. Whatever the mask, all devices have as much to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jattn.call.context import Context, Layout
from jattn.call.dropout import seeds_from_head
from jattn.call.spec import AttentionSpec, Operands
from jattn.transforms.context.kernels import Backward, Forward, Gradients, Saved
from jattn.transforms.context.merge import Merged
from jattn.transforms.context.parts import context_of, device_index
from jattn.transforms.context.plan import Plan

__all__ = ["backward", "exchanged", "forward"]


def forward(kernel: Forward, plan: Plan, spec: AttentionSpec, operands: Operands) -> Merged:
    """The rows' output without sinks, and their numbers."""
    work = _Work.of(plan, spec, operands)
    run = jax.jit(kernel.run, static_argnums=0)  # lowered once for all pieces

    def compute(piece: int, held: Sequence[Array]) -> list[Array]:
        query, key, value = work.whole(held)
        out, top, rest = run(*work.call(piece, query, key, value))
        return [out.astype(spec.dtype), top, rest]

    given = [operands.query, operands.key, operands.value]
    return Merged(*work.done(given, compute))


def backward(
    kernel: Backward, plan: Plan, spec: AttentionSpec, operands: Operands, saved: Saved
) -> Gradients:
    """The gradients of a device's arrays; that of a bias is of its own heads, and else 0."""
    work = _Work.of(plan, spec, operands)
    d_bias = Gradients.zeros(spec, operands, wants_bias=kernel.wants_bias).bias
    run = jax.jit(kernel.of_all_keys, static_argnums=0)

    def compute(piece: int, held: Sequence[Array]) -> list[Array]:
        nonlocal d_bias
        query, key, value, *rows = work.whole(held)
        call = work.call(piece, query, key, value)
        d_query, d_key, d_value, *more = run(*call, Saved(*rows))
        if d_bias is not None:
            d_bias = work.with_bias(d_bias, piece, more[0])
        return [d_query, d_key.astype(spec.dtype), d_value.astype(spec.dtype)]

    given = [operands.query, operands.key, operands.value, *saved]
    query, key, value = work.done(given, compute)
    return Gradients(query, key, value, d_bias)


@dataclass(frozen=True)
class _Work:
    """A device's call.

    kv_heads: key heads of a piece.
    """

    context: Context
    spec: AttentionSpec
    operands: Operands
    pieces: int
    kv_heads: int

    @staticmethod
    def of(plan: Plan, spec: AttentionSpec, operands: Operands) -> _Work:
        """In as many pieces as the plan has."""
        context = context_of(spec)
        kv_heads = spec.kv_heads // (context.devices * plan.pieces)
        found: dict[str, Any] = {"sinks": None}
        of = {"query_segments": context.queries, "key_segments": context.keys}
        for name, positions in of.items():
            x = getattr(operands, name)
            if x is not None:
                found[name] = _in_order(context, lax.all_gather(x, context.axes))[:, :positions]
        return _Work(context, spec, operands._replace(**found), plan.pieces, kv_heads)

    def done(
        self, given: list[Array], compute: Callable[[int, Sequence[Array]], list[Array]]
    ) -> list[Array]:
        """The results (B, t, heads, ...) of a device's own positions.

        given: arrays (B, t, heads, ...) of its own positions.
        compute: of the arrays of a piece, (n, B, t, heads, ...) each, the results of all positions
          (B, T, heads, ...).
        """
        held = exchanged(self.context, [self._dealt(x, 0) for x in given])
        made: list[Array] = []
        found: list[Array] = []
        for piece in range(self.pieces + 1):
            # What came is put where it belongs before the next exchange, and not in the end.
            made, given, found = lax.optimization_barrier((made, given, found))
            is_next = piece + 1 < self.pieces
            going = [self._dealt(x, piece + 1) for x in given] if is_next else []
            count = len(going)
            come = exchanged(self.context, going + [self._by_home(x) for x in made])
            if piece < self.pieces:
                made = compute(piece, held)
            if piece > 0:
                found = self._kept(found, come[count:], piece - 1)
            held = come[:count]
        return found

    def call(
        self, piece: int, query: Array, key: Array, value: Array
    ) -> tuple[AttentionSpec, Operands]:
        """That of all positions of a piece's heads."""
        spec, first = self.spec, self._first_head(piece)
        found: dict[str, Any] = {"query": query, "key": key, "value": value}
        shapes: dict[str, Any] = {}
        for name in ("bias", "mask"):
            x = getattr(self.operands, name)
            if x is not None and x.shape[1] > 1:
                x = lax.dynamic_slice_in_dim(x, first, query.shape[2], axis=1)
                found[name], shapes[f"{name}_shape"] = x, x.shape
        seeds = self.operands.dropout_seeds
        if seeds is not None and not spec.broadcast_dropout:
            found["dropout_seeds"] = seeds_from_head(seeds, first)
        of_piece = replace(
            spec,
            queries=self.context.queries,
            keys=self.context.keys,
            heads=query.shape[2],
            kv_heads=key.shape[2],
            has_sinks=False,
            context=None,
            **shapes,
        )
        return of_piece, self.operands._replace(**found)

    def whole(self, held: Sequence[Array]) -> list[Array]:
        """Query, key, value, and what else queries have, of all positions in their order."""
        queries, keys = self.context.queries, self.context.keys
        positions = [queries, keys, keys, *[queries] * (len(held) - 3)]
        every = zip(held, positions, strict=True)
        return [_in_order(self.context, x)[:, :count] for x, count in every]

    def with_bias(self, d_bias: Array, piece: int, found: Array) -> Array:
        """The bias's gradient with a piece's added where it lies."""
        first = self._first_head(piece) if d_bias.shape[1] > 1 else 0
        at = tuple(jnp.asarray(x, jnp.int32) for x in (0, first, 0, 0))
        old = lax.dynamic_slice(d_bias, at, found.shape)
        return lax.dynamic_update_slice(d_bias, old + found.astype(d_bias.dtype), at)

    def _first_head(self, piece: int) -> Array:
        """The first query head of this device's piece."""
        device, group = device_index(self.spec), self.spec.group
        return (device * self.pieces + piece) * (self.kv_heads * group)

    def _dealt(self, x: Array, piece: int) -> Array:
        """Of (B, t, heads, ...) what each device gets for its piece: (n, B, t, heads, ...)."""
        n, p = self.context.devices, self.pieces
        b, t, heads, *rest = x.shape
        cut = x.reshape(b, t, n, p, heads // (n * p), *rest)
        return jnp.moveaxis(cut[:, :, :, piece], 2, 0)

    def _by_home(self, x: Array) -> Array:
        """Of (B, T, ...) what is each device's: (n, B, t, ...)."""
        n, layout = self.context.devices, self.context.query_layout
        held = -(-x.shape[1] // n)
        more = n * held - x.shape[1]
        if more:
            x = jnp.pad(x, [(0, more if axis == 1 else 0) for axis in range(x.ndim)])
        return _of_each(layout, n, x)

    def _kept(self, found: list[Array], come: list[Array], piece: int) -> list[Array]:
        """Results (B, t, heads, ...) with those of a piece, (n, B, t, heads, ...)."""
        if not found:
            of = self.context.devices * self.pieces
            shapes = [(*x.shape[1:3], of * x.shape[3], *x.shape[4:]) for x in come]
            found = [jnp.zeros(s, x.dtype) for s, x in zip(shapes, come, strict=True)]
        for device in range(self.context.devices):
            number = device * self.pieces + piece
            found = [
                lax.dynamic_update_slice_in_dim(x, part[device], number * part.shape[3], axis=2)
                for x, part in zip(found, come, strict=True)
            ]
        return found


def exchanged(context: Context, arrays: Sequence[Array]) -> list[Array]:
    """Arrays (n, ...), row i of each for device i, as arrays of which row i is from device i.

    In one transfer, whatever their dtypes: of words as wide as the narrowest of them.
    """
    if not arrays:
        return []
    n = context.devices
    word = jnp.dtype(f"uint{8 * min(x.dtype.itemsize for x in arrays)}")
    words = [lax.bitcast_convert_type(x, word).reshape(n, -1) for x in arrays]
    come: Array = lax.all_to_all(jnp.concatenate(words, axis=1), context.axes, 0, 0, tiled=True)
    found, at = [], 0
    for x in arrays:
        ratio = x.dtype.itemsize // word.itemsize
        count = math.prod(x.shape[1:]) * ratio
        own = come[:, at : at + count].reshape(*x.shape, *((ratio,) if ratio > 1 else ()))
        found.append(lax.bitcast_convert_type(own, x.dtype))
        at += count
    return found


def _in_order(context: Context, x: Array) -> Array:
    """(n, B, t, ...) of each device's positions as (B, n t, ...) of all."""
    n, b, t, *rest = x.shape
    x = jnp.moveaxis(x, 0, 1)
    if context.query_layout == "zigzag":
        halves = x.reshape(b, n, 2, t // 2, *rest)
        x = jnp.concatenate([halves[:, :, 0], halves[:, ::-1, 1]], axis=1)
    return x.reshape(b, n * t, *rest)


def _of_each(layout: Layout, n: int, x: Array) -> Array:
    """The reverse."""
    b, positions, *rest = x.shape
    if layout == "zigzag":
        parts = x.reshape(b, 2, n, positions // (2 * n), *rest)
        x = jnp.stack([parts[:, 0], parts[:, 1, ::-1]], axis=2)
    return jnp.moveaxis(x.reshape(b, n, positions // n, *rest), 1, 0)
