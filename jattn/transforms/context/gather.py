"""A gather: every device gets all keys and values, some heads of them at a time.

    piece         0             1             2        K of piece p + 1 is asked for before the
    kernels       | A_0 | B_0 | | A_1 | B_1 | |        first kernel of piece p, V after it, and
    K, V      |-->|-K_1-|-V_1-| |-K_2-|-V_2-| |        neither before piece p is there

XLA has one transfer under way at a time, and for each wants a kernel to run beside it. Queries that
are dealt out (`deal`) are two runs, each with a kernel (A, B).

A kernel sees whole rows, so nothing is merged. In backward keys and values are gathered again;
their gradients are parts, of which each device gets those of its own keys from all others, one
device after another, and adds them up in float32, while the next piece is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jattn.call.context import Context
from jattn.call.row_arrays import BackwardRows
from jattn.call.spec import AttentionSpec, Operands
from jattn.transforms.context.deal import Deal
from jattn.transforms.context.kernels import Backward, Forward, Gradients
from jattn.transforms.context.merge import Merged
from jattn.transforms.context.parts import Keys, Part, context_of, kept_heads
from jattn.transforms.context.pieces import put
from jattn.transforms.context.plan import Plan, whole_keys
from jattn.transforms.context.runs import Run, Sight, runs, sight

__all__ = ["backward", "forward", "gathered", "of_all_keys", "scattered"]


def forward(kernel: Forward, plan: Plan, spec: AttentionSpec, operands: Operands) -> Merged:
    """The rows' output without sinks, and their numbers."""
    work = _Work.of(plan, spec, operands)
    results = _Results(plan.pieces)

    def compute(held: _Held, between: Callable[[Any], Any]) -> Any:
        def run(part: Part, rows: _Rows) -> tuple[Array, ...]:
            own = rows.operands(held.operands)
            return kernel.run(part.spec(held.spec), part.operands(held.spec, own, held.keys))

        by_run = results.kept(work.each(held, run, between, results.sent))
        out, *numbers = ([x[i] for x in by_run] for i in range(3))
        results.sent.append([work.deal.joined(out), *work.deal.joined_alike(numbers)])
        return by_run, results.whole

    work.done(operands, (), compute)
    results.kept([])
    return Merged(*results.whole)


def backward(
    kernel: Backward, plan: Plan, spec: AttentionSpec, operands: Operands, rows: BackwardRows
) -> Gradients:
    """The gradients of a device's arrays."""
    context = context_of(spec)
    work = _Work.of(plan, spec, operands)
    d_bias = Gradients.zeros(spec, operands, wants_bias=kernel.wants_bias).bias
    results = _Results(plan.pieces)

    def compute(held: _Held, between: Callable[[Any], Any]) -> Any:
        def run(part: Part, rows: _Rows) -> tuple[Array, ...]:
            own = part.operands(held.spec, rows.operands(held.operands), held.keys)
            return kernel.of_all_keys(part.spec(held.spec), own, BackwardRows(*rows.saved))

        by_run = results.kept(work.each(held, run, between, results.sent))
        nonlocal d_bias
        if d_bias is not None:
            own = held.heads if d_bias.shape[1] > 1 else slice(None)
            for part, (*_, more) in zip(work.parts, by_run, strict=True):
                sums = kernel.with_bias(spec, d_bias[:, own], part, more)
                d_bias = d_bias.at[:, own].set(sums)
        d_query, *of_keys = ([x[i] for x in by_run] for i in range(3))
        terms = [[x.astype(spec.accumulator) for x in xs] for xs in of_keys]
        own_keys = [x.astype(spec.dtype) for x in scattered(context, terms)]
        results.sent.append([work.deal.joined(d_query), *own_keys])
        return by_run, results.whole

    work.done(operands, rows, compute)
    results.kept([])
    query, key, value = results.whole
    return Gradients(query, key, value, d_bias)


@dataclass
class _Results:
    """Of a call: those of the pieces that are home, and on their way those of the last."""

    pieces: int
    whole: list[Array] = field(default_factory=list)
    sent: list[list[Array]] = field(default_factory=list)
    _home: int = 0

    def kept[T](self, made: T) -> T:
        """Puts what was sent where it belongs, before what is made after it is sent."""
        if self.sent:
            self.whole = put(self.whole, self.sent.pop(), self._home, self.pieces)
            self._home += 1
            made, self.whole = lax.optimization_barrier((made, self.whole))
        return made


