"""Gradients of attention, for any NVIDIA GPU: of keys and values, and of queries, by two kernels.

    S = Q Kᵀ     P = exp(S - lse)     dV = Pᵀ dO     dP = dO Vᵀ     dS = P (dP - D)
                                      dK = dSᵀ Q scale              dQ = dS K scale

D being the row term, rowsum(O dO) less the gradient of the log-sum-exp. Under a soft cap dz is dS
times its slope, and what stands for dS in dK and dQ (`weights`); dx is dS itself.

(Dao et al., 2022, algorithm 4; Dao, 2023, section 3.2.) No program adds to what another writes, so
results are bitwise the same each time, at the price of computing S and dP twice:

    keys      K V (keys, H)   | Q_i dO_i | Q_i dO_i | ...     of each head of the group in turn
              dK dV           |   mask   |  clear   | ...     summed in float32 registers

    queries   Q dO (rows, H)  | K_j V_j  | K_j V_j  | ...
              dQ              |   clear  |  mask    | ...

The first works on Sᵀ, keys down, so that Pᵀ and dSᵀ are left operands of their products. A bias's
gradient dS, less the cap's slope, is summed where it is made: over queries by the first kernel,
over keys by the second, which also writes it whole where nothing is summed. The
sum over batch rows or heads is `bias_gradient`'s.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array, lax

from jattn.call.masking import hides_some
from pallas_kernels.portable import columns
from pallas_kernels.portable.elements import placed, scale_of
from pallas_kernels.portable.ends import key_limit, past, present, query_limit
from pallas_kernels.portable.grid import Grid, key_grid, query_grid
from pallas_kernels.portable.launch import Results, launch
from pallas_kernels.portable.ranges import key_ranges, key_sides, query_ranges, query_sides
from pallas_kernels.portable.spans import keys_down, queries_down, span, visit
from pallas_kernels.portable.tiles import Tiles
from pallas_kernels.portable.triton import Mask, divided, load, store
from pallas_kernels.portable.weights import Numbers, dropout_factor, gradients

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec, Operands

__all__ = ["key_gradients", "query_gradients", "row_numbers"]

type Inputs = dict[str, Array]
type Gradients = tuple[columns.Sums, columns.Sums]  # dK and dV
type KeyState = tuple[Gradients, Array | None]  # and a bias's, summed over queries
type QueryState = tuple[columns.Sums, Array | None]  # dQ, and a bias's, summed over keys


def key_gradients(
    spec: AttentionSpec,
    operands: Operands,
    inputs: Inputs,
    tiles: Tiles,
    *,
    sums_bias: bool,
    interpret: bool,
) -> dict[str, Array]:
    """By name dK and dV, "dk" and "dv", in the call's dtype; with `sums_bias` also the bias's
    gradient summed over queries, "column_sums", (B, N, S) float32.
    """
    inputs = inputs | {
        "ranges": query_ranges(spec, operands, queries=tiles.queries, keys=tiles.keys)
    }
    rows = (spec.batch, spec.keys, spec.kv_heads)
    results = {
        "dk": jax.ShapeDtypeStruct((*rows, spec.head_dim), spec.dtype),
        "dv": jax.ShapeDtypeStruct((*rows, spec.value_dim), spec.dtype),
    }
    if sums_bias:
        shape = (spec.batch, spec.heads, spec.keys)
        results["column_sums"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    grid = key_grid(spec, tiles.keys)
    return launch(
        partial(_key_kernel, spec, tiles, grid), inputs, results, grid=grid.sizes, tiles=tiles,
        name="key_gradients", interpret=interpret,
    )  # fmt: skip


def _key_kernel(
    spec: AttentionSpec, tiles: Tiles, grid: Grid, refs: SimpleNamespace, results: Results
) -> None:
    tile, kv_head, batch = grid.place()
    key_end = key_limit(spec, refs, batch, tiles.keys)
    keys = span(tile * tiles.keys, tiles.keys, key_end)
    k = columns.read(refs.k, spec.head_dim, batch, keys.down, kv_head, keys.exists_down)
    v = columns.read(refs.v, spec.value_dim, batch, keys.down, kv_head, keys.exists_down)
    sides = query_sides(spec, tiles.queries)
    limit = query_limit(spec, refs, batch, tiles.queries)
    # Keys past the length are written, as zeros; those past the array are not.
    exists = span(tile * tiles.keys, tiles.keys, past(spec.keys, tiles.keys)).exists_down
    own = replace(keys, exists_down=exists)
    factor = dropout_factor(spec)

    def of_head(g: Array | int, sums: Gradients) -> Gradients:
        head = kv_head * spec.group + g

        def step(i: Array, state: KeyState, *, masked: bool) -> KeyState:
            (dk, dv), column = state
            queries = span(i * tiles.queries, tiles.queries, limit if masked else None)
            rows = (batch, queries.down, head, queries.exists_down)
            q = columns.read(refs.q, spec.head_dim, *rows)
            d_out = columns.read(refs.d_out, spec.value_dim, *rows)
            at = keys_down(batch, head, queries, own, tile * tiles.keys, masked=masked)
            s = columns.against(k, q)  # Sᵀ = K Qᵀ
            dp = columns.against(v, d_out)  # dPᵀ = V dOᵀ
            numbers = row_numbers(refs, batch, head, queries.across, queries.exists_across)
            p, dx, dz = gradients(spec, refs, at, numbers, s, dp)
            dv = columns.plus(dv, columns.times(p, d_out))  # dV += Pᵀ dO
            dk = columns.plus(dk, columns.times(dz, q))  # dK += dSᵀ Q
            if column is not None:
                column = column + dx.sum(axis=1, keepdims=True)
            return (dk, dv), column

        column = None
        if "column_sums" in results:
            column = jnp.zeros((tiles.keys, 1), jnp.float32)
        sums, column = visit(refs.ranges, batch, tile, sides, step, (sums, column))
        if column is not None:
            index = (batch, head, keys.down)
            column = present(column * factor, keys.exists_down)
            store(results["column_sums"], index, column, exists)
        return sums

    sums = columns.zeros(tiles.keys, spec.head_dim), columns.zeros(tiles.keys, spec.value_dim)
    if spec.group == 1:
        dk, dv = of_head(0, sums)
    else:
        dk, dv = lax.fori_loop(0, spec.group, of_head, sums)
    for ref, size, x, scale in (
        (results["dk"], spec.head_dim, dk, scale_of(spec, refs, batch)),
        (results["dv"], spec.value_dim, dv, 1),
    ):
        whole = tuple(present(part * (scale * factor), keys.exists_down) for part in x)
        columns.write(ref, size, (batch,), keys.down, kv_head, whole, exists)


def query_gradients(
    spec: AttentionSpec,
    operands: Operands,
    inputs: Inputs,
    tiles: Tiles,
    *,
    bias: str | None,
    unscaled: bool,
    interpret: bool,
) -> dict[str, Array]:
    """By name dQ, "dq", in the call's dtype, or unscaled in float32; and of the bias as asked:

    "whole": its gradient, "d_bias", (B, N, T, S) in its dtype;
    "rows": that summed over keys, "row_sums", (B, N, T) float32.
    """
    inputs = inputs | {"ranges": key_ranges(spec, operands, queries=tiles.queries, keys=tiles.keys)}
    rows = (spec.batch, spec.queries, spec.heads)
    dtype = jnp.float32 if unscaled else spec.dtype
    results = {"dq": jax.ShapeDtypeStruct((*rows, spec.head_dim), dtype)}
    if bias == "whole":
        assert spec.d_bias_shape is not None
        assert spec.bias_dtype is not None
        results["d_bias"] = jax.ShapeDtypeStruct(spec.d_bias_shape, spec.bias_dtype)
    elif bias == "rows":
        shape = (spec.batch, spec.heads, spec.queries)
        results["row_sums"] = jax.ShapeDtypeStruct(shape, jnp.float32)
    grid = query_grid(spec, tiles.queries)
    return launch(
        partial(_query_kernel, spec, tiles, grid, unscaled=unscaled), inputs, results,
        grid=grid.sizes, tiles=tiles, name="query_gradients", interpret=interpret,
        # Blocks that no program visits stay as they are.
        zeroed=["d_bias"] if bias == "whole" and hides_some(spec) else [],
    )  # fmt: skip


def _query_kernel(
    spec: AttentionSpec,
    tiles: Tiles,
    grid: Grid,
    refs: SimpleNamespace,
    results: Results,
    *,
    unscaled: bool,
) -> None:
    tile, head, batch = grid.place()
    kv_head, _ = divided(head, spec.group)
    limit = query_limit(spec, refs, batch, tiles.queries)
    queries = span(tile * tiles.queries, tiles.queries, limit)
    exists = span(
        tile * tiles.queries, tiles.queries, past(spec.queries, tiles.queries)
    ).exists_down
    q = columns.read(refs.q, spec.head_dim, batch, queries.down, head, queries.exists_down)
    d_out = columns.read(refs.d_out, spec.value_dim, batch, queries.down, head, queries.exists_down)
    numbers = row_numbers(refs, batch, head, queries.down, queries.exists_down)
    key_end = key_limit(spec, refs, batch, tiles.keys)
    d_bias, row_sums = (results.get(name) for name in ("d_bias", "row_sums"))
    factor = dropout_factor(spec)

    def step(j: Array, state: QueryState, *, masked: bool) -> QueryState:
        dq, row = state
        keys = span(j * tiles.keys, tiles.keys, key_end if masked else None)
        at = queries_down(batch, head, queries, keys, j * tiles.keys, masked=masked)
        k = columns.read(refs.k, spec.head_dim, batch, keys.down, kv_head, keys.exists_down)
        v = columns.read(refs.v, spec.value_dim, batch, keys.down, kv_head, keys.exists_down)
        s = columns.against(q, k)  # S = Q Kᵀ
        dp = columns.against(d_out, v)  # dP = dO Vᵀ
        _, dx, dz = gradients(spec, refs, at, numbers, s, dp)
        dq = columns.plus(dq, columns.times(dz, k))  # dQ += dS K
        if d_bias is not None:
            index, inside = placed(spec, "d_bias", d_bias.shape, at)
            store(d_bias, index, dx * factor, inside)
        if row is not None:
            row = row + dx.sum(axis=1, keepdims=True)
        return dq, row

    row = None if row_sums is None else jnp.zeros((tiles.queries, 1), jnp.float32)
    state = columns.zeros(tiles.queries, spec.head_dim), row
    sides = key_sides(spec, tiles.keys)
    dq, row = visit(refs.ranges, batch, tile, sides, step, state)
    scale = 1 if unscaled else scale_of(spec, refs, batch)
    dq = tuple(part * (scale * factor) for part in dq)
    columns.write(results["dq"], spec.head_dim, (batch,), queries.down, head, dq, exists)
    if row is not None:
        store(row_sums, (batch, head, queries.down), row * factor, exists)


def row_numbers(
    refs: SimpleNamespace, batch: Array, head: Array, query: Array, inside: Mask
) -> Numbers:
    """Those of rows that do not exist give them no weight."""
    index = (batch, head, query)
    top = load(refs.top, index, inside, math.inf)
    return top, load(refs.rest, index, inside), load(refs.row_term, index, inside)
