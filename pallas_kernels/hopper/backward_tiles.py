"""Tile shapes of the Hopper backward kernels of dK and dV, by head dim."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from jattn.call.masking import hides_some
from pallas_kernels.hopper.backward_cut import BackwardTiles
from pallas_kernels.hopper.backward_order import (
    MOST_ADDED,
    MOST_VISITS,
    added_shares,
    most_visits,
    order,
    places,
    side_by_side,
)
from pallas_kernels.hopper.bias_form import form_of, lends_memory, rows_share
from pallas_kernels.hopper.copies import padded_width, swizzle_of
from pallas_kernels.hopper.limits import has_dq_apart, writes_dq_once
from pallas_kernels.hopper.piece_widths import (
    has_many_pieces,
    has_plain_pieces,
    needs_plain_rows,
)
from pallas_kernels.hopper.shares import (
    ENOUGH,
    MULTIPROCESSORS,
    START,
    WHOLE,
    Shares,
    choose_shares,
)
from pallas_kernels.hopper.tiles import ROWS, SHARED_MEMORY
from pallas_kernels.hopper.visits import MOST_KNOWN, known_counts, visits_every_block

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = [
    "BackwardTiles",
    "by_rows",
    "choose_backward_tiles",
    "dq_columns",
    "dq_swizzle",
    "makes_row_term",
]

MOST_LISTED = 1 << 17  # tiles: 0.5 MiB of list, 0.2 s to make


def choose_backward_tiles(
    spec: AttentionSpec, *, deterministic: bool, wants_bias: bool = False
) -> BackwardTiles:
    """The tiles for a call."""
    if tiles := _joined(spec):
        return tiles
    if deterministic and adds_in_turns(spec):
        return _in_turns(spec)
    apart = has_dq_apart(spec, deterministic=deterministic)
    tiles = _of_head_dims(spec, apart=apart, deterministic=deterministic, wants_bias=wants_bias)
    if not tiles.apart and writes_dq_once(spec):
        shared = tiles.shared_ds or tiles.in_fragments
        tiles = replace(tiles, once=True, in_fragments=False, values_first=False, shared_ds=shared)
    added = {} if deterministic else added_shares(spec, tiles)
    shares = added or {"shares": _shares(spec, tiles)}
    tiles = replace(tiles, **shares)
    tiles = replace(tiles, pieces=_pieces(spec, tiles))
    tiles = replace(tiles, tiles_outer=tiles.shares.count > 1 and not tiles.adds)
    tiles = replace(tiles, **order(spec, tiles))
    tiles = replace(tiles, places=places(spec, tiles))
    tiles = replace(tiles, first_stores=_first_stores(spec, tiles))
    tiles = replace(tiles, in_parts=_in_parts(spec, tiles))
    tiles = replace(tiles, puts_at_once=_puts_at_once(spec, tiles))
    for stages in sorted({2, tiles.stages if form_of(spec) == "whole" else 2}, reverse=True):
        if listed := _listed(spec, replace(tiles, stages=stages)):
            # In a window of 255, 1k, 350 us in parts or not, and 4 bytes more spilled.
            in_parts = tiles.in_parts and spec.band.lower is None
            return replace(tiles, listed=listed, stages=stages, in_parts=in_parts)
    if _adds_often(spec, tiles):
        return replace(tiles, late=True, shared_ds=True, heads_turned=True, in_parts=False)
    # us on an H200, by a choice and so: 5,000 839, 829, 4k 1118, 1107, packed 856, 849, window 1023
    # 633, 632; 12,345 2343, 2349; lists of 1k, on an H100, 377, 378.
    return replace(tiles, masks_by_minimum=tiles.in_parts and spec.dropout_rate == 0)


# Thread blocks of a launch that makes all gradients; of a full call one round of the chip's, as
# where all tiles are as long a second one would be as long as the first. Half as many again up to
# half the longest where shares are of two heads or more: us on an H200, not joined, joined, 384
# thread blocks of causal 1k of 128, 32 heads of 8 101.9, 97.0, but of shares of one head, 24 of 8,
# 83.8, 87.7, and at twice the length, 16 of 4, 145.9, 150.8. Others are in docs/kernels.md, 57.
MOST_JOINED = 256
MOST_JOINED_FULL = MULTIPROCESSORS
# Queries and keys of such a call, and the most of a full one.
LEAST_JOINED, LONGEST_JOINED, LONGEST_JOINED_FULL = 64, 2048, 1024
# Queries that a tile visits, up to which it makes their row terms.
MOST_ROW_TERMS = 256


def makes_row_term(spec: AttentionSpec) -> bool:
    """Whether backward makes the row term itself where it is given the output."""
    # us on an H200, forward and backward, 8 heads, causal, made by XLA and so: of 64, T = 128
    # 11.1, 10.2; 256 14.1, 13.8; 512 19.6, 20.2; of 128, 512 28.2, 29.9.
    if spec.dropout_rate > 0:
        return False  # what is subtracted is divided by what is kept
    tiles = _joined(spec)
    visited = 0 if tiles is None else spec.queries * (spec.group // tiles.shares.heads)
    return 0 < visited <= MOST_ROW_TERMS


def _joined(spec: AttentionSpec) -> BackwardTiles | None:
    """Those of a short call, whose kernels are one launch where all thread blocks run at a time."""
    # us on an H200, forward and backward, not joined, joined, cuDNN, 8 heads, causal: of 64, T =
    # 128 14.2, 10.2, 15.0; 512 29.2, 20.2, 28.4; 1k 42.6, 33.5, 45.3; 2k, of 256 thread blocks,
    # 82.0, 71.1, 80.5; 32 heads of 8, 512, also of 256, 38.7, 33.0, 36.3; full 1k 41.8, 34.6, 43.4;
    # of 128, 512 36.5, 29.9, 38.2; B 4, of 256, 45.9, 41.9, 46.9; full 36.2, 29.1, 36.7. Joined or
    # not, 512: of 64, four documents 34.8, 31.8, float16 26.9, 18.9, an offset 29.0, 20.9, dropout
    # 35.3, 27.1, of 128 43.0, 33.1, four documents of 1k 48.9, 42.0.
    others = spec.mask_shape is not None or spec.bias_shape is not None
    others |= spec.scale is None  # whose gradient is made of dQ in float32
    others |= spec.head_dim != spec.value_dim
    # Documents gain in one round alone: us, not joined, joined, 2k of 8 heads, of 64, four of them,
    # 60.2, 64.0, of 128, 16 of them, 49.1, 50.3, 512, B 4, 41.7, 42.7.
    full = spec.has_segments or not hides_some(spec)
    # Nor do lengths alone beyond 1k, 8 heads of 64 102.4, 111.3; but 1k, B 2, 62.6, 62.3.
    banded = spec.band.lower is not None or spec.band.upper is not None
    longest = LONGEST_JOINED if banded and not full else LONGEST_JOINED_FULL
    sizes = (spec.queries, spec.keys)
    if others or spec.head_dim > 128 or min(sizes) < LEAST_JOINED or max(sizes) > longest:
        return None
    tiles = _of_head_dims(spec, apart=True)
    of_queries = spec.batch * spec.heads * -(-spec.queries // (2 * ROWS))
    tiles = replace(tiles, joined=True, values_first=False)
    tiles = replace(tiles, shares=_shares(spec, tiles, of_queries=of_queries))
    tiles = replace(tiles, pieces=_pieces(spec, tiles), tiles_outer=tiles.shares.count > 1)
    of_keys = spec.batch * spec.kv_heads * tiles.shares.count * -(-spec.keys // tiles.keys)
    most = min(MOST_JOINED, MOST_JOINED_FULL) if full else MOST_JOINED
    if spec.group > tiles.shares.heads and 2 * max(sizes) <= longest:
        most += most // 2
    return tiles if 0 < of_keys + of_queries <= most else None


# Queries that a tile visits in the mean from which one kernel in turns is faster than two: at head
# dim 64, and at more.
LEAST_IN_TURNS = 512, 1024
LEAST_OF_SHARES = 1536  # where each head of a group has a thread block of its own


def adds_in_turns(spec: AttentionSpec) -> bool:
    """Whether deterministic gradients have one kernel, in which tiles add to dQ in turns."""
    others = spec.bias_shape is not None or spec.logits_soft_cap is not None
    others |= spec.dropout_rate > 0 or writes_dq_once(spec)
    head, value = spec.head_dim, spec.value_dim
    tried = head in (80, 96, 112, 128) or head == value == 64
    if others or not tried or value > 128:
        return False
    # Of grouped documents it is not known whether they are long enough, two kernels and a share for
    # each head, ms on an H100: 32 heads of 8, 16 of 1k, 1.056, 1.272, 8 of 2, up to 4k, 1.390,
    # 1.200. A tile that visits all heads loses: on an H200 32 of 8, B 2, T 8k, 5.345, 6.997.
    if spec.has_segments and (spec.band.lower is not None or (spec.group > 1 and hides_some(spec))):
        return False
    tiles = _in_turns(spec)
    known = visits_every_block(spec, queries=tiles.queries, keys=tiles.keys)
    if not known and not (_is_of_documents(spec) and spec.keys <= MOST_KNOWN * tiles.keys):
        return False
    visits = known_counts(spec, queries=tiles.queries, keys=tiles.keys)
    visited = float(visits.mean()) * tiles.queries
    if tiles.adds:
        return visited >= LEAST_OF_SHARES and tiles.shares.count <= MOST_ADDED
    return visited * spec.group >= LEAST_IN_TURNS[head > 64]


def _in_turns(spec: AttentionSpec) -> BackwardTiles:
    """The tiles of that kernel."""
    # Free backward's time over this one's on an H200, by heads side by side: 128 causal 4k from the
    # last keys on 16 0.806, 8 0.947, 4 0.945, from the first on 0.877, 0.801, 0.686 (two kernels
    # 0.848); 16k 8 0.695, 4 0.850, 2 0.942, from the first on 16 0.939 (0.811). 64 16k 8 0.849, 4
    # 0.920, 2 0.935 (0.748), 1k 1.010, from the first on 0.889 (0.909). Full, from the first on:
    # 128 4k 16 0.985, 8 0.988, 4 0.979 (0.832), 16k 0.965, 0.984, 0.974 (0.806), 1k 0.993, 0.906
    # (0.895); 64 4k 32 0.982, 16 0.981, 8 0.978 (0.829). 96 4k 8, values first, causal 1.007, full
    # 1.034, not first 0.923, 1.013 (0.893, 0.870). Window 1023, 16k, 16 0.970, 8 0.950 (0.865);
    # 4095 of 32 heads of 8 0.747 (0.860).
    tiles = _of_head_dims(spec, apart=False)
    tiles = replace(tiles, in_fragments=True, first_stores=True, in_turns=True, heads_inner=True)
    if tiles.queries == ROWS:
        tiles = replace(tiles, values_first=True, shared_ds=False)
    upward = spec.band.upper is not None and spec.band.lower is None
    tiles = replace(tiles, upward=upward, tiles_first=False)
    if spec.group > 1 and hides_some(spec):
        tiles = replace(tiles, shares=Shares(spec.group), adds=True)
    else:
        tiles = replace(tiles, shares=_shares(spec, tiles))
    tiles = replace(tiles, tiles_outer=tiles.shares.count > 1 and not tiles.adds)
    tiles = replace(tiles, pieces=_pieces(spec, tiles))
    tiles = replace(tiles, heads_together=side_by_side(spec, tiles))
    return replace(tiles, places=places(spec, tiles))


def _pieces(spec: AttentionSpec, tiles: BackwardTiles) -> bool:
    """Whether arrays are read and written in place that would be padded for copies in tiles."""
    others = spec.mask_shape is not None or spec.bias_shape is not None
    return not (tiles.once or others or _is_narrow(spec, tiles)) and has_plain_pieces(spec)


# Tiles of keys that may visit a block of queries, in the mean, where documents decide.
MOST_OF_DOCUMENTS = 65


def _first_stores(spec: AttentionSpec, tiles: BackwardTiles) -> bool:
    """Whether blocks of dQ are stored by the first to visit them, and none is filled before."""
    # ms on an H200, forward and backward of head dim 128, filled and stored, the least of 40 runs,
    # no lists where stored: visited 4.5 times (1k causal) 0.633, 0.617; 8 (full) 0.960, 0.932; 16.5
    # (4k causal) 1.692, 1.672; 20 (5000) 1.255, 1.244; 33 (32 heads of 8,
    # 8k causal) 6.24, 6.34; 48 (12,345 causal) 3.64, 3.85; 64 (16k) 5.76, 5.95; 128 (full) 12.16,
    # 12.28.
    # Of documents, causal, on an H100: 8 of 2048 1.147, 1.040, one of 16k 6.636, 6.091; 32 heads of
    # 8, 16 of 1024, 1.389, 1.288; 8 heads of 2, 10 in 32k 3.377, 3.257, one of 32k 11.89, 11.74, 6
    # in 131k 56.94, 55.93. Longer ones of heads that have their own keys were not tried.
    # Beside a bias, whose gradient lends dQ its room, it was not tried.
    if spec.bias_shape is not None or not tiles.in_fragments or tiles.queries > ROWS:
        return False
    # Shares that add, of head dim 96, 32 heads of 8, 8k, on an H200, backward: 3.740, filled 3.581.
    if tiles.adds and _is_uneven(spec):
        return False
    if _is_of_documents(spec):
        few = spec.keys <= MOST_KNOWN * tiles.keys
        stores = tiles.heads_inner or (few and _most_visited(spec, tiles) <= MOST_OF_DOCUMENTS)
    else:
        stores = 0 < _visited(spec, tiles) <= most_visits(spec, tiles)
    # Beside claims many pieces are copied in a loop, for which long tiles wait: 104 in a window of
    # 4095 2.122, filled 1.961 (backward alone); but 80 at 257, in lists, 0.351, filled 0.376.
    if stores and tiles.pieces and has_many_pieces(spec):
        return _listed(spec, replace(tiles, first_stores=True)) > 0
    return stores


def _is_uneven(spec: AttentionSpec) -> bool:
    """Whether two warpgroups make less than 64 columns of dQ each."""
    return 64 < padded_width(spec.head_dim) < 128


def _is_of_documents(spec: AttentionSpec) -> bool:
    """Whether segments alone make the visits unknown."""
    others = spec.has_query_lengths or spec.has_key_lengths or spec.has_query_offset
    others |= spec.mask_shape is not None or spec.dropout_rate > 0
    return spec.has_segments and not others


def _adds_often(spec: AttentionSpec, tiles: BackwardTiles) -> bool:
    """Whether many tiles add to each block of dQ, and do so at a time if nothing is done."""
    # ms on an H100, forward and backward of 32 heads of 8, T 8k, causal: 6.778, with dK late 6.636,
    # and heads turned 6.530. Of 16 heads of 16, dK late: 16k 5.889, 5.941, full 11.87, 11.79, 4k
    # full 3.174, 3.167; stored by the first 4k 1.695, 1.708, 1k 0.660, 0.686. 32 heads of one, T
    # 4k, 1.889, 1.942, not stored 1.950, and turned 1.968.
    # Of shares of two heads, 32 of 8, T 8k, dQ filled 6.269, late 6.638, late and turned 6.186,
    # stored 6.153; 16k 11.97, late 11.76.
    if _is_uneven(spec):
        return False  # not tried
    alone = tiles.in_fragments and tiles.values_first and (tiles.shares.count == 1 or tiles.adds)
    return tiles.heads_inner and alone and _visited(spec, tiles) > most_visits(spec, tiles)


def _visited(spec: AttentionSpec, tiles: BackwardTiles) -> float:
    """Tiles that visit a block of queries, in the mean; 0 if not known, or none visits some."""
    known = visits_every_block(spec, queries=tiles.queries, keys=tiles.keys)
    return _most_visited(spec, tiles) if known else 0.0


def _most_visited(spec: AttentionSpec, tiles: BackwardTiles) -> float:
    """The same, where it is known, else the most that it may be."""
    counts = known_counts(spec, queries=tiles.queries, keys=tiles.keys)
    return float(counts.sum()) / -(-spec.queries // tiles.queries)


def _in_parts(spec: AttentionSpec, tiles: BackwardTiles) -> bool:
    """Whether dV's product starts in parts."""
    # us of the kernel on an H200, without and with: causal 12,345 2443, 2348, 4k 1131, 1124, 5,000
    # 851, 841, 16k 4167, 4152, 1k 374, 367; full 4k 2173, 2138, 1k 601, 591, 16k 8507, 8401;
    # window 1023 644, 633, 4095 1931, 1904, of 32 heads of 8 3996, 3898; 32 of one, 4k, 1118, 1103,
    # full 2074, 2056; of 8, 8k, 4245, 4222; packed, in clear visits alone, 860, 856. On an H100 96
    # 941, 956, 80 870, 871; deterministic 1225, 1216. Others were not tried. Of one row a full call
    # would spill 4 bytes by jax 0.12's ptxas.
    others = spec.bias_shape or spec.mask_shape or spec.logits_soft_cap
    others = others or spec.has_query_lengths or spec.has_key_lengths or spec.has_query_offset
    others = others or (spec.batch == 1 and tiles.first_stores and not hides_some(spec))
    tried = spec.group == 1 or tiles.adds or spec.has_segments or not hides_some(spec)
    wide = spec.head_dim == spec.value_dim == 128
    return wide and tried and tiles.values_first and not (tiles.apart or others)


