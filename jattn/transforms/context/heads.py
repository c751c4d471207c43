"""Heads: every device computes all queries and keys of some heads, as one device would.

    kernel                 |  piece 0  |    piece 1      |  piece 2  |
    exchange   |  Q K V 0  |  Q K V 1  |  Q K V 2, O 0   |    O 1    |  O 2  |

Of K key heads device i of n has K / n, in pieces, and the query heads that share them (Jacobs et
al., "DeepSpeed Ulysses", 2023). A piece may have some of the query heads of one key head, and keeps
that from the piece before. An exchange is one transfer, an all-to-all, or of two devices a
permutation of what they do not keep: XLA has one under way at a time, and the kernel of the piece
before runs beside it. What it brings is what the next kernel takes, and what it takes along is what
the last one made, so that none begins too early.

No result is merged or summed over devices: gradients of keys too are whole when they are sent, in
the call's dtype. Whatever the mask, all devices have as much to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jattn.call.context import Context, Layout
from jattn.call.dropout import seeds_from_head
from jattn.call.halves import Halves
from jattn.call.row_arrays import BackwardRows
from jattn.call.spec import AttentionSpec, Operands
from jattn.transforms.context.cuts import Cut, cuts_of
from jattn.transforms.context.kernels import Backward, Forward, Gradients
from jattn.transforms.context.merge import Merged
from jattn.transforms.context.parts import context_of, device_index
from jattn.transforms.context.pieces import put_at
from jattn.transforms.context.plan import Plan
from jattn.transforms.context.words import narrow, wide

__all__ = ["Work", "backward", "exchanged", "forward"]


def forward(kernel: Forward, plan: Plan, spec: AttentionSpec, operands: Operands) -> Merged:
    """The rows' output without sinks, and their numbers."""
    work = Work.of(plan, spec, operands)

    def compute(
        piece: int, rows: list[Array], keys: list[Array]
    ) -> tuple[list[Array], list[Array]]:
        of_piece, own = work.call(piece, *rows, *keys)
        if apart:
            own = own._replace(halves=work.halves(operands, piece))
        out, top, rest = kernel.run(of_piece, own)
        # Two numbers as one array: fewer small kernels between the large ones.
        return [out.astype(spec.dtype), jnp.stack([top, rest], axis=-1)], []

    apart = work.has_halves and all(map(kernel.takes_halves, work.kinds()))
    given = [operands.query], [operands.key, operands.value]
    (out, numbers), _ = work.done(*given, compute, apart=apart)
    return Merged(out, numbers[..., 0], numbers[..., 1])


def backward(
    kernel: Backward, plan: Plan, spec: AttentionSpec, operands: Operands, rows: BackwardRows
) -> Gradients:
    """The gradients of a device's arrays; that of a bias is of its own heads, and else 0."""
    work = Work.of(plan, spec, operands)
    d_bias = Gradients.zeros(spec, operands, wants_bias=kernel.wants_bias).bias

    def compute(
        piece: int, rows: list[Array], keys: list[Array]
    ) -> tuple[list[Array], list[Array]]:
        nonlocal d_bias
        query, *others = rows
        d_query, *of_keys = kernel.of_all_keys(
            *work.call(piece, query, *keys), BackwardRows(*others)
        )
        if d_bias is not None:
            d_bias = work.with_bias(d_bias, piece, of_keys[2])
        return [d_query], of_keys[:2]

    given = [operands.query, *rows], [operands.key, operands.value]
    (query,), (key, value) = work.done(*given, compute)
    return Gradients(query, key, value, d_bias)


class _Results(NamedTuple):
    """Arrays of queries, of keys, and of queries with few numbers a head."""

    rows: list[Array]
    keys: list[Array]
    few: list[Array]

    def like(self, arrays: list[Array]) -> _Results:
        """As many arrays of each kind."""
        ends = list(accumulate(map(len, self)))
        return _Results(*(arrays[end - len(x) : end] for x, end in zip(self, ends, strict=True)))


def _has_few_numbers(x: Array) -> bool:
    """Of each head: such an array takes a small kernel as long as its start does."""
    return math.prod(x.shape[3:]) <= 2


type Compute = Callable[[int, list[Array], list[Array]], tuple[list[Array], list[Array]]]


