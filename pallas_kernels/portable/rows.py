"""The query rows of a forward tile, and the queries and heads they are.

Usually all are of one head. When queries are few, `pack` heads of one group share the tile, as all
of them read the same keys; a power of two, the last of which may not exist:

    row       0     1     2     3     4     5    ..
    query     t     t     t     t    t+1   t+1             pack 4, a group of 3 heads
    head      n    n+1   n+2    -     n    n+1
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array

from pallas_kernels.portable.elements import both
from pallas_kernels.portable.triton import Mask, divided, load

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["Rows", "rows_of"]


@dataclass(frozen=True)
class Rows:
    """Indices are columns, (rows, 1); `head` is a scalar where there is only one.

    exists: which rows are rows of the arrays. real: which of these are within the query lengths.
    """

    head: Array
    kv_head: Array
    query: Array
    exists: Mask
    real: Mask


def rows_of(
    spec: AttentionSpec,
    refs: SimpleNamespace,
    *,
    batch: Array,
    pack_index: Array,
    first: Array,
    rows: int,
    pack: int,
) -> Rows:
    """The rows of the tile whose first query is `first`, of one pack of heads."""
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    exists: Mask = None
    if pack == 1:
        head, query = pack_index, first + row
        kv_head, _ = divided(head, spec.group)
    else:
        packs = -(-spec.group // pack)  # of one group
        kv_head, pack_of_group = divided(pack_index, packs)
        later, within_pack = divided(row, pack)
        within = pack_of_group * pack + within_pack
        head, query = kv_head * spec.group + within, first + later
        if spec.group % pack:
            exists = within < spec.group
    if spec.queries % (rows // pack):
        exists = both(exists, query < spec.queries)
    real = exists
    if spec.has_query_lengths:
        real = both(exists, query < load(refs.query_lengths, (batch,)))
    return Rows(head, kv_head, query, exists, real)
