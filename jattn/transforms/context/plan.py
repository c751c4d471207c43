"""What a call over several devices does: its schedule, its hops, and the bytes that each moves.

ring      hop h: own queries against the keys of the device h places before; hops in which no
          device's queries see a key are not made
gather    piece p: own queries of some heads against all keys of these heads
heads     piece p: all queries of some of a device's heads against all keys of these
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from jattn.call.band import Band
from jattn.call.context import Context, Schedule, not_dealt
from jattn.call.sizes import is_known
from jattn.call.spec import AttentionSpec
from jattn.call.units import in_bytes
from jattn.transforms.context.parts import Part, context_of
from jattn.transforms.context.runs import Run, runs, sight

__all__ = ["Hop", "Plan", "balances", "plan_of"]

# Queries times heads of a kernel: two tiles of 128 for nearly each of an H100's multiprocessors.
LEAST_ROWS = 1 << 15


@dataclass(frozen=True)
class Hop:
    """Keys of the device that many places before, and the parts that see something of them."""

    distance: int
    parts: tuple[tuple[int, int, Part], ...]  # number of the run of queries, of keys, and the part


@dataclass(frozen=True)
class Plan:
    """How a call is done.

    is_balanced: a causal mask's queries are exchanged before, and results after, so that each
      device has as much to do.
    pieces: into how many those of a gather or a ring are cut.
    sizes: by heads, how many query heads each piece of a device's has.
    """

    context: Context
    schedule: Schedule
    is_balanced: bool
    pieces: int
    sizes: tuple[int, ...]
    hops: tuple[Hop, ...]
    why: str
    kv_bytes: int  # of a device's own keys and values
    sum_bytes: int  # of their gradients in float32
    query_bytes: int  # of its queries
    out_bytes: int  # of their output

    @property
    def moves(self) -> int:
        """How often keys and values are sent."""
        if self.schedule in ("gather", "heads"):
            return self.pieces if self.schedule == "gather" else len(self.sizes)
        return sum(hop.distance != 0 for hop in self.hops)

    def bytes_a_move(self) -> tuple[int, int]:
        """What a device sends each time, or at most, forward and backward."""
        if self.schedule == "ring":
            return self.kv_bytes, self.kv_bytes + self.sum_bytes
        if self.schedule == "heads":
            n, once = self.context.devices, self.kv_bytes + self.query_bytes
            both = once + self.out_bytes, 2 * once + self.out_bytes
            most, heads = max(self.sizes), sum(self.sizes)
            forward, backward = (x * (n - 1) * most // (n * heads) for x in both)
            return forward, backward
        times = 0 if self.context.has_whole_keys else self.context.devices - 1
        forward, sums = (n * times // self.pieces for n in (self.kv_bytes, self.sum_bytes))
        return forward, forward + sums

    def bytes_home(self) -> int:
        """What a ring sends at the end of backward: sums that went along begin at the first hop.

        Where that is of a device's own keys they go one way more than the keys do.
        """
        is_own_first = bool(self.hops) and self.hops[0].distance == 0
        return self.sum_bytes if self.schedule == "ring" and self.moves and is_own_first else 0

    def bytes_exchanged(self) -> tuple[int, int]:
        """What a device sends to balance a causal mask, forward and backward.

        Queries and output, and in backward the gradients of both; in a ring keys, values and their
        gradients too. Of two devices each keeps one half.
        """
        if not self.is_balanced:
            return 0, 0
        keys = self.kv_bytes if self.schedule == "ring" else 0
        rows = self.query_bytes + self.out_bytes
        halves = 1 if self.context.devices == 2 else 2
        return (rows + keys) * halves // 2, (rows + self.query_bytes + 2 * keys) * halves // 2

    def describe(self) -> str:
        """In words."""
        context = self.context
        kind = {"ring": "hop", "gather": "piece", "heads": "piece"}[self.schedule]
        forward, backward = map(in_bytes, self.bytes_a_move())
        moved = f"{self.moves} {kind}{'' if self.moves == 1 else 's'}"
        if context.has_whole_keys:
            moved += ", keys not sent"
        elif self.moves:
            is_even = self.schedule != "heads" or min(self.sizes) == max(self.sizes)
            moved += f" of {'' if is_even else 'at most '}{forward}, in backward {backward}"
            moved += f" and {in_bytes(home)} home" if (home := self.bytes_home()) else ""
            if self.schedule == "ring" and self.pieces > 1:
                moved += f", by {self.pieces} pieces of the heads"
        if self.is_balanced:
            forward, backward = map(in_bytes, self.bytes_exchanged())
            arrays = "queries and keys" if self.schedule == "ring" else "queries"
            moved += f"; {arrays} are exchanged, so that all see as many keys, and results go back:"
            moved += f" {forward}, in backward {backward}"
        return (
            f"cut over {context.devices} devices along {context.name}: {self.schedule}, {moved}; "
            f"{self.why}"
        )


def plan_of(spec: AttentionSpec) -> Plan:
    """The plan of what one device holds of a call."""
    context = context_of(spec)
    hops = ring_hops(spec, context)
    dealt, pieces = _pieces_of_heads(spec, context), _pieces(spec, context)
    reached = sum(hop.distance != 0 for hop in hops)
    schedule: Schedule
    if context.has_whole_keys:
        schedule, why = "gather", "every device has all keys"
    elif context.schedule is not None:
        schedule, why = context.schedule, "asked for"
    elif reached < context.devices - 1:
        schedule = "ring"
        why = f"the band leaves {reached} of {context.devices - 1} hops"
    elif not is_known(spec.batch, spec.queries, spec.keys):
        schedule, why = "ring", "sizes left free"
    elif dealt is not None:
        schedule, why = "heads", "each device computes its heads, as one alone would"
    elif pieces is not None:
        schedule = "gather"
        why = "the keys of two pieces take no more memory than a ring's buffers"
    else:
        schedule, why = "ring", "keys of all devices would take more memory than a ring's buffers"
    is_balanced = balances(spec, schedule)
    if is_balanced and schedule == "ring":
        hops = ring_hops(spec, replace(context, query_layout="zigzag", key_layout="zigzag"))
    sizes = _Sizes.of(spec)
    found = {
        "heads": dealt or 1,
        "gather": pieces or _most_pieces(spec),
        "ring": _pieces_of_ring(spec),
    }
    return Plan(
        context=context,
        schedule=schedule,
        is_balanced=is_balanced,
        pieces=found[schedule],
        sizes=_sizes_of_heads(spec, context, dealt or 1) if schedule == "heads" else (),
        hops=hops,
        why=why,
        kv_bytes=sizes.keys * spec.element_bytes,
        sum_bytes=sizes.keys * spec.accumulator.itemsize,
        query_bytes=sizes.queries * spec.element_bytes,
        out_bytes=sizes.out * spec.element_bytes,
    )


class _Sizes(NamedTuple):
    """Numbers in a device's keys and values, its queries, and their output."""

    keys: int
    queries: int
    out: int

    @staticmethod
    def of(spec: AttentionSpec) -> _Sizes:
        """Of a device's call."""
        rows = spec.batch * spec.queries * spec.heads
        keys = spec.batch * spec.keys * spec.kv_heads * (spec.head_dim + spec.value_dim)
        return _Sizes(keys, rows * spec.head_dim, rows * spec.value_dim)

    def ring_bytes(self, spec: AttentionSpec) -> int:
        """What a ring holds: two devices' keys and values, and a hop's output beside the sums."""
        held = (2 * self.keys + self.out) * spec.element_bytes
        return held + self.out * spec.accumulator.itemsize


