"""Bytes that backward's kernels hold beside their operands. Importing this imports no kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pallas_kernels.hopper.backward_tiles import BackwardTiles, by_rows, choose_backward_tiles
from pallas_kernels.hopper.bias_form import form_of
from pallas_kernels.hopper.copies import backward_width
from pallas_kernels.hopper.tiles import ROWS

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["backward_bytes"]


def backward_bytes(spec: AttentionSpec, *, deterministic: bool, wants_bias: bool = False) -> int:
    """Bytes for the gradients of query, key and value.

    Sums of dQ are counted also where XLA can put them where a bias's gradient will be: of several
    calls in a program it does so for some.

    wants_bias: as `backward` takes it.
    """
    tiles = choose_backward_tiles(spec, deterministic=deterministic, wants_bias=wants_bias)
    # dQ in float32 where thread blocks add to it; of a row its log-sum-exp in two numbers, as
    # forward and as backward has it, and the row term.
    block = tiles.queries if tiles.in_fragments else 2 * ROWS
    whole = -(-spec.queries // block) * block
    columns = 0 if tiles.apart or tiles.once else backward_width(spec.head_dim)
    words = 2 * (spec.dropout_rate > 0)  # of a row's dropout mask
    of_bias = int(form_of(spec) == "rows")
    # The gradient of a scale is made of dQ in float32 too, in the order of rows.
    unscaled = columns if spec.scale is None else 0
    heads = spec.batch * spec.heads
    rows = heads * (whole * (columns + 3 + words + of_bias) + spec.queries * (unscaled + 2)) * 4
    return rows + _shares_bytes(spec, tiles) + _copied_bytes(spec, tiles)


def _shares_bytes(spec: AttentionSpec, tiles: BackwardTiles) -> int:
    """Of dK and dV of each share, or of their sums, in float32."""
    if tiles.shares.count == 1:
        return 0
    arrays = 1 if tiles.adds else tiles.shares.count
    count = arrays * spec.batch * spec.kv_heads * -(-spec.keys // tiles.keys)
    rows = (tiles.places or count) * tiles.keys
    return rows * (backward_width(spec.head_dim) + backward_width(spec.value_dim)) * 4


def _copied_bytes(spec: AttentionSpec, tiles: BackwardTiles) -> int:
    """Of matrices that are padded for copies in tiles, or whose rows past a length are zeroed."""
    added = not (tiles.apart or tiles.once)
    shared = tiles.shares.count > 1 and not tiles.adds
    matrices = (  # rows, heads, columns; whether some are zeroed; whether its gradient is as wide
        (spec.queries, spec.heads, spec.head_dim, spec.has_query_lengths, not added),
        (spec.keys, spec.kv_heads, spec.head_dim, spec.has_key_lengths, not shared),
        (spec.keys, spec.kv_heads, spec.value_dim, spec.has_key_lengths, not shared),
        (spec.queries, spec.heads, spec.value_dim, False, False),
    )
    found = 0
    for rows, heads, columns, zeroed, has_gradient in matrices:
        shape = (-(-rows // 8) * 8, backward_width(columns))
        pads = shape != (rows, columns) and not by_rows(spec, tiles)
        held = shape if pads else (rows, columns)
        count = (pads or zeroed) + (pads and has_gradient)
        found += count * heads * held[0] * held[1]
    return spec.batch * found * spec.element_bytes
