"""Tile shapes of the Hopper forward kernel, by head dim."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING

from pallas_kernels.hopper.bias_form import FOLDED, folds, form_of
from pallas_kernels.hopper.copies import padded_width
from pallas_kernels.hopper.piece_widths import (
    in_pieces,
    is_latent,
    parts_in_pieces,
    value_pieces,
    whole_or_pieces,
)

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["ROWS", "SHARED_MEMORY", "Tiles", "choose_tiles", "cost_of", "fit"]

ROWS = 64  # query rows of one compute warpgroup: wgmma's M
SHARED_MEMORY = 232448 - 1024  # bytes a block may use on sm_90, less barriers and alignment
VISIT = 16  # keys: as many more would take the time that each visit takes beside its columns
UNSTAGED = 24  # the same of a tile whose outputs lose their staging to larger blocks
FEW_KEYS = 1024  # of a window
_MOST_KEYS = {64: 128, 128: 176, 160: 128, 192: 112, 224: 96, 256: 80}  # by head dim


@dataclass(frozen=True)
class Tiles:
    """How a thread block is cut. It never changes what is computed.

    warpgroups: compute warpgroups, each of 64 query rows; one more loads.
    keys: keys a step visits.
    stages: key and value blocks in flight.
    query_slots: warpgroups' queries in shared memory. More than there are warpgroups let a thread
      block begin the next tile of a list before it has ended one.
    overlap: the softmax of a block does not wait for the product before it.
    in_turn: warpgroups issue their products one after another.
    own_staging: the output waits for its copy beside the queries, not in their place.
    from_registers: where a list has no room for a staging and slots of two tiles, the output leaves
      without a staging, and the next tile's queries come to the slot of those before.
    heads_together: the fewest heads whose tiles are computed side by side; more where their keys
      and values fit in L2.
    bias_stages: blocks of a bias in flight.
    """

    warpgroups: int
    keys: int
    stages: int
    query_slots: int
    overlap: bool = True
    in_turn: bool = False
    own_staging: bool = True
    from_registers: bool = False
    heads_together: int = 8
    bias_stages: int = 2

    @property
    def registers(self) -> tuple[int, int] | None:
        """Registers of a compute and of the loading thread, of 64 Ki over the block's threads."""
        # 240 + 240 + 24, 3 x 160 + 32 and 4 x 112 + 32 are 504, 512 and 480 registers for each of
        # 128 threads: all begin with as many, a multiple of 8, which is 5 x 96 for the last.
        return {1: None, 2: (240, 24), 3: (160, 32), 4: (112, 32)}[self.warpgroups]

    def shared_memory(self, spec: AttentionSpec, out_bytes: int) -> int:
        """Bytes of shared memory, with outputs of this many bytes an element."""
        rows, slots = self.warpgroups * ROWS, self.query_slots * ROWS
        dropout = spec.dropout_rate > 0
        head, value, out = _widths(spec, out_bytes)
        rings = self.stages * self.keys * (head + value) * 2 + slots * head * 2
        # Vectors, each in kilobytes of its own; the row sums are two for a warpgroup.
        ids = (3 if self.stages < 4 else 5) * spec.has_segments
        small = 1024 * (1 + (self.warpgroups > 2) + ids + dropout)
        staging = rows * out * out_bytes * self.own_staging
        return rings + staging + small + self.bias_bytes(spec)

    def bias_bytes(self, spec: AttentionSpec) -> int:
        """Of them, what a bias takes."""
        if spec.bias_dtype is None:
            return 0
        if form_of(spec) != "whole":
            folded = 2 * FOLDED * self.stages * self.keys if folds(spec) else 0
            return folded + 1024 * (
                1 + max(self.bias_stages * self.keys, self.warpgroups * ROWS) // 256
            )
        rows = self.warpgroups * ROWS
        return self.bias_stages * rows * self.keys * spec.bias_dtype.itemsize


def choose_tiles(spec: AttentionSpec, rows: int, *, halves: bool = False) -> Tiles:
    """The tiles for a call whose query tiles need hold no more than `rows` rows.

    halves: a block of keys is to be of one half of them.
    """
    tiles = _by_width(spec, rows)
    if not halves:
        return _by_length(spec, tiles)
    return tiles if spec.keys % (2 * tiles.keys) == 0 else replace(tiles, keys=tiles.keys & -64)