def ring_hops(spec: AttentionSpec, context: Context) -> tuple[Hop, ...]:
    """The hops in which some device's queries see a key."""
    queries = runs(context.query_layout, context.devices, spec.queries)
    keys = runs(context.key_layout, context.devices, spec.keys)
    found = []
    for distance in range(context.devices):
        parts = []
        for j, of_keys in enumerate(keys):
            sent = replace(of_keys, sent=distance)
            for i, of_queries in enumerate(queries):
                seen = sight(spec, of_queries, sent)
                if seen is not None:
                    parts.append((i, j, Part(of_queries, sent, seen)))
        if parts:
            found.append(Hop(distance, tuple(parts)))
    return tuple(found)


def whole_keys(context: Context, spec: AttentionSpec) -> Run:
    """All keys, on every device."""
    count = spec.keys if context.has_whole_keys else spec.keys * context.devices
    return Run(0, count, context.devices)


def balances(spec: AttentionSpec, schedule: Schedule) -> bool:
    """Whether the causal mask's work is made even by an exchange of queries.

    Not where each device's queries see as many keys as they are, or where rows of a bias or mask,
    each as long as all keys, would have to be exchanged too.
    """
    context, band = context_of(spec), spec.band
    if schedule == "heads":
        return False
    rows = [shape[2] for shape in (spec.bias_shape, spec.mask_shape) if shape is not None]
    is_even = spec.queries % 2 == 0 and (schedule == "gather" or spec.keys % 2 == 0)
    is_full = spec.queries * context.devices == context.queries
    is_full = is_full and (context.has_whole_keys or spec.keys * context.devices == context.keys)
    return (
        context.query_layout == "contiguous"
        and band != Band()
        and (band.lower is None) != (band.upper is None)
        and is_even
        and is_full
        and not spec.has_query_offset
        and all(size == 1 for size in rows)
    )


