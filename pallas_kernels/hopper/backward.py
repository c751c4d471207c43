"""Attention backward on Hopper (sm_90a): what comes before and after the kernel.

A row that sees no key has log-sum-exp -inf. It is given +inf instead, as are rows past the last
query: exp(S - inf) is zero, so that the kernel knows nothing of them.

The others' log-sum-exp is the sum of two float32, as one has steps of 64 beside 1e9: `high`, it
rounded, and `low`, the rest. Kernels subtract the rest only in groups of heads where it changes
weights by more than 2^-10, that is where some logit is beyond 10,000 or so.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl

from jattn.call.masking import past_zeroed
from pallas_kernels.hopper import (
    backward_bias,
    backward_joined,
    backward_kernel,
    backward_mask,
    backward_queries,
    backward_wide,
    bias_sums,
)
from pallas_kernels.hopper.backward_block import key_gradients
from pallas_kernels.hopper.backward_order import documents_side_by_side
from pallas_kernels.hopper.backward_round import in_rows, rounded
from pallas_kernels.hopper.backward_sums import sums_of_keys, words_of_sums
from pallas_kernels.hopper.backward_tiles import BackwardTiles, by_rows, choose_backward_tiles
from pallas_kernels.hopper.bias_form import writes_gradient
from pallas_kernels.hopper.copies import backward_width, padded_width
from pallas_kernels.hopper.dropout import kept_factor, key_words, words_by_block
from pallas_kernels.hopper.seam import Ref
from pallas_kernels.hopper.softmax import LOG2E
from pallas_kernels.hopper.tiles import ROWS
from pallas_kernels.hopper.visits import edge_padded, in_order, visits, visits_every_block

if TYPE_CHECKING:
    from jattn.call.row_arrays import AnyBackwardRows
    from jattn.call.spec import AttentionSpec, Operands

__all__ = ["backward", "by_block", "in_two"]


def backward(
    spec: AttentionSpec,
    operands: Operands,
    rows: AnyBackwardRows,
    *,
    wants_bias: bool = False,
    wants_scale: bool = False,
    deterministic: bool = False,
    tiles: BackwardTiles | None = None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """Gradients of query, key and value, in the call's dtype, and of the bias if it is wanted.

    Args:
      spec: the call; the kernels' `refusals` must be empty for it.
      operands: its arrays.
      rows: what else each row has, of the output the row term, and maybe the output itself.
      wants_bias: the bias's gradient is asked for: of one that nothing shares, or whose gradient
        is summed by tiles (`bias_form`).
      wants_scale: the gradient of query is to be dS K in float32, not multiplied by the scale.
      deterministic: results are bitwise the same each time.
      tiles: tile shapes to use instead of the table's.
      interpret: run on a CPU, thread by thread.
    """
    tiles = tiles or choose_backward_tiles(spec, deterministic=deterministic, wants_bias=wants_bias)
    query, key, value = operands.query, operands.key, operands.value
    if operands.query_lengths is not None:
        query = past_zeroed(query, operands.query_lengths)
    if operands.key_lengths is not None:
        key, value = (past_zeroed(x, operands.key_lengths) for x in (key, value))
    top, rest, row_term = (jnp.swapaxes(x, 1, 2) for x in (rows.top, rows.rest, rows.of_output))
    if spec.dropout_rate > 0:
        row_term = row_term / kept_factor(spec)
    # In whole tiles of every kernel: a copy of one dimension is not cut at the end of a row.
    whole = tiles.queries if tiles.in_fragments else 2 * ROWS
    count = -(-spec.queries // whole) * whole // tiles.queries
    more = ((0, 0), (0, 0), (0, count * tiles.queries - spec.queries))
    if spec.bias_shape is None:
        high, low = in_two(top, rest * LOG2E)
    else:  # both are natural
        high, low = in_two(top, rest)
        low = low * LOG2E
    if tiles.joined:  # where all low parts count, none that is no number does
        low = jnp.where(jnp.isnan(low), 0, low)
    row_bias = backward_bias.row_vector(spec, operands)
    ranges = visits(
        spec,
        operands,
        queries=tiles.queries,
        keys=tiles.keys,
        parts=tiles.shares.queries,
        every=tiles.once,
    )
    of_turns: dict[str, Array] = {}
    if tiles.in_turns and spec.has_segments:
        ranges, ends = in_order(ranges, count)
        of_turns["tiles_before"] = ends[1 if tiles.upward else 0]
        of_turns["heads_together"] = documents_side_by_side(spec, tiles, ranges)
    matrices = {"q": query, "k": key, "v": value, "do": rows.d_out}
    vectors = [jnp.pad(high, more, constant_values=jnp.inf), jnp.pad(low, more)]
    out = getattr(rows, "out", None)
    if tiles.joined and out is not None:
        matrices["out"] = out
    else:
        vectors.append(jnp.pad(row_term, more))
    if row_bias is not None:
        vectors.append(jnp.pad(row_bias, more))
    inputs = {
        **(matrices if by_rows(spec, tiles) else _whole(matrices)),
        "rows": by_block(*vectors, queries=tiles.queries),
        "ranges": ranges,
        **of_turns,
    }
    if not tiles.joined:
        inputs["largest_low"] = _in_groups(spec, jnp.where(jnp.isnan(low), 0, jnp.abs(low)))
    if spec.has_segments:
        inputs["query_segments"] = edge_padded(operands.query_segments, count * tiles.queries)
        its_rows = -(-spec.keys // tiles.keys) * tiles.keys
        inputs["key_segments"] = edge_padded(operands.key_segments, its_rows)
    if operands.key_lengths is not None:
        inputs["key_lengths"] = jnp.minimum(operands.key_lengths, spec.keys)
    if operands.query_offset is not None:
        inputs["query_offset"] = operands.query_offset
    inputs |= backward_bias.arrays(spec, operands, tiles)
    if spec.mask_shape is not None:
        inputs |= backward_mask.arrays(spec, operands, tiles, ranges, blocks=count)
    if operands.scale is not None:
        inputs["scale"] = operands.scale
    if spec.dropout_rate > 0:
        inputs["words"] = words_by_block(spec, operands, blocks=count, queries=tiles.queries)
        inputs["dropout_words"] = key_words(spec, operands, tiles.keys)
    # About what the scale would be, so that float16 does not overflow; exact as a power of two.
    unit = 2.0 ** -(spec.head_dim.bit_length() // 2) if wants_scale else None
    d_bias: list[Array] = []
    if tiles.joined:
        made = backward_joined.launch(
            spec, operands, tiles, inputs, unscaled=unit, interpret=interpret
        )
    else:
        made = _launch(spec, tiles, inputs, unscaled=unit, interpret=interpret)
    if tiles.joined or tiles.once:
        dq = made["dq"]
    elif tiles.apart:
        writes_bias = wants_bias and writes_gradient(spec)
        dq, *d_bias = backward_queries.launch(
            spec,
            operands,
            inputs,
            unscaled=unit,
            wants_bias=writes_bias,
            in_pieces=tiles.pieces,
            interpret=interpret,
        )
    else:
        unit, dq = None, made["dq"]
        words = made.get("words")
        if tiles.in_fragments and not interpret:
            shape = (inputs["q"].shape[1], inputs["q"].shape[3])
            if wants_scale:
                # Parts of float32 are wider than a tile, so in whole tiles.
                shape = (-(-shape[0] // 8) * 8, padded_width(shape[1]))
                dq = rounded(spec, dq, shape, jnp.float32, kept_factor(spec), words)
            else:
                scale = inputs["scale"] if spec.scale is None else float(spec.scale)
                if spec.dropout_rate > 0:
                    scale = scale * kept_factor(spec)
                dq = rounded(spec, dq, shape, spec.dtype, scale, words)
        else:
            if tiles.in_fragments:
                dq = in_rows(spec, dq, padded_width(spec.head_dim), words)
            if not wants_scale:
                dq = (dq * spec.scale_beside(dq, operands) * kept_factor(spec)).astype(spec.dtype)
            elif spec.dropout_rate > 0:
                dq = dq * kept_factor(spec)
    if wants_bias and not d_bias:
        # Only when dQ is rounded, so that its sums can be where this gradient will be.
        d_bias = [bias_sums.launch(spec, operands, inputs | {"dq": dq}, interpret=interpret)]
    if unit is not None:
        dq = dq.astype(jnp.float32) / unit
    dk, dv = made["dk"], made["dv"]
    if tiles.shares.count > 1 and not tiles.adds:
        dk, dv = (x.sum(axis=0).astype(spec.dtype) for x in (dk, dv))
    return (
        dq[:, : spec.queries, :, : spec.head_dim],
        dk[:, : spec.keys, :, : spec.head_dim],
        dv[:, : spec.keys, :, : spec.value_dim],
        *(x[:, :, : spec.queries, : spec.keys] for x in d_bias),
    )


def in_two(top: Array, rest: Array) -> tuple[Array, Array]:
    """top + rest, rounded, and what that leaves; infinite and 0 of rows without keys."""
    seen = top > -jnp.inf
    top = jnp.where(seen, top, 0)
    high = top + rest
    return jnp.where(seen, high, jnp.inf), jnp.where(seen, (top - high) + rest, 0)


def _in_groups(spec: AttentionSpec, x: Array) -> Array:
    """x (B, N, rows) as (B, K): the largest in a key head's group.

    What is asked of it is asked in the kernel: XLA would make a kernel of that comparison alone.
    """
    return x.reshape(x.shape[0], spec.kv_heads, -1).max(axis=2)


def by_block(*vectors: Array, queries: int) -> Array:
    """Each (B, N, rows), as (B, N, blocks, vectors, queries): a block's are copied together.

    By choices, which XLA makes together with the vectors, and not by a concatenation, which it
    makes by itself.
    """
    parts = [x.reshape(*x.shape[:2], -1, 1, queries) for x in vectors]
    which = lax.broadcasted_iota(jnp.int32, (len(parts), queries), 0)
    return functools.reduce(
        lambda made, i: jnp.where(which == i, parts[i], made), range(1, len(parts)), parts[0]
    )


def _launch(
    spec: AttentionSpec,
    tiles: BackwardTiles,
    inputs: dict[str, Array],
    *,
    unscaled: float | None,
    interpret: bool,
) -> dict[str, Array]:
    """What the kernel makes, by name.

    dk, dv: as `key_gradients` says.
    dq: if the kernel makes it; where `tiles.once` in the call's dtype, else unscaled in float32, as
      the kernel stores it or adds to it.
    words: one for each block of queries, 0 of those that no tile visits, whose dQ is not stored; if
      that may be.
    """
    kernel = backward_wide if tiles.warpgroups == 1 else backward_kernel
    results = dict(zip(("dk", "dv"), key_gradients(spec, tiles, inputs), strict=True))
    changed: dict[str, Array] = {}
    options: dict[str, Any] = {"interpret": interpret}
    b, n, blocks, _, queries = inputs["rows"].shape
    head = padded_width(inputs["q"].shape[3])
    shape: tuple[int, ...] = (b, blocks * queries, n, head)
    if tiles.in_fragments:
        shape = backward_kernel.fragments(tiles, inputs)
    if tiles.once:
        results["dq"] = jax.ShapeDtypeStruct(inputs["q"].shape, spec.dtype)
        options["unscaled"] = unscaled
    elif tiles.first_stores:
        results["dq"] = jax.ShapeDtypeStruct(shape, jnp.float32)
        changed["words"] = jnp.zeros(b * n * blocks, jnp.int32)
    elif not tiles.apart:
        # Of this call's own zero: of one, XLA makes those of all calls together, before the first.
        zero, rows = lax.optimization_barrier((jnp.zeros((), jnp.float32), inputs["rows"]))
        inputs = inputs | {"rows": rows}
        changed["dq"] = jnp.broadcast_to(zero, shape)
    if tiles.adds:
        results["sums"] = sums_of_keys(spec, tiles, inputs)
        changed["words_of_sums"] = words_of_sums(spec, tiles)
    if not changed:
        found = kernel.launch(spec, tiles, inputs, **options)
        return dict(zip(results, found, strict=True))

    def run(refs: tuple[dict[str, Ref], dict[str, Ref]]) -> None:
        mine, others = refs
        found = kernel.launch(spec, tiles, inputs, **mine, **options)
        for name, x in zip(results, found, strict=True):
            others[name][...] = x

    # Not by `new_ref`, whose effect cannot be partitioned.
    made = {name: jnp.zeros(x.shape, x.dtype) for name, x in results.items()}
    changed, made = pl.run_state(run)((changed, made))
    if tiles.first_stores and visits_every_block(spec, queries=tiles.queries, keys=tiles.keys):
        del changed["words"]
    return changed | made


def _whole(matrices: dict[str, Array]) -> dict[str, Array]:
    """Each (B, rows, heads, columns), padded to what copies in tiles need."""

    def padded(x: Array) -> Array:
        more = (-x.shape[1] % 8, backward_width(x.shape[3]) - x.shape[3])
        return x if more == (0, 0) else jnp.pad(x, ((0, 0), (0, more[0]), (0, 0), (0, more[1])))

    return {name: padded(x) for name, x in matrices.items()}