def _puts_at_once(spec: AttentionSpec, tiles: BackwardTiles) -> bool:
    """Whether a visit's stores or adds of dQ are behind one branch."""
    # us of backward, each behind its own and so, on an H200: window 4095 1999, 1967; 1023 737, 741;
    # on an H100: 4k full 2235, 2221; but 5,000 913, 938, 4k causal 1246, 1262, lists 1k 505, 509.
    alone = spec.group == 1 and spec.band.upper is not None and spec.band.lower is None
    often = tiles.first_stores and _visited(spec, tiles) > MOST_VISITS
    return often and tiles.in_parts and not alone


def _listed(spec: AttentionSpec, tiles: BackwardTiles) -> int:
    """Thread blocks that go through lists of tiles, whose lengths are known beforehand; or 0."""
    others = spec.mask_shape is not None or form_of(spec) in ("columns", "rows")
    others |= spec.dropout_rate > 0
    unknown = (
        spec.has_segments or spec.has_query_lengths or spec.has_key_lengths or spec.has_query_offset
    )
    others |= spec.scale is None or spec.logits_soft_cap is not None or tiles.once
    others |= tiles.in_fragments and tiles.queries > ROWS  # not tried
    if others or unknown or tiles.warpgroups == 1 or tiles.shares.count > 1:
        return 0
    count = spec.batch * spec.kv_heads * -(-spec.keys // tiles.keys)
    if not MULTIPROCESSORS < count <= MOST_LISTED or not _two_fit(spec, tiles):
        return 0
    # ms on an H200, forward and backward, without and with. Head dim 128: T = 257 0.680, 0.659,
    # 1k causal 0.645, 0.631, full 0.972, 0.968; 4k causal 1.676, 1.710, full 3.08, 3.16, 16k 5.70,
    # 5.9. 80 at 257 0.721, 0.662, 4k causal 1.408, 1.354; 96 1.462, 1.450. Deterministic, 128, 1k
    # causal 0.689, 0.646, 4k full 3.62, 3.55; 64 0.915, 0.853, 4.35, 4.26.
    even = tiles.in_fragments and not _is_uneven(spec)
    most = 4096 if tiles.apart else 1024 if even else 2112
    # Where the first to visit stores, on an H100: 577 1.759, 1.724, 257 0.676, 0.645, 1k causal
    # 0.668, 0.660, but full 1.009, 1.027.
    most = 768 if tiles.first_stores else most
    visits = known_counts(spec, queries=tiles.queries, keys=tiles.keys)
    visited = float(visits.mean()) * tiles.queries * spec.group
    return MULTIPROCESSORS if visited <= most else 0


def _two_fit(spec: AttentionSpec, tiles: BackwardTiles) -> bool:
    """Whether shared memory has room for two tiles of keys."""
    vectors = -(-tiles.stages * 4 * tiles.queries * 4 // 1024) * 1024
    return _matrices_bytes(spec, tiles, slots=2) + vectors <= SHARED_MEMORY


def _fits(spec: AttentionSpec, tiles: BackwardTiles) -> bool:
    """Whether shared memory has room for one, and a whole bias."""
    vectors = -(-tiles.stages * 4 * tiles.queries * 4 // 1024) * 1024
    vectors += 2 * 1024 * spec.has_segments
    return _matrices_bytes(spec, tiles, slots=1) + vectors <= SHARED_MEMORY


def _matrices_bytes(spec: AttentionSpec, tiles: BackwardTiles, *, slots: int) -> int:
    """Bytes of shared memory of all matrices, with so many tiles of keys."""
    head, value = (padded_width(x) for x in (spec.head_dim, spec.value_dim))
    columns = 2 * (head + value)  # bytes
    found = (slots * tiles.keys + tiles.stages * tiles.queries) * columns
    if not tiles.apart:
        found += 2 * 2 * tiles.keys * tiles.queries
        if not tiles.in_fragments:
            found += 4 * head * (tiles.queries if tiles.queries == ROWS else tiles.keys)
    if form_of(spec) == "whole":
        assert spec.bias_dtype is not None
        found += tiles.stages * tiles.queries * tiles.keys * spec.bias_dtype.itemsize
    return found


# Of a visit of dK and dV, the time of one of dQ in a joined launch: three products for four.
OF_QUERIES = 0.75


def _shares(spec: AttentionSpec, tiles: BackwardTiles, *, of_queries: int = 0) -> Shares:
    """Those of a tile of keys.

    of_queries: thread blocks of dQ's kernel, which fill the multiprocessors that these leave.
    """
    copies = spec.batch * spec.kv_heads
    if spec.mask_shape is not None:
        return WHOLE  # a tile's visits are a list of its own
    if copies * -(-spec.keys // tiles.keys) >= ENOUGH:
        return WHOLE
    columns = spec.head_dim + spec.value_dim
    visits = known_counts(spec, queries=tiles.queries, keys=tiles.keys)
    beside = 0.0
    if of_queries:
        beside = OF_QUERIES * float(visits.sum()) * copies * spec.group + START * of_queries
    return choose_shares(
        visits,
        copies,
        spec.group,
        beside=beside,
        visit_operations=5.0 * tiles.queries * tiles.keys * columns,
        output_bytes=4.0 * copies * spec.keys * columns,
        # A tile of the kernel for wide heads visits one block at least.
        splits_queries=tiles.warpgroups > 1 and not tiles.in_turns,
    )


# Keys up to which rows that share a whole bias have dQ in float32, as rows without one have. Longer
# rows have it only where it has room: their bias is most of what there is.
SHORT_ROWS = 1024


def _of_head_dims(
    spec: AttentionSpec, *, apart: bool, deterministic: bool = False, wants_bias: bool = False
) -> BackwardTiles:
    # TFLOP/s on an H200, bf16, 16,384 tokens, heads x head dim 2048, all that backward runs
    # counted; T = 16k, 4k, 1k.
    head, value = (-(-x // 64) * 64 for x in (spec.head_dim, spec.value_dim))
    full = not hides_some(spec)
    in_fragments = padded_width(spec.head_dim) > 64
    # With dropout both forms of P are in use at once.
    values_first = in_fragments and spec.dropout_rate == 0
    even = values_first and not _is_uneven(spec)
    if max(head, value) > 128:
        # 256: causal 481, 483, 357; full 495, 508, 439. dK and dV alone (four products): causal
        # 699, 651; full 682, 684; with two blocks of dO 647, 640; 666, 675. 192/128: causal 604.
        return BackwardTiles(64, stages=1, warpgroups=1, apart=True)
    if form_of(spec) == "whole":
        assert spec.bias_dtype is not None
        stages = 3 if spec.bias_dtype.itemsize == 2 else 2
        tiles = BackwardTiles(64, stages=stages)
        if head + value > 128:
            tiles = BackwardTiles(
                64, in_fragments=even, values_first=even, shared_ds=not even, tiles_first=full
            )
        adds = rows_share(spec) and spec.keys <= SHORT_ROWS
        adds |= wants_bias and lends_memory(spec)
        adds &= spec.logits_soft_cap is None and not deterministic
        if adds and _fits(spec, tiles):
            return tiles
        return BackwardTiles(64, stages=stages, apart=True)
    if apart:
        narrow = head + value <= 128
        capped, added = spec.logits_soft_cap is not None, spec.bias_shape or spec.mask_shape
        if narrow and not (spec.has_segments or capped or added):
            # Causal 444, 394, 266; full 414, 410, 340. Blocks of 64 queries: dK and dV alone 459
            # against 556 at causal 4k. Segments, a soft cap, a bias or a mask would spill.
            return BackwardTiles(128, apart=True, tiles_first=full)
        # 128: causal 512, 477, 336; full 490, 490, 415. Soft cap, causal 4k: 360, and 295 by the
        # kernel for wide heads.
        # On an H100 with dV's product first, dQ's kernel and all: full 492, 449 (without 444, 437),
        # causal 483, 394 (488, 392).
        return BackwardTiles(64, stages=3, apart=True, values_first=full and even)
    if head + value <= 128 and (spec.mask_shape or spec.bias_shape):
        return BackwardTiles(64, stages=3)  # blocks of 128 queries spill
    if head + value <= 128:
        # Causal 557, 460, 290; full 536, 526, 410. dS shared: causal 516, 432, 261.
        # On an H200 dQ from registers takes 1 to 8% less, see docs/kernels.md, 55; full calls of 24
        # to 56 4%, causal ones 4% more (4k of 32 2.587, 2.478, 1.456, 1.522).
        slower = spec.head_dim < 64 and not full
        others = spec.dropout_rate > 0 or spec.has_segments or slower
        return BackwardTiles(128, in_fragments=not others, tiles_first=full)
    # Causal 615, 537, 349, dS not shared 607 and 345, tiles first 593 and 341, one loop 564, 466,
    # 301; full 591, 583, 466, heads first 584, 571, 450. Three stages: full 546 at 4k. dV's product
    # before dS: causal 491.
    # On an H100 the kernel alone, in fragments and values first: causal 647, 595, 437, without 622,
    # 565, 411; full 651, 632, 562, without 617, 595, 540.
    if values_first:
        return BackwardTiles(64, in_fragments=True, values_first=True, tiles_first=full)
    return BackwardTiles(64, shared_ds=True, in_fragments=in_fragments, tiles_first=full)


def by_rows(spec: AttentionSpec, tiles: BackwardTiles) -> bool:
    """Whether matrices are copied as plain rows, and no array is padded."""
    return tiles.pieces or _is_narrow(spec, tiles)


def _is_narrow(spec: AttentionSpec, tiles: BackwardTiles) -> bool:
    """Whether matrices are one piece each, which arrays fill."""
    # Blocks of 64 queries have a narrower swizzle, see `dq_swizzle`.
    return not tiles.apart and tiles.queries > ROWS and needs_plain_rows(spec)


def dq_swizzle(head: int) -> int:
    """Bytes of the swizzle of what dQ is made of, where two warpgroups share its columns."""
    return 64 if head == 64 else swizzle_of(head, 2)


def dq_columns(head: int) -> tuple[int, int]:
    """How many columns of dQ each of two warpgroups makes: whole tiles, the first no fewer."""
    tile = dq_swizzle(head) // 2
    first = -(-head // (2 * tile)) * tile
    return first, head - first