def _pieces_of_heads(spec: AttentionSpec, context: Context) -> int | None:
    """The fewest pieces of a device's heads that hold no more than a hop's keys and values.

    Or, if all hold more, the most of them, unless these hold more than a ring does: then None. Held
    of a piece is what is computed, what is sent of the next, and what comes; of two devices half of
    these, beside results of which the other half is on its way. A single piece is whole on its way
    before it is computed. One of few rows would leave multiprocessors without work.
    """
    if not_dealt(context, spec.queries, spec.kv_heads, (spec.bias_shape, spec.mask_shape)):
        return None
    sizes = _Sizes.of(spec)
    if not is_known(*sizes):
        return None
    own, group = spec.heads // context.devices, spec.group
    pieces, held = 1, 2 * (sizes.keys + sizes.queries)
    halves = 5 if context.devices == 2 else 6
    for more in _divisors(own)[1:]:
        heads = own // more
        if spec.batch * heads * context.queries < LEAST_ROWS:
            break
        if heads % group and group % heads:
            continue
        shared = max(heads, group) * sizes.keys // own
        pieces, held = more, halves * ((sizes.queries + sizes.out) // more + shared) // 2
        if held <= sizes.keys:
            break
    return pieces if held * spec.element_bytes <= sizes.ring_bytes(spec) else None


def _sizes_of_heads(spec: AttentionSpec, context: Context, pieces: int) -> tuple[int, ...]:
    """How many of a device's query heads each piece has, where so many equal ones were found.

    With segments a kernel of few heads is short, and ends with its longest segment's tiles. Of two
    devices, which hold half of a piece twice, those between the first and the last are joined by
    twos: half as many ends, and no more that nothing runs beside when it comes or goes.
    """
    one = spec.heads // (context.devices * pieces)
    if not spec.has_segments or context.devices != 2 or one % spec.group or pieces < 4:
        return (one,) * pieces
    twos, left = divmod(pieces - 2, 2)
    return (one, *(2 * one,) * twos, *(one,) * (left + 1))


def _pieces(spec: AttentionSpec, context: Context) -> int | None:
    """The fewest pieces of a gather that hold no more than a hop's keys and values.

    Or the most of them that leave a kernel enough rows, or keys no more memory than a ring has.
    None if they take more in as many pieces as there are. All devices' keys and values of two
    pieces are held, and what is exchanged of queries and output.
    """
    sizes = _Sizes.of(spec)
    if not is_known(*sizes):
        return None
    rows, found, is_little = spec.batch * spec.heads * spec.queries // 2, 1, False
    for pieces in _possible_pieces(spec):
        if is_little and rows // pieces < LEAST_ROWS:
            break
        of_keys = 2 * context.devices * sizes.keys // pieces
        found, is_little = pieces, of_keys * spec.element_bytes <= sizes.ring_bytes(spec)
        if of_keys + 2 * (sizes.queries + sizes.out) // pieces <= sizes.keys:
            break
    return found if is_little else None


def _pieces_of_ring(spec: AttentionSpec) -> int:
    """The fewest pieces of a ring that hold no more than a hop's keys and values, or the most.

    Held are, of a piece, two devices' keys and values, exchanged ones and queries, and the output
    twice in float32.
    """
    sizes = _Sizes.of(spec)
    if not is_known(*sizes):
        return 1
    rows, found = spec.batch * spec.heads * spec.queries // 2, 1
    for pieces in _divisors(spec.kv_heads):
        if rows // pieces < LEAST_ROWS:
            break
        found = pieces
        if (3 * sizes.keys + sizes.queries + 3 * sizes.out) // pieces <= sizes.keys:
            break
    return found


def _possible_pieces(spec: AttentionSpec) -> list[int]:
    """Into how many equal ones the key heads can be cut: at least two, to compute while sending."""
    return [p for p in _divisors(spec.kv_heads) if p > 1] or [1]


def _most_pieces(spec: AttentionSpec) -> int:
    return _possible_pieces(spec)[-1]


def _divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0] or [1]