def cost_of(tiles: Tiles, *, wide: bool) -> tuple[float, float]:
    """What a visit takes and what a tile's start and end, where one warpgroup's visit takes 1.

    wide: past 64 columns. Lines through the times of few tiles, see `plan.py`.
    """
    if tiles.warpgroups == 1 and tiles.keys == 64:
        return (0.556, 0.8) if wide else (0.75, 1.3)
    if wide:
        visit, start = {1: (1.0, 1.3), 2: (1.34, 3.6)}[tiles.warpgroups]
    else:
        two = 1.58 if tiles.in_turn else 1.64
        visit, start = {1: (1.0, 1.3), 2: (two, 2.0), 3: (1.96, 2.0)}[tiles.warpgroups]
    return visit * (tiles.keys + VISIT) / (128 + VISIT), start


def _by_width(spec: AttentionSpec, rows: int) -> Tiles:
    """The same whatever the number of keys is."""
    # TFLOP/s on an H200, bf16, 16,384 tokens, heads x head dim 2048; T = 16k, 4k, 1k.
    width = max(_widths(spec, 2))
    short = spec.band.upper is not None and spec.queries < 2048
    if form_of(spec) == "whole":
        return _with_bias(spec, rows, width)
    if rows <= ROWS:
        # Few queries are bound by memory: one warpgroup, and every byte of it for keys in flight.
        return Tiles(1, 128 if width <= 128 else 64, 4, query_slots=1)
    if width <= 64 and _sees_few_keys(spec):
        # us on an H100, 32 heads, 16k, three warpgroups, two, these in turn: windows of 127 150,
        # 124, 130; 255 195, 140, 143; 511 227, 214, 218; 1,023 346, 347, 359; packed documents of
        # 256 206, 112, 111; 1,024 300, 212, 224; 4,096 663, 623, 679.
        return Tiles(2, 128, 4, query_slots=4)
    if width <= 64 and short:
        # A tile of 192 rows is mostly hidden or past the end: causal 335 at 1k, 291 with it.
        # No list: 254.
        return Tiles(2, 128, 4, query_slots=4)
    if width <= 64 and _rounded(spec.queries, 3 * ROWS) > 1.15 * _rounded(spec.queries, 2 * ROWS):
        # Sequences of which tiles of 192 rows are mostly past the end: 197, 577.
        return Tiles(2, 128, 4, query_slots=4)
    if width <= 64:
        # Causal 530, 461; full 561, 499, 447. No list: causal 531, 434; full 547, 487, 363.
        # Not in turn: 522, 440; 540, 492, 425. Two warpgroups: full 428, 428, 417.
        return Tiles(3, 128, 3, query_slots=6, in_turn=True)
    if width <= 128 and spec.has_segments:
        return Tiles(2, 128, 2, query_slots=3)  # where tiles are counted
    if width <= 128:
        # Causal 681, 648, 497; full 698, 673, 571. No list: 700, 621, 404; 699, 663, 548. In turn,
        # and keys by 64 or 192: slower.
        return Tiles(2, 128, 2, query_slots=4)
    if is_latent(spec):
        # Without a list causal 0.539 ms, 0.211, with one 0.485, 0.172; full 0.962, 0.909.
        return Tiles(2, 128, 2, query_slots=2, from_registers=True)
    if width <= 160 and spec.bias_shape is None and spec.dropout_rate == 0:
        # ms on an H200, B 4, N 16, T 4k, outputs through queries, from registers: 160 causal 0.518,
        # 0.486, full 0.947, 0.923, 1k 0.281, 0.262; 144 causal 0.478, 0.464, full 0.909, 0.875.
        # In blocks of 64 keys causal 0.570 where these took 0.522. Dropout would spill.
        few = spec.has_segments  # from a counter, with no outputs from registers
        return Tiles(2, 128, 2, query_slots=3 if few else 2, from_registers=not few)
    if spec.head_dim == spec.value_dim and _is_plain(spec):
        # The same of 176 in blocks of 64, of 96, with outputs from registers, of 112: causal 4k
        # 0.634, 0.594, 0.569, 0.566, full 1k 0.336, 0.326, 0.304, 0.311, causal 1k 0.227, , 0.200;
        # 208 of 64, 80, from registers: full 4k 1.334, 1.266, 1.253, causal 0.704, 0.688, 0.674;
        # 240 of 64, from registers: full 1.498, 1.455, causal 0.787, 0.781; 256 of 64, 80: causal
        # 4k 0.419, 0.406, 1k 0.141, 0.143.
        if width <= 192:
            return Tiles(2, 96, 2, query_slots=2, from_registers=True)
        if width <= 224:
            return Tiles(2, 80, 2, query_slots=2, from_registers=True)
        if width < 256:
            return Tiles(2, 64, 2, query_slots=2, from_registers=True)
        is_long = _ends_differ(spec) and spec.queries >= 4096
        return Tiles(2, 80 if is_long else 64, 2, query_slots=2)
    # At 256 there is no room for blocks of 128 keys, and in a list for three query slots only:
    # causal 716, 654, 465; full 653, 713, 611; without 768, 694, 491; 772, 734, 616.
    return Tiles(2, 64, 2, query_slots=2)


