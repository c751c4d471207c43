"""Block sizes by kernel, head dim, dtype and what a multiprocessor of the GPU has.

Shared memory a program may use: 227 KiB on data-centre Hopper and Blackwell, 163 on an A100, 99 on
workstation GPUs. Only an H200 was there to time them: see docs/kernels.md. For all others a tile is
what fits the least of these, where it can, and spills no register.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from jattn.call.masking import hides_some
from jattn.call.target import current_target
from pallas_kernels.portable.precision import term_count

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = [
    "BackwardTiles",
    "Table",
    "Tiles",
    "bias_tiles",
    "chunked_tiles",
    "forward_tiles",
    "key_tiles",
    "query_tiles",
    "table_of",
    "tables",
]


class Tiles(NamedTuple):
    """Queries by keys of a tile of logits, the program's warps and its pipeline's depth."""

    queries: int
    keys: int
    warps: int
    stages: int


class BackwardTiles(NamedTuple):
    """Those of the kernel of keys' gradients, of queries', and of a shared bias's."""

    keys: Tiles
    queries: Tiles
    bias: Tiles


class Table(NamedTuple):
    """Of one width: the tiles of flash forward, the same with masks or dropout, with a bias
    or dense mask; of query-chunked forward; and of keys', queries' and shared bias's gradients.
    """

    forward: Tiles
    masked: Tiles
    biased: Tiles
    chunked: Tiles
    keys: Tiles
    queries: Tiles
    bias: Tiles


def _table(*rows: tuple[int, int, int, int]) -> Table:
    forward, masked, biased, chunked, keys, queries, bias = (Tiles(*row) for row in rows)
    return Table(forward, masked, biased, chunked, keys, queries, bias)


# By the larger head dim, up to. Of two-byte floats on Hopper, where matrix instructions take 64
# rows of four warps and read operands from shared memory:
HOPPER = {
    32: _table(
        (64, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3),
        (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3),
    ),
    64: _table(
        (64, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 3),
        (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (128, 64, 8, 2),
    ),
    128: _table(
        (128, 64, 4, 2), (64, 64, 4, 3), (128, 64, 8, 3),
        (128, 64, 4, 2), (64, 64, 4, 2), (128, 64, 8, 3), (128, 64, 8, 2),
    ),
    256: _table(
        (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2),
        (128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 1),
    ),
    512: _table(
        (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2),
        (64, 32, 8, 2), (32, 32, 8, 1), (64, 32, 8, 1), (64, 32, 8, 1),
    ),
}  # fmt: skip
# And on all others:
OTHERS = {
    64: _table(
        (128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 4, 3),
        (128, 64, 4, 3), (32, 64, 4, 3), (64, 64, 4, 3), (64, 32, 4, 2),
    ),
    128: _table(
        (128, 64, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2),
        (128, 32, 8, 3), (32, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2),
    ),
    256: _table(
        (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2),
        (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2),
    ),
    512: _table(
        (32, 16, 8, 1), (32, 16, 8, 1), (32, 16, 8, 1),
        (32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 4, 2),
    ),
}  # fmt: skip
# Of float32 in three terms, and in two, as many times the shared memory.
HOPPER_THREE_TERMS = {
    64: _table(*[(64, 32, 4, 2)] * 4, (64, 64, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1)),
    128: _table(*[(64, 64, 4, 1)] * 4, (32, 64, 4, 2), (64, 64, 4, 1), (64, 32, 4, 1)),
    256: _table(*[(64, 32, 4, 1)] * 4, (16, 16, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1)),
    512: _table(*[(16, 32, 4, 1)] * 4, *[(16, 16, 4, 1)] * 3),
}
HOPPER_TWO_TERMS = {
    64: _table(
        *[(64, 32, 4, 3)] * 3, (64, 64, 4, 1), (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 2)
    ),
    128: _table(*[(64, 64, 4, 1)] * 4, (64, 64, 4, 2), (64, 64, 4, 2), (64, 32, 4, 1)),
    256: _table(*[(64, 32, 4, 1)] * 4, (32, 32, 4, 1), (16, 32, 4, 1), (32, 32, 4, 1)),
    512: _table(*[(16, 32, 4, 1)] * 4, (16, 16, 4, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
}
OTHERS_THREE_TERMS = {
    64: _table(*[(64, 32, 4, 2)] * 4, *[(32, 32, 4, 1)] * 3),
    128: _table(*[(32, 32, 4, 1)] * 4, (16, 32, 4, 1), (32, 16, 8, 1), (16, 32, 4, 1)),
    256: _table(*[(16, 16, 8, 1)] * 7),
    512: _table(*[(16, 16, 8, 1)] * 7),
}
OTHERS_TWO_TERMS = {
    64: _table(*[(64, 32, 4, 2)] * 4, *[(32, 32, 4, 1)] * 3),
    128: _table(*[(32, 32, 4, 1)] * 4, (16, 32, 4, 1), (32, 16, 8, 1), (16, 32, 4, 1)),
    256: _table(*[(16, 16, 8, 1)] * 7),
    512: _table(*[(16, 16, 8, 1)] * 7),
}


def tables(spec: AttentionSpec, capability: tuple[int, int] | None) -> dict[int, Table]:
    """The table of a call's dtype and precision, by compute capability."""
    found = (OTHERS, OTHERS_TWO_TERMS, OTHERS_THREE_TERMS)
    if capability in (None, (9, 0)):
        found = (HOPPER, HOPPER_TWO_TERMS, HOPPER_THREE_TERMS)
    return found[term_count(spec) - 1]


def table_of(spec: AttentionSpec) -> Table:
    """The tiles of a call, on the GPU that it is traced for."""
    found = tables(spec, current_target().compute_capability)
    size = max(spec.head_dim, spec.value_dim)
    return found[min(width for width in found if width >= size)]


def forward_tiles(spec: AttentionSpec) -> Tiles:
    """Those of flash forward."""
    table = table_of(spec)
    if spec.bias_shape is not None or spec.mask_shape is not None:
        return table.biased
    is_masked = hides_some(spec) or spec.keys % table.forward.keys != 0
    return table.masked if is_masked or spec.dropout_rate > 0 else table.forward


def chunked_tiles(spec: AttentionSpec) -> Tiles:
    """Those of query-chunked forward."""
    table = table_of(spec)
    if spec.bias_shape is not None or spec.mask_shape is not None:
        return table.biased
    return table.masked if spec.dropout_rate > 0 else table.chunked


def key_tiles(spec: AttentionSpec) -> Tiles:
    """Those of the kernel of keys' and values' gradients."""
    return table_of(spec).keys


def query_tiles(spec: AttentionSpec) -> Tiles:
    """Those of the kernel of queries' gradients."""
    tiles = table_of(spec).queries
    if spec.bias_dtype is not None and spec.bias_dtype.itemsize > spec.element_bytes:
        # Blocks of a wider bias beside keys and values: three of them have no room at 128.
        return tiles._replace(stages=min(tiles.stages, 2))
    return tiles


def bias_tiles(spec: AttentionSpec) -> Tiles:
    """Those of the kernel of a shared bias's gradient."""
    return table_of(spec).bias
