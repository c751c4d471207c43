"""How the gradients of attention change, for any NVIDIA GPU: by three kernels, as the gradients.

    tdQ = scale (tdz K + dz tK) + tscale dz K        tdV = tPᵀ dO + Pᵀ tdO
    tdK = scale (tdzᵀ Q + dzᵀ tQ) + tscale dzᵀ Q     tdbias = tdx

(the derivatives of `flash_backward`'s equations; those of a tile are in `weight_tangents`.) Weights
and both gradients of the logits are made again from the log-sum-exp, its tangent, D and tD:

    keys      K tK V tV (keys, H)      | Q_i tQ_i dO_i tdO_i | ...    of each head of the group
              tdK tdV                  |   10 products       |        in turn

    queries   Q tQ dO tdO (rows, H)    | K_j tK_j V_j tV_j   | ...
              tdQ                      |   8 products        |

What has no tangent is not read, and no product made with it. As in `flash_backward` no program adds
to what another writes, so that results are bitwise the same each time.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array, lax

from jattn.call.masking import hides_some
from jattn.call.row_arrays import BackwardRows
from pallas_kernels.portable import columns
from pallas_kernels.portable.bias_gradient import summed, sums_over_shares, way_of
from pallas_kernels.portable.columns import Matrix, Sums
from pallas_kernels.portable.elements import Place, placed, scale_of
from pallas_kernels.portable.ends import key_limit, past, present, query_limit
from pallas_kernels.portable.grid import Grid, key_grid, query_grid
from pallas_kernels.portable.inputs import backward_inputs, tangent_inputs
from pallas_kernels.portable.launch import Results, launch
from pallas_kernels.portable.precision import factor
from pallas_kernels.portable.ranges import key_ranges, key_sides, query_ranges, query_sides
from pallas_kernels.portable.spans import Span, keys_down, queries_down, span, visit
from pallas_kernels.portable.tangent_tiles import backward_tangent_tiles
from pallas_kernels.portable.tiles import BackwardTiles, Tiles
from pallas_kernels.portable.triton import divided, store
from pallas_kernels.portable.weight_tangents import (
    Gradients,
    gradients,
    key_side,
    query_side,
    row_numbers,
    scale_tangent_of,
)
from pallas_kernels.portable.weights import dropout_factor

if TYPE_CHECKING:
    from jattn.call.row_arrays import BackwardTangentRows
    from jattn.call.spec import AttentionSpec, Operands, Tangents

__all__ = ["backward_tangent"]

type Inputs = dict[str, Array]
type State = dict[str, Sums]  # sums so far by name; those of one column are a single matrix


def backward_tangent(
    spec: AttentionSpec,
    operands: Operands,
    rows: BackwardTangentRows,
    tangents: Tangents,
    *,
    wanted: tuple[str, ...],
    tiles: BackwardTiles | None = None,
    interpret: bool = False,
) -> tuple[Array, ...]:
    """Tangents of the gradients that are wanted, in that order.

    Those of query, key and value are in the call's dtype and of the bias in its own. Of the scale
    it is the part of each row, (B, T, N) float32, that is to be summed.

    Args:
      spec: the call; `refusals` must be empty for it.
      operands: its arrays; sinks are not looked at.
      rows: what else each row has; in the equations row_term is D, t_lse mu and t_row_term tD.
      tangents: what has one.
      wanted: of "query", "key", "value", "bias" and "scale".
      tiles: tile shapes to use instead of the tables'.
      interpret: run on a CPU.
    """
    tiles = tiles or backward_tangent_tiles(spec)
    own = BackwardRows(rows.top, rows.rest, rows.row_term, rows.d_out)
    inputs = backward_inputs(spec, operands, own)
    inputs |= tangent_inputs(spec, tangents)
    inputs["mu"] = jnp.swapaxes(rows.t_lse, 1, 2)
    inputs["t_row_term"] = jnp.swapaxes(rows.t_row_term, 1, 2)
    if rows.td_out is not None:
        inputs["t_d_out"] = factor(spec, rows.td_out)
    way = way_of(spec) if "bias" in wanted else None
    found: dict[str, Array] = {}
    of_keys: list[str] = [name for name in ("key", "value") if name in wanted]
    if way == "columns":
        of_keys.append("column_sums")
    if of_keys:
        found |= _by_keys(spec, operands, inputs, tiles.keys, of_keys, interpret=interpret)
    of_queries: list[str] = [name for name in ("query", "scale") if name in wanted]
    if way in ("rows", "whole"):
        of_queries.append({"rows": "row_sums", "whole": "bias"}[way])
    if of_queries:
        found |= _by_queries(spec, operands, inputs, tiles.queries, of_queries, interpret=interpret)
    if way == "shared":
        found["bias"] = _shared(spec, inputs, tiles.bias, interpret=interpret)
    elif way == "rows":
        found["bias"] = summed(spec, found["row_sums"][..., None])
    elif way == "columns":
        found["bias"] = summed(spec, found["column_sums"][:, :, None])
    return tuple(found[name] for name in wanted)


def _by_keys(
    spec: AttentionSpec,
    operands: Operands,
    inputs: Inputs,
    tiles: Tiles,
    wanted: list[str],
    *,
    interpret: bool,
) -> dict[str, Array]:
    """Of key and value, and the bias's sums over queries, "column_sums", (B, N, S) float32."""
    ranges = query_ranges(spec, operands, queries=tiles.queries, keys=tiles.keys)
    inputs = inputs | {"ranges": ranges}
    rows = (spec.batch, spec.keys, spec.kv_heads)
    shapes = {
        "key": jax.ShapeDtypeStruct((*rows, spec.head_dim), spec.dtype),
        "value": jax.ShapeDtypeStruct((*rows, spec.value_dim), spec.dtype),
        "column_sums": jax.ShapeDtypeStruct((spec.batch, spec.heads, spec.keys), jnp.float32),
    }
    grid = key_grid(spec, tiles.keys)
    return launch(
        partial(_key_kernel, spec, tiles, grid), inputs, {name: shapes[name] for name in wanted},
        grid=grid.sizes, tiles=tiles, name="key_gradient_tangents", interpret=interpret,
    )  # fmt: skip


