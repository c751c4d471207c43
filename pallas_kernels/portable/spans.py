"""Positions along one axis of a tile of logits, and the place of two; loops over blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.portable.elements import Place
from pallas_kernels.portable.ranges import Sides
from pallas_kernels.portable.triton import Mask, Ref, load

__all__ = ["Span", "keys_down", "queries_down", "span", "visit"]


@dataclass(frozen=True)
class Span:
    """`down` is (n, 1) and `across` (1, n); the others say which exist, None if all do."""

    down: Array
    across: Array
    exists_down: Mask = None
    exists_across: Mask = None


def span(first: Array | int, size: int, limit: Array | int | None = None) -> Span:
    """`size` positions from `first`, of which those below `limit` exist."""
    positions = jnp.arange(size, dtype=jnp.int32)
    down, across = first + positions[:, None], first + positions[None, :]
    if limit is None:
        return Span(down, across)
    return Span(down, across, down < limit, across < limit)


def queries_down(
    batch: Array, head: Array, queries: Span, keys: Span, first_key: Array, *, masked: bool
) -> Place:
    """The place of a tile whose rows are queries and whose columns are keys, from `first_key`."""
    inside = queries.exists_down, keys.exists_across
    return Place(batch, head, queries.down, keys.across, first_key, *inside, masked=masked)


def keys_down(
    batch: Array, head: Array, queries: Span, keys: Span, first_key: Array, *, masked: bool
) -> Place:
    """The same the other way up."""
    inside = queries.exists_across, keys.exists_down
    return Place(batch, head, queries.across, keys.down, first_key, *inside, masked=masked)


class Step[State](Protocol):
    """One block. `masked` says that some element of it may be hidden."""

    def __call__(self, j: Array, state: State, /, *, masked: bool) -> State: ...


def visit[State](
    ranges: Ref, batch: Array, tile: Array, sides: Sides, step: Step[State], state: State
) -> State:
    """Runs `step` over the blocks of a row of a table of ranges."""
    row = batch if ranges.shape[0] > 1 else 0
    first, clear_first, clear_stop, stop = (load(ranges, (row, tile, i)) for i in range(4))

    def run(first: Array, stop: Array, state: State, *, masked: bool) -> State:
        def body(j: Array, state: State) -> State:
            return step(j, state, masked=masked)

        return cast(Callable[..., State], lax.fori_loop)(first, stop, body, state)

    if sides.left:
        state = run(first, clear_first, state, masked=True)
    clear = clear_first if sides.left else first, clear_stop if sides.right else stop
    state = run(*clear, state, masked=False)
    if sides.right:
        state = run(clear_stop, stop, state, masked=True)
    return state
