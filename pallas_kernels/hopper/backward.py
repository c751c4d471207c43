"""Attention backward on Hopper (sm_90a): what comes before and after the kernel.

A row that sees no key has log-sum-exp -inf. It is given +inf instead, as are rows past the last
query: exp(S - inf) is zero, so that the kernel knows nothing of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from jattn.masking import past_zeroed
from pallas_kernels.hopper import backward_kernel, backward_wide
from pallas_kernels.hopper.backward_tiles import BackwardTiles, choose_backward_tiles
from pallas_kernels.hopper.seam import Ref
from pallas_kernels.hopper.softmax import LOG2E
from pallas_kernels.hopper.tiles import ROWS
from pallas_kernels.hopper.visits import edge_padded, visitors, visits

if TYPE_CHECKING:
    from jattn.spec import AttentionSpec, Operands

__all__ = ["backward"]


def backward(
    spec: AttentionSpec,
    operands: Operands,
    lse: Array,
    row_term: Array,
    d_out: Array,
    *,
    deterministic: bool = False,
    tiles: BackwardTiles | None = None,
    interpret: bool = False,
) -> tuple[Array, Array, Array]:
    """Gradients of query, key and value, in the call's dtype.

    Args:
      spec: the call; the kernels' `refusals` must be empty for it.
      operands: its arrays.
      lse: (B, T, N) float32, natural logarithm, what forward gave.
      row_term: (B, T, N) float32, rowsum(O dO) less the gradient of the log-sum-exp; 0 of rows
        that see no key.
      d_out: (B, T, N, D), gradient of the output; 0 past the query lengths.
      deterministic: tiles of keys add to a query's gradient in one fixed order, so that results
        are bitwise the same each time.
      tiles: tile shapes to use instead of the table's.
      interpret: run on a CPU, thread by thread.
    """
    tiles = tiles or choose_backward_tiles(spec)
    query, key, value = operands.query, operands.key, operands.value
    if operands.query_lengths is not None:
        query = past_zeroed(query, operands.query_lengths)
    if operands.key_lengths is not None:
        key, value = (past_zeroed(x, operands.key_lengths) for x in (key, value))
    lse, row_term = (jnp.swapaxes(x, 1, 2) for x in (lse, row_term))

    count = -(-spec.queries // tiles.queries)
    more = ((0, 0), (0, 0), (0, count * tiles.queries - spec.queries))
    ranges = visits(spec, operands, queries=tiles.queries, keys=tiles.keys, monotone=deterministic)
    inputs = {
        "q": _whole(query, tiles),
        "k": _whole(key, tiles),
        "v": _whole(value, tiles),
        "do": _whole(d_out, tiles),
        "lse": jnp.pad(
            jnp.where(lse > -jnp.inf, lse * LOG2E, jnp.inf), more, constant_values=jnp.inf
        ),
        "row_term": jnp.pad(row_term, more),
        "ranges": ranges,
    }
    if spec.has_segments:
        inputs["query_segments"] = edge_padded(operands.query_segments, count * tiles.queries)
        inputs["key_segments"] = edge_padded(operands.key_segments, ranges.shape[1] * tiles.keys)
    if operands.key_lengths is not None:
        inputs["key_lengths"] = jnp.minimum(operands.key_lengths, spec.keys)
    if deterministic:
        inputs["visitors"] = visitors(ranges, count)
    kernel = backward_kernel if tiles.warpgroups > 1 else backward_wide

    def run(results: tuple[Ref, Ref, Ref]) -> None:
        dq, dk, dv = results
        dk[...], dv[...] = kernel.launch(spec, tiles, inputs, dq, interpret=interpret)

    # Not by `new_ref`, whose effect cannot be partitioned.
    dq_shape = (spec.batch, count * tiles.queries, spec.heads, inputs["q"].shape[3])
    zeros = jnp.zeros(dq_shape, jnp.float32), *(jnp.zeros_like(inputs[name]) for name in "kv")
    dq, dk, dv = pl.run_state(run)(zeros)
    dq = dq[:, : spec.queries, :, : spec.head_dim] * spec.scale
    return (
        dq.astype(spec.dtype),
        dk[:, : spec.keys, :, : spec.head_dim],
        dv[:, : spec.keys, :, : spec.value_dim],
    )


def _whole(x: Array, tiles: BackwardTiles) -> Array:
    """x (B, rows, heads, columns), padded to what tiles of 8 by 64 need."""
    # 64 for each warpgroup that shares dQ's columns.
    columns = 64 * tiles.warpgroups if tiles.queries == ROWS else 64
    more = (-x.shape[1] % 8, -x.shape[3] % columns)
    return x if more == (0, 0) else jnp.pad(x, ((0, 0), (0, more[0]), (0, 0), (0, more[1])))
