"""Flash attention, forward, for any NVIDIA GPU.

    S = Q Kᵀ scale + bias      m' = max(m, rowmax S)      P = exp(S - m')
    l' = l exp(m - m') + rowsum P                         O' = O exp(m - m') + P V
    out = O / l                                           lse = m + log l

(Dao et al., 2022, algorithm 1; Dao, 2023, section 3.1.) A program has a tile of query rows, in
registers and shared memory all along, and goes over the blocks of keys that some of them see:

    Q (rows, H)   | K_j V_j | K_j V_j | K_j V_j | K_j V_j |     j = first .. stop - 1
    O (rows, D)   |  mask   |  clear  |  clear  |  mask   |     three loops; a call without masks
    m, l          |         |         |         |         |     has one

The next blocks are copied to shared memory while this one is computed: Triton's pipelining,
`stages` deep. With few programs the keys are split among more, and the parts joined (`combine.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.combine import combine
from pallas_kernels.portable import columns
from pallas_kernels.portable.elements import base, may_hide
from pallas_kernels.portable.forward_tile import ForwardTile, run
from pallas_kernels.portable.plan import Plan, make_plan
from pallas_kernels.portable.softmax import APART, Softmax
from pallas_kernels.portable.tiles import forward_tiles
from pallas_kernels.portable.triton import LN2, Index, Mask, load

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec, Operands

__all__ = ["forward"]

type State = tuple[Softmax, columns.Sums]


def forward(
    spec: AttentionSpec, operands: Operands, *, plan: Plan | None = None, interpret: bool = False
) -> tuple[Array, Array, Array]:
    """Output (B, T, N, D) in the call's dtype; and `top` and `rest` (B, T, N) float32.

    These are the keys' log-sum-exp, the sinks left out: top c log 2 + rest, where c is
    `elements.base`'s; -inf and 0 of a row that sees no key.

    Args:
      spec: the call; `refusals` must be empty for it.
      operands: its arrays; sinks may be (N,) or one row for each batch row, (B, N).
      plan: the launch, instead of the one made from the table of tiles.
      interpret: run on a CPU.
    """
    plan = plan or make_plan(spec, forward_tiles(spec))
    sinks = None
    if operands.sinks is not None:
        sinks = jnp.atleast_2d(operands.sinks).astype(jnp.float32)
    whole = plan.splits == 1
    out, top, rest = run(
        plan, operands, _kernel,
        name="flash_forward", sinks=sinks if whole else None, interpret=interpret,
    )  # fmt: skip
    if whole:
        return out, top, rest
    return combine(
        spec, out, {"top": top, "rest": rest}, _ends,
        unit=base(spec) * LN2, sinks=sinks, interpret=interpret,
    )  # fmt: skip


def _ends(refs: Any, at: Index, there: Mask) -> tuple[Array, Array]:
    """What `combine` asks for."""
    return load(refs.top, at, there, -jnp.inf), load(refs.rest, at, there)


def _kernel(tile: ForwardTile) -> None:
    def step(j: Array, state: State, *, masked: bool) -> State:
        softmax, o = state
        keys, at = tile.block(j, masked=masked)
        s = tile.logits(keys, at)  # S = Q K_jᵀ scale + bias
        p, softmax, correction = softmax.update(s, may_hide=masked or may_hide(tile.spec))
        added = tile.values(p, keys, at)  # P V_j
        return softmax, tuple(a * correction + b for a, b in zip(o, added, strict=True))

    rows = tile.plan.tiles.queries
    start = Softmax.start(rows, maxima=1, sums=APART), columns.zeros(rows, tile.spec.value_dim)
    softmax, o = tile.visit(step, start)
    c = base(tile.spec)
    end = softmax.whole(c).finish(c, sink=tile.sink, real=tile.real)
    tile.write(o, end.factor, end)
