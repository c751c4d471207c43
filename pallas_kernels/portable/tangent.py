"""The tangent of attention, for any NVIDIA GPU, from its output and log-sum-exp.

    S = Q Kᵀ scale     tS = (tQ Kᵀ + Q tKᵀ) scale     P = exp(S - lse)     mu = rowsum(P tS)
    tO = P tS V + P tV - mu O

(the derivative of softmax, as in `weight_tangents`; the log-sum-exp's is mu). As lse is known, no
sum is ever scaled anew: five products and one accumulator. A program has a tile of query rows and
goes over the blocks of keys that some of them see, one of them twice:

    Q tQ (rows, H)   | K_c tK_c | K_0 tK_0 V_0 tV_0 | K_1 tK_1 V_1 tV_1 | ...
    c (rows, 1)      |  centre  |                   |                   |
    tO (rows, D)     |          |        sum        |        sum        |

What a row's tS have in common gives nothing to tO: c, their mean over a block, is taken off, so
that P tS V and mu O do not cancel, each of them rounded, where keys have a large mean. And
what is multiplied by O is the sum of P (tS - c) as the product with V had them, rounded. mu is no
sum of c and theirs: P have the sum 1 but for roundings, and c may be of one key, far from mu.

A sink has a share of each row's weights and its own tangent, but no value: what it adds to mu is
given.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.portable import columns
from pallas_kernels.portable.columns import Matrix, Sums
from pallas_kernels.portable.elements import Place, dropped
from pallas_kernels.portable.ends import key_limit, past, query_limit
from pallas_kernels.portable.grid import Grid, query_grid
from pallas_kernels.portable.inputs import forward_inputs, log_sum_exp_inputs, tangent_inputs
from pallas_kernels.portable.launch import Results, launch
from pallas_kernels.portable.precision import term_count
from pallas_kernels.portable.ranges import key_ranges, key_sides
from pallas_kernels.portable.softmax import APART, apart
from pallas_kernels.portable.spans import Span, queries_down, span, visit
from pallas_kernels.portable.tangent_tiles import tangent_tiles
from pallas_kernels.portable.tiles import Tiles
from pallas_kernels.portable.triton import divided, load, store
from pallas_kernels.portable.weight_tangents import Changes, changes
from pallas_kernels.portable.weights import dropout_factor

if TYPE_CHECKING:
    from jattn.call.row_arrays import TangentRows
    from jattn.call.spec import AttentionSpec, Operands, Tangents

__all__ = ["tangent"]


class State(NamedTuple):
    """Sums over the keys so far: tO; P tS; P (tS - c) as its product has it; and with sinks P."""

    t_out: Sums
    mu: Array
    changed: Array
    total: Array


def tangent(
    spec: AttentionSpec,
    operands: Operands,
    rows: TangentRows,
    tangents: Tangents,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Tangents of the output, (B, T, N, D) in the call's dtype, and the log-sum-exp, (B, T, N).

    The latter is float32, natural, and 0 of a row that sees no key.

    Args:
      spec: the call; `refusals` must be empty for it.
      operands: its arrays; sinks are not looked at.
      rows: what else each row has.
      tangents: what has one.
      tiles: tile shapes to use instead of the table's.
      interpret: run on a CPU.
    """
    tiles = tiles or tangent_tiles(spec)
    inputs = forward_inputs(spec, operands) | log_sum_exp_inputs(rows.top, rows.rest)
    inputs |= tangent_inputs(spec, tangents) | {"out": rows.out}
    if rows.of_sinks is not None:
        inputs["of_sinks"] = jnp.swapaxes(rows.of_sinks, 1, 2)
    inputs["ranges"] = key_ranges(spec, operands, queries=tiles.queries, keys=tiles.keys)
    sizes = (spec.batch, spec.queries, spec.heads)
    results = {
        "t_out": jax.ShapeDtypeStruct((*sizes, spec.value_dim), spec.dtype),
        "mu": jax.ShapeDtypeStruct(sizes, jnp.float32),
    }
    grid = query_grid(spec, tiles.queries)
    found = launch(
        partial(_kernel, spec, tiles, grid), inputs, results, grid=grid.sizes, tiles=tiles,
        name="tangent", interpret=interpret,
    )  # fmt: skip
    return found["t_out"], found["mu"]