class _Rows(NamedTuple):
    """What one run of queries has: those of some heads, and what backward takes of each."""

    query: Array
    segments: Array | None
    saved: tuple[Array, ...]

    def operands(self, others: Operands) -> Operands:
        """A call's arrays, with these queries."""
        return others._replace(query=self.query, query_segments=self.segments)


class _Held(NamedTuple):
    """One piece of a call: some key heads and the query heads that share them."""

    spec: AttentionSpec
    heads: slice  # of the query heads
    operands: Operands
    rows: list[_Rows]
    keys: Keys


@dataclass(frozen=True)
class _Work:
    """A call as pieces, and the runs of queries of each."""

    spec: AttentionSpec
    deal: Deal
    parts: tuple[Part, ...]  # a run of queries each, with all keys
    pieces: tuple[int, ...]  # the first key head of each
    kv_heads: int  # of a piece
    query_segments: list[Array | None]
    key_segments: Keys

    @staticmethod
    def of(plan: Plan, spec: AttentionSpec, operands: Operands) -> _Work:
        """Of a device's call."""
        deal, context = Deal.of(spec, is_even=plan.is_balanced), context_of(spec)
        count = spec.kv_heads // plan.pieces
        ids = operands.query_segments
        rows: list[Array | None] = [None] * len(deal.runs)
        if ids is not None:
            rows = [*deal.cut(ids)]
        keys: Keys = {}
        if operands.key_segments is not None:
            keys["key_segments"] = gathered(context, operands.key_segments)
        return _Work(
            spec=spec,
            deal=deal,
            parts=of_all_keys(spec, deal.runs),
            pieces=tuple(range(0, spec.kv_heads, count)),
            kv_heads=count,
            query_segments=rows,
            key_segments=keys,
        )

    def done(
        self,
        operands: Operands,
        saved: tuple[Array, ...],
        compute: Callable[[_Held, Callable[[Any], Any]], Any],
    ) -> None:
        """Computes all pieces, and asks for what the next one needs meanwhile.

        compute: of a piece that is there; its second argument takes what is computed, and what
          is to be, and gives it back when values may be asked for. Its result is what the piece
          after the next waits for, so that no more than two are held.
        """
        held = self._asked(0, (operands, saved))
        held.keys["value"] = self._values(0, operands.value)
        for number in range(len(self.pieces)):
            if number + 1 == len(self.pieces):
                compute(held, lax.optimization_barrier)
                return
            # Nothing is asked for before this piece is there.
            own = held.operands, held.rows, held.keys
            own, operands, saved = lax.optimization_barrier((own, operands, saved))
            held = _Held(held.spec, held.heads, *own)
            coming = self._asked(number + 1, (operands, saved))

            def between[T](
                tree: T, number: int = number, coming: _Held = coming, value: Array = operands.value
            ) -> T:
                # Values are asked for when all else of the next piece is there.
                given = tree, coming.rows, coming.keys, value
                tree, coming.rows[:], keys, value = lax.optimization_barrier(given)
                coming.keys.update(keys, value=self._values(number + 1, value))
                return tree

            finished = compute(held, between)
            if "value" not in coming.keys:
                coming.keys["value"] = self._values(number + 1, operands.value)
            _, operands, saved = lax.optimization_barrier((finished, operands, saved))
            held = coming

    def each(
        self,
        held: _Held,
        run: Callable[[Part, _Rows], tuple[Array, ...]],
        between: Callable[[Any], Any],
        sent: list[Any],
    ) -> list[tuple[Array, ...]]:
        """Each run's results, `between` having its way with what is there after the first of two.

        None is sent before all are there: another transfer is under way till then. What was sent
        of the piece before, the last of `sent`, is home before the second.
        """
        found: list[tuple[Array, ...]] = []
        for part, rows in zip(self.parts, held.rows, strict=True):
            if len(found) == 1:
                found[0], rows, sent[-1:] = between((found[0], rows, sent[-1:]))
            found.append(run(part, rows))
        gated: list[tuple[Array, ...]] = lax.optimization_barrier(found)
        return gated

    def _asked(self, number: int, arrays: tuple[Operands, tuple[Array, ...]]) -> _Held:
        """A piece without its values."""
        operands, saved = arrays
        first = self.pieces[number]
        spec, own = kept_heads(self.spec, operands, first, self.kv_heads)
        heads = slice(first * self.spec.group, (first + self.kv_heads) * self.spec.group)
        query = self.deal.cut(own.query)
        by_run: list[tuple[Array, ...]] = [()] * len(query)
        if saved:
            of_heads = [x[:, :, heads] for x in saved]
            alike = [x for x in of_heads if x.ndim == 3]
            numbers = iter(self.deal.cut_alike(alike))
            cut = [next(numbers) if x.ndim == 3 else self.deal.cut(x) for x in of_heads]
            by_run = list(zip(*cut, strict=True))
        rows = [_Rows(*each) for each in zip(query, self.query_segments, by_run, strict=True)]
        own_keys = operands.key[:, :, first : first + self.kv_heads]
        # The larger transfer is the last, for the kernel to run beside it.
        rows, own_keys = lax.optimization_barrier((rows, own_keys))
        keys = self.key_segments | {"key": gathered(context_of(self.spec), own_keys)}
        return _Held(spec, heads, own, rows, keys)

    def _values(self, number: int, value: Array) -> Array:
        first = self.pieces[number]
        own = value[:, :, first : first + self.kv_heads]
        return gathered(context_of(self.spec), own)


