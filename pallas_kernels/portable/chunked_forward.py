"""Query-chunked attention, forward, for any NVIDIA GPU.

    pass 1     S = Q Kᵀ scale + bias       m = rowmax S      r = log rowsum exp(S - m)
    pass 2     P = exp(S - m - r)          out = P V

(Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", 2021, section 2: a chunk of queries
at a time, against all keys.) A program has a chunk of queries and goes over their keys twice:

    Q (rows, H)   | K_0 | K_1 | .. | K_n | m, r known  | K_0 V_0 | K_1 V_1 | .. | K_n V_n |

Flash attention goes over them once, and must correct O whenever a row's maximum grows. Here the
weights that meet V are those of the whole softmax, so O is only ever added to; S is computed twice.
Neither holds more than one block of S. In pass 1 the rows' maximum so far is taken out of the sum,
as in flash, so that no exponential overflows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array

from pallas_kernels.portable import columns
from pallas_kernels.portable.elements import base, may_hide
from pallas_kernels.portable.forward_tile import ForwardTile, run
from pallas_kernels.portable.plan import make_plan
from pallas_kernels.portable.softmax import APART, Softmax
from pallas_kernels.portable.tiles import Tiles, chunked_tiles
from pallas_kernels.portable.triton import exp2

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec, Operands

__all__ = ["forward"]


def forward(
    spec: AttentionSpec, operands: Operands, *, tiles: Tiles | None = None, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """Output (B, T, N, D) in the call's dtype; and `top` and `rest` (B, T, N) float32.

    These are what `flash_forward.forward` gives.

    Args:
      spec: the call; `refusals` must be empty for it.
      operands: its arrays; sinks may be (N,) or one row for each batch row, (B, N).
      tiles: tile shapes to use instead of the table's.
      interpret: run on a CPU.
    """
    sinks = None
    if operands.sinks is not None:
        sinks = jnp.atleast_2d(operands.sinks).astype(jnp.float32)
    plan = make_plan(spec, tiles or chunked_tiles(spec), may_split=False)
    return run(plan, operands, _kernel, name="chunked_forward", sinks=sinks, interpret=interpret)


def _kernel(tile: ForwardTile) -> None:
    def measure(j: Array, softmax: Softmax, *, masked: bool) -> Softmax:
        keys, at = tile.block(j, masked=masked)
        return softmax.add(tile.logits(keys, at), may_hide=masked or may_hide(tile.spec))

    rows = tile.plan.tiles.queries
    # With a bias or mask, which are read in another order than products are made, it was slower.
    apart = 1 if may_hide(tile.spec) else APART
    start = Softmax.start(rows, maxima=apart, sums=apart)
    c = base(tile.spec)
    end = tile.visit(measure, start).whole(c).finish(c, sink=tile.sink, real=tile.real)
    top = jnp.where(end.top == -jnp.inf, jnp.inf, end.top)  # no weight of a row without keys
    rest = jnp.log2(end.total)

    def weigh(j: Array, o: columns.Sums, *, masked: bool) -> columns.Sums:
        keys, at = tile.block(j, masked=masked)
        x, _, _ = tile.logits(keys, at)
        added = tile.values(exp2(x, c, top, rest), keys, at)
        return columns.plus(o, added)

    o = tile.visit(weigh, columns.zeros(rows, tile.spec.value_dim))
    if tile.real is not None:
        o = tuple(jnp.where(tile.real, part, 0.0) for part in o)
    tile.write(o, 1.0, end)