def _key_kernel(
    spec: AttentionSpec, tiles: Tiles, grid: Grid, refs: SimpleNamespace, results: Results
) -> None:
    tile, kv_head, batch = grid.place()
    first = tile * tiles.keys
    keys = span(first, tiles.keys, key_limit(spec, refs, batch, tiles.keys))
    own = key_side(spec, refs, batch, keys.down, kv_head, keys.exists_down)
    sides = query_sides(spec, tiles.queries)
    limit = query_limit(spec, refs, batch, tiles.queries)
    # Keys past the length are written, as zeros; those past the array are not.
    exists = span(first, tiles.keys, past(spec.keys, tiles.keys)).exists_down
    inside = replace(keys, exists_down=exists)
    factor = dropout_factor(spec)

    def of_head(g: Array | int, sums: State) -> State:
        head = kv_head * spec.group + g

        def step(i: Array, state: State, *, masked: bool) -> State:
            queries = span(i * tiles.queries, tiles.queries, limit if masked else None)
            its = query_side(spec, refs, batch, queries.down, head, queries.exists_down)
            at = keys_down(batch, head, queries, inside, first, masked=masked)
            numbers = row_numbers(refs, batch, head, queries.across, queries.exists_across)
            found = gradients(spec, refs, at, numbers, own, its)
            state = dict(state)
            if "value" in state:
                pairs = [(found.t_kept, its.y), (found.kept, its.ty)]
                state["value"] = _plus_products(state["value"], pairs)
            if "key" in state:
                dz, t_dz = _scaled(spec, refs, batch, found)
                state["key"] = _plus_products(state["key"], [(t_dz, its.x), (dz, its.tx)])
            if "column_sums" in state:
                added = found.t_dx.sum(axis=1, keepdims=True)
                state["column_sums"] = columns.plus(state["column_sums"], (added,))
            return state

        own_sums = {"column_sums": (jnp.zeros((tiles.keys, 1), jnp.float32),)}
        start = sums | {name: x for name, x in own_sums.items() if name in results}
        found = visit(refs.ranges, batch, tile, sides, step, start)
        if "column_sums" in results:
            (column,) = found.pop("column_sums")
            column = present(column * factor, keys.exists_down)
            store(results["column_sums"], (batch, head, keys.down), column, exists)
        return found

    sizes = {"key": spec.head_dim, "value": spec.value_dim}
    sums = {name: columns.zeros(tiles.keys, sizes[name]) for name in sizes if name in results}
    sums = of_head(0, sums) if spec.group == 1 else lax.fori_loop(0, spec.group, of_head, sums)
    for name, x in sums.items():
        scale = factor * _scale_left(spec, refs, batch) if name == "key" else factor
        whole = tuple(present(part * scale, keys.exists_down) for part in x)
        columns.write(results[name], sizes[name], (batch,), keys.down, kv_head, whole, exists)


def _by_queries(
    spec: AttentionSpec,
    operands: Operands,
    inputs: Inputs,
    tiles: Tiles,
    wanted: list[str],
    *,
    interpret: bool,
) -> dict[str, Array]:
    """Of query; the scale's by row; and the bias's whole, or its sums over keys, "row_sums"."""
    inputs = inputs | {"ranges": key_ranges(spec, operands, queries=tiles.queries, keys=tiles.keys)}
    rows = (spec.batch, spec.queries, spec.heads)
    by_head = (spec.batch, spec.heads, spec.queries)
    shapes = {
        "query": ((*rows, spec.head_dim), spec.dtype),
        "scale": (rows, jnp.float32),
        "row_sums": (by_head, jnp.float32),
        "bias": (spec.d_bias_shape, spec.bias_dtype),
    }
    results = {name: jax.ShapeDtypeStruct(*shapes[name]) for name in wanted}
    grid = query_grid(spec, tiles.queries)
    return launch(
        partial(_query_kernel, spec, tiles, grid), inputs, results, grid=grid.sizes, tiles=tiles,
        name="query_gradient_tangents", interpret=interpret,
        # Blocks that no program visits stay as they are.
        zeroed=["bias"] if "bias" in wanted and hides_some(spec) else [],
    )  # fmt: skip