def of_all_keys(spec: AttentionSpec, of: Sequence[Run] | None = None) -> tuple[Part, ...]:
    """Runs of queries, else a device's own, with all keys; each gets a result, whatever it sees."""
    context = context_of(spec)
    keys = whole_keys(context, spec)
    found = []
    for queries in of or runs(context.query_layout, context.devices, spec.queries):
        seen = sight(spec, queries, keys)
        found.append(Part(queries, keys, seen or Sight(spec.band, needs_start=True)))
    return tuple(found)


def gathered(context: Context, x: Array) -> Array:
    """What all devices have of (B, S, ...), in the order of positions."""
    if context.has_whole_keys:
        return x
    found: Array = lax.all_gather(x, context.axes, axis=1, tiled=True)
    if context.key_layout == "zigzag":
        halves = jnp.split(found, 2 * context.devices, axis=1)
        found = jnp.concatenate(halves[::2] + halves[::-2], axis=1)
    return found


def scattered(context: Context, sums: Sequence[Sequence[Array]]) -> list[Array]:
    """Of arrays of all keys (B, S, ...) a device's own positions, summed over all devices.

    sums: of each array the terms that a device has. Terms are added up where they are needed: what
    others get is never whole, nor what a device keeps.
    """
    if context.has_whole_keys:
        return [_total(terms) for terms in sums]
    n, device = context.devices, lax.axis_index(context.axes)

    def part(places: int) -> list[Array]:
        home = lax.rem(device + places, jnp.int32(n))
        return [_total([_held_by(context, home, x) for x in terms]) for terms in sums]

    found = part(0)
    for places in range(1, n):
        way = [(i, (i + places) % n) for i in range(n)]
        sent = part(places)
        if len({x.shape for x in sent}) == 1:
            come = list(lax.ppermute(jnp.stack(sent), context.axes, way))
        else:
            come = [lax.ppermute(x, context.axes, way) for x in sent]
        found = [a + b for a, b in zip(found, come, strict=True)]
    return found


def _total(terms: Sequence[Array]) -> Array:
    first, *others = terms
    for x in others:
        first = first + x
    return first


def _held_by(context: Context, device: Array, x: Array) -> Array:
    """A device's positions of all keys' (B, S, ...)."""
    n = context.devices
    if context.key_layout == "contiguous":
        count = x.shape[1] // n
        return lax.dynamic_slice_in_dim(x, device * count, count, axis=1)
    half = x.shape[1] // (2 * n)
    homes = device, jnp.int32(2 * n - 1) - device
    return jnp.concatenate(
        [lax.dynamic_slice_in_dim(x, i * half, half, axis=1) for i in homes], axis=1
    )