@dataclass(frozen=True)
class Work:
    """A device's call, and the pieces that it is cut into."""

    context: Context
    spec: AttentionSpec
    operands: Operands
    cuts: tuple[Cut, ...]

    @staticmethod
    def of(plan: Plan, spec: AttentionSpec, operands: Operands) -> Work:
        """In the plan's pieces."""
        context = context_of(spec)
        found: dict[str, Any] = {"sinks": None}
        of = {"query_segments": context.queries, "key_segments": context.keys}
        for name, positions in of.items():
            x = getattr(operands, name)
            if x is not None:
                found[name] = _in_order(context, lax.all_gather(x, context.axes))[:, :positions]
        return Work(
            context=context,
            spec=spec,
            operands=operands._replace(**found),
            cuts=cuts_of(plan.sizes, spec.group),
        )

    def done(
        self, rows: list[Array], keys: list[Array], compute: Compute, *, apart: bool = False
    ) -> tuple[list[Array], list[Array]]:
        """The results (B, t, heads, ...) of a device's own queries, and of its own keys.

        rows, keys: arrays (B, t, heads, ...) of these.
        compute: of a piece's number and both of all positions, (B, T, heads, ...), the results of
          all positions.
        apart: `compute` is given the other device's half of positions, (B, t, heads, ...), alone.
        """
        given, rows, keys = (rows, keys), [*map(wide, rows)], [*map(wide, keys)]
        results = _Results([], [], [])
        held_rows, held_keys = self._come(self._sent(0, rows, keys), [], len(rows), apart)[:2]
        made: list[Array] = []  # by the piece before: of queries, and of keys if they are whole
        sums: list[Array] = []
        few: list[list[Array]] = []  # of each piece, arrays of few numbers: sent with the last
        are_few: list[bool] = []
        found = _Results([], [], [])
        pieces = len(self.cuts)
        for piece in range(pieces + 1):
            # What came is put where it belongs before the next exchange, and not in the end.
            made, rows, keys, found = lax.optimization_barrier((made, rows, keys, found))
            if piece > 0 and not apart:
                # And in order, so that it is not held beside what comes next.
                held_rows, held_keys, made, rows, keys = lax.optimization_barrier(
                    (held_rows, held_keys, made, rows, keys)
                )
            going = self._sent(piece + 1, rows, keys) if piece + 1 < pieces else []
            coming, next_keys, come = self._come(going, made, len(rows) if going else 0, apart)
            if self.context.devices == 2 and made:
                # What stays, before the next kernel: it holds the rest of what the last one made.
                device = device_index(self.spec)
                own = [_row(self._by_home(x), device)[0] for x in made]
                found = self._with(found, results.like(own), piece - 1, device)
                if apart:  # slices of what came, which a kernel reads where no barrier is between
                    found, rows, keys = lax.optimization_barrier((found, rows, keys))
                else:
                    held_rows, held_keys, found = lax.optimization_barrier(
                        (held_rows, held_keys, found)
                    )
                part = results.like([x[0] for x in come])
                found = self._with(found, part, piece - 1, 1 - device)
            elif made:
                for other in range(self.context.devices):
                    part = results.like([x[other] for x in come])
                    found = self._with(found, part, piece - 1, other)
            if piece == pieces:
                done = _Results(*([*map(narrow, *x)] for x in zip(found, results, strict=True)))
                of_rows = [(done.few if is_few else done.rows).pop(0) for is_few in are_few]
                return of_rows, done.keys
            of_rows, of_keys = compute(
                piece, [*map(narrow, held_rows, given[0])], [*map(narrow, held_keys, given[1])]
            )
            sums, whole = self._added(sums, of_keys, piece)
            are_few = [*map(_has_few_numbers, of_rows)]
            few.append([x for x, is_few in zip(of_rows, are_few, strict=True) if is_few])
            is_last = piece + 1 == pieces
            results = _Results(
                [x for x, is_few in zip(of_rows, are_few, strict=True) if not is_few],
                whole,
                [jnp.concatenate(x, axis=2) for x in zip(*few, strict=True)] if is_last else [],
            )
            made = [wide(x) for kind in results for x in kind]
            held_rows, held_keys = coming, next_keys or held_keys
        raise AssertionError

    def _sent(self, piece: int, rows: list[Array], keys: list[Array]) -> list[Array]:
        """What a piece takes, with keys if no piece before had them."""
        cut = self.cuts[piece]
        going = [self._dealt(x, cut.first, cut.heads) for x in rows]
        if cut.brings:
            going += [self._dealt(x, cut.first_kv, cut.kv_heads) for x in keys]
        return going

    def _come(
        self, going: list[Array], made: list[Array], rows: int, apart: bool
    ) -> tuple[list[Array], list[Array], list[Array]]:
        """Queries' and keys' arrays of a piece, whole, and the results that are this device's.

        These from each device, (n, B, t, ...); of two devices from the other, (1, B, t, ...).
        """
        sent = going + [self._by_home(x) for x in made]
        come = exchanged(self.context, sent)
        whole = come[: len(going)]
        if apart:
            halves = [x[0] for x in whole]
            return halves[:rows], halves[rows:], come[len(going) :]
        if self.context.devices == 2:
            device = device_index(self.spec)
            whole = [_beside(device, *x) for x in zip(going, whole, strict=True)]
        queries, keys = self.context.queries, self.context.keys
        of_rows = [_in_order(self.context, x)[:, :queries] for x in whole[:rows]]
        of_keys = [_in_order(self.context, x)[:, :keys] for x in whole[rows:]]
        return of_rows, of_keys, come[len(going) :]

    def _added(
        self, sums: list[Array], found: list[Array], piece: int
    ) -> tuple[list[Array], list[Array]]:
        """Sums over the pieces that share keys, and those that are whole, in the call's dtype."""
        cut = self.cuts[piece]
        if not (cut.brings and cut.ends):
            found = [x.astype(self.spec.accumulator) for x in found]
            found = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
            if not cut.ends:
                return found, []
        return [], [x.astype(self.spec.dtype) for x in found]

    def call(
        self, piece: int, query: Array, key: Array, value: Array
    ) -> tuple[AttentionSpec, Operands]:
        """That of all positions of a piece's heads."""
        spec, first = self.spec, self._first_head(piece)
        found: dict[str, Any] = {"query": query, "key": key, "value": value}
        shapes: dict[str, Any] = {}
        for name in ("bias", "mask"):
            x = getattr(self.operands, name)
            if x is not None:
                x = self.of_heads(x, piece, query.shape[2])
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

    @property
    def has_halves(self) -> bool:
        """Whether there are two devices, and each has half of the positions, in their order."""
        context, spec = self.context, self.spec
        is_whole = (2 * spec.queries, 2 * spec.keys) == (context.queries, context.keys)
        return context.devices == 2 and context.query_layout == "contiguous" and is_whole

    def kinds(self) -> list[AttentionSpec]:
        """The calls of its pieces, as far as their shapes go."""
        found = []
        for heads, kv_heads in dict.fromkeys((cut.heads, cut.kv_heads) for cut in self.cuts):
            shapes: dict[str, Any] = {}
            for name in ("bias", "mask"):
                x = getattr(self.operands, name)
                if x is not None:
                    shapes[f"{name}_shape"] = (x.shape[0], min(x.shape[1], heads), *x.shape[2:])
            found.append(
                replace(
                    self.spec,
                    queries=self.context.queries,
                    keys=self.context.keys,
                    heads=heads,
                    kv_heads=kv_heads,
                    has_sinks=False,
                    context=None,
                    **shapes,
                )
            )
        return found

    def halves(self, operands: Operands, piece: int) -> Halves:
        """A piece's own half of the positions, in the arrays of all heads."""
        cut, n = self.cuts[piece], self.context.devices
        heads = [self.spec.heads // n, cut.first, self.spec.kv_heads // n, cut.first_kv]
        return Halves(
            operands.query,
            operands.key,
            operands.value,
            second=device_index(self.spec).astype(jnp.int32).reshape(1),
            heads=jnp.asarray(heads, jnp.int32),
        )

    def of_heads(self, x: Array, piece: int, count: int) -> Array:
        """Of a bias or mask (b, n, 1, s) a piece's heads, if it does not have one for all."""
        if x.shape[1] == 1:
            return x
        return lax.dynamic_slice_in_dim(x, self._first_head(piece), count, axis=1)

    def with_bias(self, d_bias: Array, piece: int, found: Array) -> Array:
        """The bias's gradient with a piece's added where it lies."""
        first = self._first_head(piece) if d_bias.shape[1] > 1 else 0
        at = tuple(jnp.asarray(x, jnp.int32) for x in (0, first, 0, 0))
        old = lax.dynamic_slice(d_bias, at, found.shape)
        return lax.dynamic_update_slice(d_bias, old + found.astype(d_bias.dtype), at)

    def _first_head(self, piece: int) -> Array:
        """The first query head of this device's piece."""
        own = self.spec.heads // self.context.devices
        return device_index(self.spec) * own + self.cuts[piece].first

    def _dealt(self, x: Array, first: int, count: int) -> Array:
        """Of (B, t, heads, ...) what each device gets, of its heads some: (n, B, t, count, ...)."""
        n = self.context.devices
        b, t, heads, *rest = x.shape
        of_each = x.reshape(b, t, n, heads // n, *rest)
        return jnp.moveaxis(of_each[:, :, :, first : first + count], 2, 0)

    def _by_home(self, x: Array) -> Array:
        """Of (B, T, ...) what is each device's: (n, B, t, ...)."""
        n, layout = self.context.devices, self.context.query_layout
        held = -(-x.shape[1] // n)
        more = n * held - x.shape[1]
        if more:
            x = jnp.pad(x, [(0, more if axis == 1 else 0) for axis in range(x.ndim)])
        return _of_each(layout, n, x)

    def _with(self, found: _Results, part: _Results, piece: int, device: Array | int) -> _Results:
        """Results (B, t, heads, ...) with a device's of a piece, or of all if they are whole."""
        n, cut, found_with = self.context.devices, self.cuts[piece], []
        heads, kv_heads = self.spec.heads, self.spec.kv_heads
        places = (heads, cut.first), (kv_heads, cut.first_kv), (heads, 0)
        for whole, parts, (count, first) in zip(found, part, places, strict=True):
            at = device * (count // n) + first
            before: Sequence[Array | None] = whole or [None] * len(parts)
            # Of keys, and of few numbers, not every piece has any.
            held = zip(before, parts, strict=True) if parts else ()
            found_with.append([put_at(x, y, at, count) for x, y in held] or whole)
        return _Results(*found_with)


def exchanged(context: Context, arrays: Sequence[Array]) -> list[Array]:
    """Arrays (n, ...), row i of each for device i, as arrays of which row i is from device i.

    In one transfer, whatever their dtypes: of words as wide as the narrowest of them. Of two
    devices what either keeps is neither packed nor sent: (1, ...) from the other.
    """
    if not arrays:
        return []
    n, axes = context.devices, context.axes
    word = jnp.dtype(f"uint{8 * min(x.dtype.itemsize for x in arrays)}")
    if n == 2:
        device = lax.axis_index(axes)
        arrays = [_row(x, 1 - device) for x in arrays]
    sent = jnp.concatenate([_as_words(x, word, x.shape[0]) for x in arrays], axis=1)
    if n == 2:
        come: Array = lax.ppermute(sent, axes, [(0, 1), (1, 0)])
    else:
        come = lax.all_to_all(sent, axes, 0, 0, tiled=True)
    return [_from_words(x, part) for x, part in zip(arrays, _parts(arrays, come), strict=True)]


def _row(x: Array, i: Array) -> Array:
    found: Array = lax.dynamic_index_in_dim(x, i, keepdims=True)
    return found


def _beside(device: Array, x: Array, come: Array) -> Array:
    """Of two devices' rows of x the own one, beside what came from the other.

    A window of both, which reads what it takes alone; a choice between them would read both.
    """
    own = _row(x, device)
    found: Array = lax.dynamic_slice_in_dim(jnp.concatenate([own, come, own]), device, 2)
    return found


def _as_words(x: Array, word: jnp.dtype, rows: int) -> Array:
    return lax.bitcast_convert_type(x, word).reshape(rows, -1)


def _parts(arrays: Sequence[Array], words: Array) -> list[Array]:
    """The columns of each array's words."""
    sizes = [math.prod(x.shape[1:]) * x.dtype.itemsize // words.dtype.itemsize for x in arrays]
    ends = list(accumulate(sizes))
    return [words[:, end - size : end] for size, end in zip(sizes, ends, strict=True)]


def _from_words(like: Array, words: Array) -> Array:
    """The array of that shape and dtype."""
    ratio = like.dtype.itemsize // words.dtype.itemsize
    shaped = words.reshape(*like.shape, *((ratio,) if ratio > 1 else ()))
    found: Array = lax.bitcast_convert_type(shaped, like.dtype)
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