def _by_length(spec: AttentionSpec, tiles: Tiles) -> Tiles:
    """Of a full call, with blocks of as many keys as are visited soonest.

    ms on an H200 (* keys' columns that are visited, and `VISIT` more at each visit), 128, in blocks
    of 128, 144, 176: 12,345 1.744 (13,968*), 1.711 (13,760), 1.703 (13,632); 5,001 0.902 (5,760),
    0.877 (5,600); 1,001 0.209 (1,152), 0.206 (1,120), 0.214 (1,152), but 1,000 0.796, 0.798; of 128
    and 96, 257 0.129 (432), 0.107 (336); and 112, 197 0.068 (288), 0.061 (256). 256, of 64 and 80,
    1k 0.210, 0.203, with outputs from registers 0.200, 4k 0.736, 0.704, 0.699.
    """
    banded = spec.band.upper is not None or spec.band.lower is not None
    width = max(spec.head_dim, spec.value_dim)
    most = next(keys for size, keys in _MOST_KEYS.items() if width <= size)
    if spec.head_dim != spec.value_dim:  # outputs then have no room in the queries' place
        most = min(most, 128) if width <= 128 else 0
    if banded or tiles.warpgroups == 1 or not _is_plain(spec):
        return tiles
    choices = [tiles]
    for keys in range(64 if width > 128 else 80, most + 1, 16):
        leaves = tiles.from_registers or keys > 144 or (width > 224 and keys > 64)
        counted = spec.keys > 4 * keys
        if counted or keys <= 128:
            choices.append(replace(tiles, keys=keys, from_registers=leaves))

    def cost(choice: Tiles) -> int:
        visits, unstaged = (
            -(-spec.keys // choice.keys),
            choice.keys > (144 if width <= 112 else 128),
        )
        return visits * (choice.keys + VISIT) + UNSTAGED * unstaged

    best = min(choices, key=cost)
    return best if 100 * cost(best) < 99 * cost(tiles) else tiles


def _widths(spec: AttentionSpec, out_bytes: int) -> tuple[int, int, int]:
    """Columns in shared memory of keys, values and outputs, these having `out_bytes` an element."""
    in_parts = out_bytes > 2
    pieces = parts_in_pieces(spec) if in_parts else in_pieces(spec)
    head, out = (sum(whole_or_pieces(x, pieces=pieces)) for x in (spec.head_dim, spec.value_dim))
    count, width = value_pieces(spec)
    if in_parts:
        out = padded_width(spec.value_dim)
    return head, count * width if pieces else out, out


def _sees_few_keys(spec: AttentionSpec) -> bool:
    """Whether tiles of more than 128 rows would mostly visit keys that their rows do not see.

    That is in a window of 1,024 keys or fewer, and where documents come from a counter, most of
    which are short: of one document of 16k, 64 columns, tiles of 192 rows take 11% less.
    """
    if spec.bias_shape is not None or spec.dropout_rate > 0:
        return False
    lower, upper = spec.band.lower, spec.band.upper
    counted = spec.has_segments and spec.mask_shape is None and not spec.has_key_lengths
    return counted or (lower is not None and upper is not None and upper - lower < FEW_KEYS)


def _ends_differ(spec: AttentionSpec) -> bool:
    """Whether tiles of a causal call are of all lengths."""
    return spec.band.upper is not None and spec.band.lower is None


def _is_plain(spec: AttentionSpec) -> bool:
    """Whether nothing but a band is asked for."""
    others = spec.has_segments or spec.has_query_lengths or spec.has_key_lengths
    others |= spec.has_query_offset or spec.mask_shape is not None or spec.dropout_rate > 0
    return spec.bias_shape is None and not others


def _rounded(size: int, by: int) -> int:
    return -(-size // by) * by


def _with_bias(spec: AttentionSpec, rows: int, width: int) -> Tiles:
    """The tiles beside tiles of a bias."""
    assert spec.bias_dtype is not None
    wide = spec.bias_dtype.itemsize > 2
    if rows <= ROWS:
        return Tiles(1, 128 if width <= 128 and not wide else 64, 3, query_slots=1)
    if width <= 64:
        return _beside_narrow(spec, width)
    if width <= 128:
        return Tiles(2, 64 if wide else 128, 2, query_slots=2)
    return Tiles(2, 64, 2, query_slots=2, bias_stages=1 if wide else 2)


def _beside_narrow(spec: AttentionSpec, width: int) -> Tiles:
    """The same at head dims up to 64: the tallest tiles that are not mostly past the end.

    A step is short there, and of many warpgroups there is always one that need not wait.
    """
    from jattn.call.masking import hides_some

    assert spec.bias_dtype is not None
    wide = spec.bias_dtype.itemsize > 2
    if width <= 32:
        choices = [
            Tiles(4, 64, 3, query_slots=8, in_turn=True, bias_stages=2 if wide else 4),
            Tiles(3, 128, 2, query_slots=6, in_turn=True, bias_stages=3),
            Tiles(2, 128, 3, query_slots=4, bias_stages=2 if wide else 3),
        ]
        if wide:
            del choices[1]  # 0.194 at 384 rows, two 0.176
    else:
        choices = [
            Tiles(4, 64, 2, query_slots=8, in_turn=True, bias_stages=2 if wide else 3),
            Tiles(2, 128, 2, query_slots=4, bias_stages=1 if wide else 2),
        ]
        if wide and (hides_some(spec) or spec.keys % 64):
            del choices[0]  # spills
    least = min(_rounded(spec.queries, x.warpgroups * ROWS) for x in choices)
    return next(x for x in choices if _rounded(spec.queries, x.warpgroups * ROWS) <= 1.15 * least)


def fit(
    spec: AttentionSpec, tiles: Tiles, *, listed: bool, out_bytes: int, noted: bool = False
) -> Tiles:
    """The tiles with as many stages, slots and stagings as shared memory has room for.

    listed: thread blocks walk lists of tiles; without one they need a slot a warpgroup.
    noted: or take them from a counter, of which they are told by notes.
    out_bytes: bytes of an element that the kernel writes, 4 if its outputs are still to be joined.
    """
    w, (head, value, out) = tiles.warpgroups, _widths(spec, out_bytes)
    notes = 1024 * (noted and not spec.has_segments)  # beside segments they are counted
    # Some columns of a tiled matrix are not contiguous, as a copy needs.
    in_place = (head == out or is_latent(spec)) and out_bytes == 2
    tiles = replace(tiles, from_registers=tiles.from_registers and listed and out_bytes == 2)
    stagings = [False] if tiles.from_registers else [True, False] if in_place else [True]
    most = max(tiles.query_slots, w) if listed else w
    for stages, slots, own in product(range(tiles.stages, 0, -1), range(most, w - 1, -1), stagings):
        fitted = replace(tiles, stages=stages, query_slots=slots, own_staging=own)
        if fitted.shared_memory(spec, out_bytes) + notes <= SHARED_MEMORY:
            return fitted
    raise ValueError(f"{tiles} need more than {SHARED_MEMORY} bytes for head dims {head, value}")
