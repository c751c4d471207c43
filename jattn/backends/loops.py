"""The loops in XLA as `transforms.kernels.Kernels`, and the sizes of their chunks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jax import Array

from jattn.backends import any_order, query_chunks, query_tangents
from jattn.backends.directions import Directions
from jattn.backends.tiles import Chunks
from jattn.call.row_arrays import AnyBackwardRows, BackwardTangentRows, TangentRows
from jattn.call.sizes import is_known, smaller
from jattn.call.spec import AttentionSpec, Operands, Tangents
from jattn.call.target import Target

__all__ = ["Loops", "choose_chunks"]

# Chunk sizes by platform: (logits per step, most queries, most keys). CPU: a step's logits should
# stay in the last-level cache. GPU: enough work per step to hide the launch of its kernels.
_STEP_LOGITS = {"cpu": 2**20, "gpu": 2**26}
_MOST = {"cpu": (256, 512), "gpu": (1024, 1024)}


@dataclass(frozen=True)
class Loops:
    """Those of `query_chunks` and `query_tangents`, with the chunk sizes that were asked for."""

    target: Target
    queries: int | None
    keys: int | None
    can_partition = True
    takes_output = False
    takes_parts = True

    def chunks(self, spec: AttentionSpec) -> Chunks:
        return choose_chunks(spec, self.target, self.queries, self.keys)

    def makes_row_term(self, spec: AttentionSpec) -> bool:
        return False

    def unit(self, spec: AttentionSpec) -> float:
        return 1.0

    def forward(self, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array, Array]:
        return query_chunks.forward(spec, self.chunks(spec), operands)

    def backward(
        self,
        spec: AttentionSpec,
        operands: Operands,
        rows: AnyBackwardRows,
        *,
        wants_bias: bool,
        wants_scale: bool,
    ) -> tuple[Array, ...]:
        wants = {"wants_bias": wants_bias, "wants_scale": wants_scale}
        return query_chunks.backward(spec, self.chunks(spec), operands, rows, **wants)

    def tangent(
        self,
        spec: AttentionSpec,
        operands: Operands,
        rows: TangentRows,
        tangents: Tangents,
    ) -> tuple[Array, Array]:
        directions = Directions.of(spec, tangents)
        found = self._along(directions, query_tangents.tangent, spec, operands, (rows, tangents))
        t_out, t_lse = found
        return t_out, t_lse

    def backward_tangent(
        self,
        spec: AttentionSpec,
        operands: Operands,
        rows: BackwardTangentRows,
        tangents: Tangents,
        *,
        wanted: tuple[str, ...],
    ) -> tuple[Array, ...]:
        of = partial(query_tangents.backward_tangent, wanted=wanted)
        directions = Directions.of(spec, tangents, wanted)
        return self._along(directions, of, spec, operands, (rows, tangents))

    def _along(
        self,
        directions: Directions | None,
        of: Callable[..., tuple[Array, ...]],
        spec: AttentionSpec,
        operands: Operands,
        own: tuple[Any, ...],
    ) -> tuple[Array, ...]:
        """One of the loops of tangents, along all directions that the batch may be of."""
        if directions is None:
            return of(spec, self.chunks(spec), operands, *own)
        chunks, one = self.chunks(directions.step), directions.one

        def run(operands: Operands, own: tuple[Any, ...]) -> tuple[Array, ...]:
            return of(one, chunks, operands, *own)

        return directions.each(run, operands, own)

    def formula(self, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
        return any_order.attend(spec, operands)


def choose_chunks(
    spec: AttentionSpec, target: Target, queries: int | None = None, keys: int | None = None
) -> Chunks:
    """Chunk sizes by shape and platform, or those asked for, cut to the sequence."""
    _check_chunk_size("query_chunk_size", queries)
    _check_chunk_size("key_chunk_size", keys)
    platform = "cpu" if target.platform == "cpu" else "gpu"
    budget, (most_queries, most_keys) = _STEP_LOGITS[platform], _MOST[platform]
    if spec.band.width is not None:  # blocks wider than the band would be mostly hidden
        most_keys = min(most_keys, max(128, 2 ** round(math.log2(max(spec.band.width, 1)))))
    while spec.heads * most_queries * most_keys > budget and most_keys > 64:
        most_queries, most_keys = sorted((most_queries, most_keys // 2))
    queries = smaller(most_queries if queries is None else int(queries), spec.queries)
    keys = smaller(most_keys if keys is None else int(keys), spec.keys)
    if spec.is_empty or not is_known(spec.batch, queries, keys):
        return Chunks(1, queries, keys)
    rows = max(1, budget // (spec.heads * queries * keys))
    # Rows of a tile share one row of a bias, or have each their own: see `Tile`.
    alike = math.gcd(spec.batch, *(rows.inner.size for _, rows in spec.mapped_rows))
    rows = max(r for r in range(1, min(rows, alike) + 1) if alike % r == 0)
    return Chunks(rows, queries, keys)


def _check_chunk_size(name: str, size: object) -> None:
    is_int = isinstance(size, int | np.integer) and not isinstance(size, bool)
    if size is None or (is_int and int(size) >= 1):  # type: ignore[call-overload]
        return
    raise ValueError(f"{name} must be an int of at least 1, got {size!r}")