class _Tile:
    """A tile of query rows and their tangents, read once, and its weights by block."""

    def __init__(
        self, spec: AttentionSpec, tiles: Tiles, grid: Grid, refs: SimpleNamespace
    ) -> None:
        self.spec, self.tiles, self.refs = spec, tiles, refs
        self.tile, self.head, self.batch = grid.place()
        self.kv_head, _ = divided(self.head, spec.group)
        first = self.tile * tiles.queries
        self.queries = span(
            first, tiles.queries, query_limit(spec, refs, self.batch, tiles.queries)
        )
        self.exists = span(first, tiles.queries, past(spec.queries, tiles.queries)).exists_down
        self._present = key_limit(spec, refs, self.batch, tiles.keys)
        at = (self.batch, self.queries.down, self.head, self.queries.exists_down)
        self.q = columns.read(refs.q, spec.head_dim, *at)
        self.tq: Matrix | None = None
        if hasattr(refs, "tq"):
            self.tq = columns.read(refs.tq, spec.head_dim, *at)
        index, inside = (self.batch, self.head, self.queries.down), self.queries.exists_down
        self.log_sum_exp = load(refs.top, index, inside, jnp.inf), load(refs.rest, index, inside)

    @property
    def moves_logits(self) -> bool:
        """Whether any logit has a tangent."""
        return any(hasattr(self.refs, name) for name in ("tq", "tk", "t_bias", "t_scale"))

    def block(self, j: Array, *, masked: bool) -> tuple[Span, Place]:
        """Where block j of keys is, and its tile of logits."""
        size = self.tiles.keys
        keys = span(j * size, size, self._present if masked else None)
        return keys, queries_down(
            self.batch, self.head, self.queries, keys, j * size, masked=masked
        )

    def changes(self, keys: Span, at: Place) -> Changes:
        """The weights of a block, and how its logits change."""
        k, tk = self.of_keys("k", keys), self.of_keys("tk", keys)
        assert k is not None
        ts = None if self.tq is None else columns.against(self.tq, k)
        if tk is not None:
            more = columns.against(self.q, tk)
            ts = more if ts is None else ts + more
        s = columns.against(self.q, k)
        return changes(self.spec, self.refs, at, self.log_sum_exp, s, ts)

    def of_keys(self, name: str, keys: Span) -> Matrix | None:
        """Rows of keys or values or their tangents, by name; None where there are none."""
        ref = getattr(self.refs, name, None)
        if ref is None:
            return None
        size = self.spec.head_dim if name in ("k", "tk") else self.spec.value_dim
        return columns.read(ref, size, self.batch, keys.down, self.kv_head, keys.exists_down)

    def centre(self) -> Array:
        """The mean of the logits' tangents over some keys of each row, by its weights, (rows, 1).

        Of a block that all rows see whole, if there is one: a single key's may be far from the
        mean. Else of as many blocks as the last row's keys may begin after the first row's, and one
        more.
        """
        row = self.batch if self.refs.ranges.shape[0] > 1 else 0
        ranges = (load(self.refs.ranges, (row, self.tile, i)) for i in range(4))
        first, clear_first, clear_stop, stop = ranges
        is_clear = clear_first < clear_stop
        most = first + 2 + (self.tiles.queries - 1) // self.tiles.keys
        first = jnp.where(is_clear, clear_first, first)
        stop = jnp.minimum(stop, jnp.where(is_clear, first + 1, most))

        def weighted(j: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
            p, tx, *_ = self.changes(*self.block(j, masked=True))
            assert tx is not None
            added = (x.sum(axis=1, keepdims=True) for x in (p, p * tx))
            total, moved = (a + b for a, b in zip(sums, added, strict=True))
            return total, moved

        none = jnp.zeros((self.tiles.queries, 1), jnp.float32)
        total, moved = lax.fori_loop(first, stop, weighted, (none, none))
        return jnp.where(total == 0.0, 0.0, moved / jnp.where(total == 0.0, 1.0, total))

    @property
    def of_sinks(self) -> Array | float:
        """The sinks' part of mu."""
        if not hasattr(self.refs, "of_sinks"):
            return 0.0
        index = (self.batch, self.head, self.queries.down)
        return load(self.refs.of_sinks, index, self.queries.exists_down)


def _kernel(
    spec: AttentionSpec, tiles: Tiles, grid: Grid, refs: SimpleNamespace, results: Results
) -> None:
    tile = _Tile(spec, tiles, grid, refs)

    def step(j: Array, state: State, *, masked: bool) -> State:
        t_out, mu, changed, total = state
        keys, at = tile.block(j, masked=masked)
        p, tx, _, _ = tile.changes(keys, at)
        if tx is not None:
            v = tile.of_keys("v", keys)
            assert v is not None
            w = p * (tx - centre)
            if term_count(spec) == 1:
                w = w.astype(spec.dtype).astype(jnp.float32)
            mu = mu + apart(p * tx).sum(axis=1)
            changed = changed + apart(w).sum(axis=1)
            if spec.has_sinks:
                total = total + apart(p).sum(axis=1)
            t_out = columns.plus(t_out, columns.times(dropped(spec, refs, at, w), v))
        tv = tile.of_keys("tv", keys)
        if tv is not None:
            t_out = columns.plus(t_out, columns.times(dropped(spec, refs, at, p), tv))
        return State(t_out, mu, changed, total)

    centre = jnp.zeros((tiles.queries, 1), jnp.float32)
    state = State(
        columns.zeros(tiles.queries, spec.value_dim),
        *(jnp.zeros((tiles.queries, APART), jnp.float32),) * 3,
    )
    if tile.moves_logits:
        centre = tile.centre()
    if tile.moves_logits or hasattr(refs, "tv"):
        sides = key_sides(spec, tiles.keys)
        state = visit(refs.ranges, tile.batch, tile.tile, sides, step, state)
    mu, changed, total = (x.sum(axis=1, keepdims=True) for x in state[1:])
    # What the centre was taken off has the sum 1, less the sink's share.
    of_output = changed + tile.of_sinks + (centre * (total - 1) if spec.has_sinks else 0.0)
    rows = tile.queries
    at = (tile.batch, rows.down, tile.head)
    out = columns.read(refs.out, spec.value_dim, *at, rows.exists_down)
    factor = dropout_factor(spec)
    t_out = tuple(
        a * factor - of_output * b[0].astype(jnp.float32)
        for a, b in zip(state.t_out, out, strict=True)
    )
    columns.write(
        results["t_out"], spec.value_dim, (tile.batch,), rows.down, tile.head, t_out, tile.exists
    )
    store(results["mu"], at, mu + tile.of_sinks, tile.exists)
