"""What the two forward kernels share: a tile of query rows, its logits by block, its results."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.portable import columns
from pallas_kernels.portable.elements import Logits, Place, dropped, logits
from pallas_kernels.portable.ends import key_limit
from pallas_kernels.portable.grid import Grid
from pallas_kernels.portable.inputs import forward_inputs
from pallas_kernels.portable.launch import Results, launch
from pallas_kernels.portable.plan import Plan
from pallas_kernels.portable.ranges import key_ranges, key_sides
from pallas_kernels.portable.rows import Rows, rows_of
from pallas_kernels.portable.softmax import End
from pallas_kernels.portable.spans import Span, Step, span, visit
from pallas_kernels.portable.triton import divided, load, store

if TYPE_CHECKING:
    from jattn.call.spec import Operands

__all__ = ["ForwardTile", "run"]


class ForwardTile:
    """The tile of the program that asks: its queries, read once, and its results, written once."""

    def __init__(self, plan: Plan, grid: Grid, refs: SimpleNamespace, results: Results) -> None:
        spec, tiles = plan.spec, plan.tiles
        self.plan, self.spec, self.refs, self._results = plan, spec, refs, results
        self.share, pack_index, self.batch = grid.place()
        tile, self.split = divided(self.share, plan.splits)
        self.rows: Rows = rows_of(
            spec, refs, batch=self.batch, pack_index=pack_index,
            first=tile * plan.queries, rows=tiles.queries, pack=plan.pack,
        )  # fmt: skip
        self._limit = key_limit(spec, refs, self.batch, tiles.keys)
        self._sides = key_sides(spec, tiles.keys)
        self.q = columns.read(
            refs.q, spec.head_dim, self.batch, self.rows.query, self.rows.head, self.rows.real
        )

    def visit[State](self, step: Step[State], state: State) -> State:
        """Runs `step` over the blocks of keys that some row sees."""
        return visit(self.refs.ranges, self.batch, self.share, self._sides, step, state)

    def block(self, j: Array, *, masked: bool) -> tuple[Span, Place]:
        """Where block j of keys is, and its tile of logits."""
        size, rows = self.plan.tiles.keys, self.rows
        keys = span(j * size, size, self._limit if masked else None)
        # A bias may be anything past the query lengths, NaN too.
        inside = rows.exists if self.spec.bias_shape is None else rows.real
        at = Place(
            self.batch,
            rows.head,
            rows.query,
            keys.across,
            j * size,
            inside,
            keys.exists_across,
            masked,
        )
        return keys, at

    def logits(self, keys: Span, at: Place) -> Logits:
        """Q Kᵀ and all that is done to it."""
        k = columns.read(
            self.refs.k, self.spec.head_dim, self.batch, keys.down, self.rows.kv_head,
            keys.exists_down,
        )  # fmt: skip
        return logits(self.spec, self.refs, at, columns.against(self.q, k))

    def values(self, p: Array, keys: Span, at: Place) -> columns.Sums:
        """P V, with dropout."""
        spec = self.spec
        p = dropped(spec, self.refs, at, p)
        v = columns.read(
            self.refs.v, spec.value_dim, self.batch, keys.down, self.rows.kv_head, keys.exists_down
        )
        return columns.times(p, v)

    @property
    def sink(self) -> Array | None:
        """The rows' sink, if the call has one."""
        sinks = getattr(self.refs, "sinks", None)
        if sinks is None:
            return None
        row = self.batch if sinks.shape[0] > 1 else 0
        exists = self.rows.exists if self.plan.pack > 1 else None
        return load(sinks, (row, self.rows.head), exists)

    @property
    def real(self) -> Array | None:
        """Which rows are within the query lengths; None if there are none."""
        return self.rows.real if self.spec.has_query_lengths else None

    def write(self, o: columns.Sums, factor: Array | float, end: End) -> None:
        """The output, O times `factor`, and the keys' log-sum-exp."""
        spec, rows, splits = self.spec, self.rows, self.plan.splits
        factor = factor * (1 / (1 - spec.dropout_rate))
        out = tuple(part * factor for part in o)
        before = (self.split, self.batch) if splits > 1 else (self.batch,)
        its = self._results
        columns.write(its["out"], spec.value_dim, before, rows.query, rows.head, out, rows.exists)
        for name, x in (("top", end.top), ("rest", end.rest)):
            store(its[name], (*before, rows.query, rows.head), x, rows.exists)


def run(
    plan: Plan,
    operands: Operands,
    kernel: Callable[[ForwardTile], None],
    *,
    name: str,
    sinks: Array | None,
    interpret: bool,
) -> tuple[Array, Array, Array]:
    """Output (B, T, N, D), `top` and `rest` (B, T, N), of each share if keys are split."""
    spec, tiles, grid = plan.spec, plan.tiles, plan.grid
    inputs = forward_inputs(spec, operands)
    inputs["ranges"] = key_ranges(
        spec, operands, queries=plan.queries, keys=tiles.keys, splits=plan.splits
    )
    if sinks is not None:
        inputs["sinks"] = sinks
    parts = (plan.splits,) if plan.splits > 1 else ()
    rows = (*parts, spec.batch, spec.queries, spec.heads)
    number = jax.ShapeDtypeStruct(rows, jnp.float32)
    dtype = jnp.float32 if parts else spec.dtype
    results = {
        "out": jax.ShapeDtypeStruct((*rows, spec.value_dim), dtype), "top": number, "rest": number
    }  # fmt: skip

    def body(refs: SimpleNamespace, results: Results) -> None:
        kernel(ForwardTile(plan, grid, refs, results))

    found = launch(
        body, inputs, results, grid=grid.sizes, tiles=tiles, name=name, interpret=interpret
    )
    return found["out"], found["top"], found["rest"]
