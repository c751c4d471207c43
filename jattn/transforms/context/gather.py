"""A gather: every device gets all keys and values, some heads of them at a time.

    piece         0          1          2          K, V of piece p + 1 are asked for before the
    kernel        |  K_0  |  K_1  |  K_2  |        kernel of piece p, and none before the kernel
    K, V     |--->|--->|--->|                      of piece p - 1 is done

A kernel sees whole rows, so nothing is merged. In backward keys and values are gathered again, and
their gradients, each device's in float32, are added up and scattered, while the next piece is
computed.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jattn.call.context import Context
from jattn.call.spec import AttentionSpec, Operands
from jattn.transforms.context.kernels import Backward, Forward, Gradients, Saved
from jattn.transforms.context.merge import Merged
from jattn.transforms.context.parts import Keys, Part, context_of, kept_heads
from jattn.transforms.context.plan import Plan, whole_keys
from jattn.transforms.context.runs import Sight, runs, sight

__all__ = ["backward", "forward", "gathered", "of_all_keys", "scattered"]


def forward(kernel: Forward, plan: Plan, spec: AttentionSpec, operands: Operands) -> Merged:
    """The rows' output without sinks, and their numbers."""
    pieces = _pieces(plan, spec)
    segments = _segments(spec, operands)
    coming = _of_piece(spec, operands, pieces[0])
    found: list[Merged] = []
    for number, piece in enumerate(pieces):
        keys, coming = coming | segments, {}
        if number + 1 < len(pieces):
            coming = _of_piece(spec, operands, pieces[number + 1])
        own_spec, own = kept_heads(spec, operands, *piece)
        by_run = [
            Merged(*kernel.run(part.spec(own_spec), part.operands(own_spec, own, keys)))
            for part in of_all_keys(spec)
        ]
        found.append(Merged(*(jnp.concatenate(x, axis=1) for x in zip(*by_run, strict=True))))
        # The piece after the next is asked for only when this one is done.
        coming, found[-1], operands = lax.optimization_barrier((coming, found[-1], operands))
    return Merged(*(jnp.concatenate(x, axis=2) for x in zip(*found, strict=True)))


def backward(
    kernel: Backward, plan: Plan, spec: AttentionSpec, operands: Operands, saved: Saved
) -> Gradients:
    """The gradients, those of query, key and value in float32."""
    context = context_of(spec)
    pieces = _pieces(plan, spec)
    segments = _segments(spec, operands)
    d_bias = Gradients.zeros(spec, operands, wants_bias=kernel.wants_bias).bias
    coming = _of_piece(spec, operands, pieces[0])
    found: list[tuple[Array, Array, Array]] = []
    for number, piece in enumerate(pieces):
        keys, coming = coming | segments, {}
        if number + 1 < len(pieces):
            coming = _of_piece(spec, operands, pieces[number + 1])
        own_spec, own = kept_heads(spec, operands, *piece)
        heads = slice(piece.first * spec.group, (piece.first + piece.heads) * spec.group)
        own_saved = Saved(*(x[:, :, heads] for x in saved))
        d_queries, sums = [], None
        for part in of_all_keys(spec):
            d_query, *d_keys = kernel.run(
                part.spec(own_spec),
                part.operands(own_spec, own, keys),
                own_saved.of(part.queries),
            )
            d_queries.append(d_query)
            added = [x.astype(spec.accumulator) for x in d_keys[:2]]
            sums = added if sums is None else [a + b for a, b in zip(sums, added, strict=True)]
            if d_bias is not None:
                own_heads = heads if d_bias.shape[1] > 1 else slice(None)
                more = kernel.with_bias(spec, d_bias[:, own_heads], part, d_keys[2])
                d_bias = d_bias.at[:, own_heads].set(more)
        assert sums is not None
        d_query = jnp.concatenate(d_queries, axis=1)
        coming, d_query, sums, operands = lax.optimization_barrier(
            (coming, d_query, sums, operands)
        )
        d_key, d_value = (scattered(context, x) for x in sums)
        found.append((d_query, d_key, d_value))
    query, key, value = (jnp.concatenate(x, axis=2) for x in zip(*found, strict=True))
    return Gradients(query, key, value, d_bias)


class _Piece(NamedTuple):
    """Some key heads."""

    first: int
    heads: int


def _pieces(plan: Plan, spec: AttentionSpec) -> list[_Piece]:
    count = spec.kv_heads // plan.pieces
    return [_Piece(first, count) for first in range(0, spec.kv_heads, count)]


def of_all_keys(spec: AttentionSpec) -> list[Part]:
    """Each run of queries, with all keys; whatever they see of these, they get a result."""
    context = context_of(spec)
    keys = whole_keys(context, spec)
    found = []
    for queries in runs(context.query_layout, context.devices, spec.queries):
        seen = sight(spec, queries, keys)
        found.append(Part(queries, keys, seen or Sight(spec.band, needs_start=True)))
    return found


def _of_piece(spec: AttentionSpec, operands: Operands, piece: _Piece) -> Keys:
    heads = slice(piece.first, piece.first + piece.heads)
    own = {"key": operands.key[:, :, heads], "value": operands.value[:, :, heads]}
    return {name: gathered(context_of(spec), x) for name, x in own.items()}


def _segments(spec: AttentionSpec, operands: Operands) -> Keys:
    ids = operands.key_segments
    return {} if ids is None else {"key_segments": gathered(context_of(spec), ids)}


def gathered(context: Context, x: Array) -> Array:
    """What all devices have of (B, S, ...), in the order of positions."""
    if context.has_whole_keys:
        return x
    found: Array = lax.all_gather(x, context.axes, axis=1, tiled=True)
    if context.key_layout == "zigzag":
        halves = jnp.split(found, 2 * context.devices, axis=1)
        found = jnp.concatenate(halves[::2] + halves[::-2], axis=1)
    return found


def scattered(context: Context, x: Array) -> Array:
    """The sum over all devices of a device's own positions of (B, S, ...)."""
    if context.has_whole_keys:
        return x
    if context.key_layout == "zigzag":
        parts = jnp.split(x, 2 * context.devices, axis=1)
        both = zip(parts[: context.devices], parts[: context.devices - 1 : -1], strict=True)
        x = jnp.concatenate([part for pair in both for part in pair], axis=1)
    summed: Array = lax.psum_scatter(x, context.axes, scatter_dimension=1, tiled=True)
    return summed