def _query_kernel(
    spec: AttentionSpec, tiles: Tiles, grid: Grid, refs: SimpleNamespace, results: Results
) -> None:
    tile, head, batch = grid.place()
    kv_head, _ = divided(head, spec.group)
    first = tile * tiles.queries
    queries = span(first, tiles.queries, query_limit(spec, refs, batch, tiles.queries))
    exists = span(first, tiles.queries, past(spec.queries, tiles.queries)).exists_down
    own = query_side(spec, refs, batch, queries.down, head, queries.exists_down)
    numbers = row_numbers(refs, batch, head, queries.down, queries.exists_down)
    key_end = key_limit(spec, refs, batch, tiles.keys)
    factor = dropout_factor(spec)

    def step(j: Array, state: State, *, masked: bool) -> State:
        keys = span(j * tiles.keys, tiles.keys, key_end if masked else None)
        its = key_side(spec, refs, batch, keys.down, kv_head, keys.exists_down)
        at = queries_down(batch, head, queries, keys, j * tiles.keys, masked=masked)
        found = gradients(spec, refs, at, numbers, own, its)
        state = dict(state)
        if "query" in state:
            dz, t_dz = _scaled(spec, refs, batch, found)
            state["query"] = _plus_products(state["query"], [(t_dz, its.x), (dz, its.tx)])
        if "scale" in state:
            added = found.by_scale().sum(axis=1, keepdims=True)
            state["scale"] = columns.plus(state["scale"], (added,))
        if "row_sums" in state:
            added = found.t_dx.sum(axis=1, keepdims=True)
            state["row_sums"] = columns.plus(state["row_sums"], (added,))
        if "bias" in results:
            index, inside = placed(spec, "d_bias", results["bias"].shape, at)
            store(results["bias"], index, found.t_dx * factor, inside)
        return state

    sums: State = {}
    for name in results:
        if name == "query":
            sums[name] = columns.zeros(tiles.queries, spec.head_dim)
        elif name != "bias":
            sums[name] = (jnp.zeros((tiles.queries, 1), jnp.float32),)
    sides = key_sides(spec, tiles.keys)
    sums = visit(refs.ranges, batch, tile, sides, step, sums)
    if "query" in sums:
        scale = factor * _scale_left(spec, refs, batch)
        x = tuple(part * scale for part in sums["query"])
        columns.write(results["query"], spec.head_dim, (batch,), queries.down, head, x, exists)
    if "scale" in sums:
        store(results["scale"], (batch, queries.down, head), sums["scale"][0] * factor, exists)
    if "row_sums" in sums:
        index = (batch, head, queries.down)
        store(results["row_sums"], index, sums["row_sums"][0] * factor, exists)


def _shared(spec: AttentionSpec, inputs: Inputs, tiles: Tiles, *, interpret: bool) -> Array:
    """Of a bias that rows or heads share and that has queries and keys of its own."""

    def addends(refs: SimpleNamespace, at: Place, queries: Span, keys: Span) -> Array:
        kv_head, _ = divided(at.head, spec.group)
        inside = queries.exists_down
        a = query_side(spec, refs, at.batch, queries.down, at.head, inside)
        b = key_side(spec, refs, at.batch, keys.down, kv_head, keys.exists_down)
        numbers = row_numbers(refs, at.batch, at.head, queries.down, inside)
        return gradients(spec, refs, at, numbers, a, b).t_dx

    return sums_over_shares(
        spec, inputs, tiles, addends, name="bias_gradient_tangent", interpret=interpret
    )


def _scaled(
    spec: AttentionSpec, refs: SimpleNamespace, batch: Array, found: Gradients
) -> tuple[Array, Array]:
    """dz and tdz, and where the scale has a tangent their products with it."""
    t_scale = scale_tangent_of(refs, batch)
    if t_scale is None:
        return found.dz, found.t_dz
    scale = scale_of(spec, refs, batch)
    return found.dz * scale, found.t_dz * scale + found.dz * t_scale


def _scale_left(spec: AttentionSpec, refs: SimpleNamespace, batch: Array) -> Array | float:
    """What sums of products with `_scaled` are still to be multiplied by."""
    return 1.0 if hasattr(refs, "t_scale") else scale_of(spec, refs, batch)


def _plus_products(sums: Sums, pairs: list[tuple[Array, Matrix | None]]) -> Sums:
    for weights, of in pairs:
        if of is not None:
            sums = columns.plus(sums, columns.times(weights, of))
    return sums
