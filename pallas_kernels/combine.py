"""Joins the parts of a call whose keys were split between programs or thread blocks.

lse_i = m_i + r_i        m = max_i m_i        l = sum_i exp(m_i - m + r_i)        lse = m + log l
O = sum_i exp(m_i - m + r_i) O_i / (l + exp(sink - m))

One launch: a program has some rows, of which it reads all parts. XLA made up to four of it, which
took a tenth of one query's time beside 32k keys.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.portable.elements import both
from pallas_kernels.portable.launch import Results, launch
from pallas_kernels.portable.tiles import Tiles
from pallas_kernels.portable.triton import Index, Mask, divided, load, store

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["combine"]

ELEMENTS = 4096  # that a program holds: 32 a thread
WARPS = 4
PROGRAMS = 128  # that there should be, before any has several rows

type Ends = Callable[[SimpleNamespace, Index, Mask], tuple[Array, Array]]
type Written = Callable[[Index], Array]


def combine(
    spec: AttentionSpec,
    out: Array,
    numbers: dict[str, Array],
    ends: Ends,
    *,
    unit: float,
    sinks: Array | None,
    written: Written | None = None,
    interpret: bool,
) -> tuple[Array, Array, Array]:
    """Output (B, T, N, D), and `top` and `rest` (B, T, N) of all parts together, the sink left out.

    Args:
      spec: the call.
      out: (splits, B, T or more, N, D or more) float32, each part's own output.
      numbers: what `ends` reads, by name.
      ends: given refs of the numbers, (split, batch row, query, head) of some rows and which of
        them there are, their top and rest: -inf and 0 where a part sees no key, or is not there. A
        part's log-sum-exp is top unit + rest, natural.
      unit: see ends.
      sinks: (B or 1, N) float32 or None.
      written: given (split, batch row, query, head) of some rows, which of them were; None if all.
      interpret: run on a CPU.
    """
    splits, total = out.shape[0], spec.batch * spec.queries * spec.heads
    columns = _power(spec.value_dim)
    parts = min(_power(splits), max(1, ELEMENTS // columns))
    room = ELEMENTS // columns // _power(splits)
    rows = min(max(1, room), _power(-(-total // PROGRAMS)))
    inputs = {"out": out, **numbers}
    if sinks is not None:
        inputs["sinks"] = sinks
    number = jax.ShapeDtypeStruct((spec.batch, spec.queries, spec.heads), jnp.float32)
    shape = (*number.shape, spec.value_dim)
    results = {
        "joined": jax.ShapeDtypeStruct(shape, spec.dtype), "top": number, "rest": number
    }  # fmt: skip

    def kernel(refs: SimpleNamespace, its: Results) -> None:
        row = pl.program_id(0) * rows + jnp.arange(rows, dtype=jnp.int32)
        exists = None if total % rows == 0 else row < total
        before, head = divided(row, spec.heads)
        batch, query = divided(before, spec.queries)
        at = batch, query, head

        def ends_of(first: Array | int, count: int) -> tuple[Array, Array, Array, Mask]:
            """Which parts these are, and of each, (count, rows): top, rest, whether it is there."""
            part = first + jnp.arange(count, dtype=jnp.int32)[:, None]
            there = None if exists is None else exists[None]
            if splits % count:
                there = both(part < splits, there)
            if written is not None:
                there = both(written((part, *(x[None] for x in at))), there)
            if there is not None:
                there = jnp.broadcast_to(there, (count, rows))
            return part, *ends(refs, (part, *(x[None] for x in at)), there), there

        _, top, rest, _ = ends_of(0, _power(splits))
        highest = top.max(axis=0)
        none = highest == -jnp.inf
        base = jnp.where(none, 0.0, highest)
        keys = jnp.where(none, 1.0, jnp.exp((top - base[None]) * unit + rest).sum(axis=0))
        divisor = keys
        if sinks is not None:  # infinite if far above all keys: what is divided by it is 0
            row_of_sinks = batch if sinks.shape[0] > 1 else batch * 0
            sink = load(refs.sinks, (row_of_sinks, head), exists)
            divisor = keys + jnp.exp(sink - base * unit)
        column = jnp.arange(columns, dtype=jnp.int32)
        inside = None if columns == spec.value_dim else (column < spec.value_dim)[None]

        def weighted(first: Array | int) -> Array:
            part, top, rest, there = ends_of(first, parts)
            weight = jnp.exp((top - base[None]) * unit + rest) / divisor[None]
            place = (part[..., None], *(x[None, :, None] for x in at), column[None, None])
            mask = None if inside is None else inside[None]
            if there is not None:
                mask = both(there[..., None], mask)
            if mask is not None:
                mask = jnp.broadcast_to(mask, (parts, rows, columns))
            return (load(refs.out, place, mask) * weight[..., None]).sum(axis=0)

        o = weighted(0)
        for first in range(parts, splits, parts):
            o += weighted(first)
        mask = inside if exists is None else both(exists[:, None], inside)
        if mask is not None:
            mask = jnp.broadcast_to(mask, (rows, columns))
        store(its["joined"], (*(x[:, None] for x in at), column[None]), o, mask)
        store(its["top"], at, highest, exists)
        store(its["rest"], at, jnp.log(keys), exists)

    found = launch(
        kernel, inputs, results,
        grid=(-(-total // rows),), tiles=Tiles(rows, parts, warps=WARPS, stages=1),
        name="join", interpret=interpret,
    )  # fmt: skip
    return found["joined"], found["top"], found["rest"]


def _power(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()
