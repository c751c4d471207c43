"""A tile's weights and the gradient of its logits, made again from the log-sum-exp.

    P = exp(x - lse)     dP = dropout(dO Vᵀ)     dx = P (dP - D)     dz = dx (1 - tanh²(z / cap))

x being the logits and z = Q Kᵀ scale; the bias is added behind the cap, so its gradient is dx; and
D = rowsum(O dO) - dlse (Dao et al., 2022, algorithm 4). Works either way up.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array

from pallas_kernels.portable.elements import Place, dropped, logits, may_hide
from pallas_kernels.portable.triton import exp2

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["Numbers", "dropout_factor", "gradients"]

# The log-sum-exp, as an x of the logits and what is to be added to its x c; and D. All are shaped
# as the place's queries.
type Numbers = tuple[Array, Array, Array]


def gradients(
    spec: AttentionSpec, refs: SimpleNamespace, at: Place, rows: Numbers, s: Array, dp: Array
) -> tuple[Array, Array, Array]:
    """The weights after dropout, dx and dz, all to be multiplied by `dropout_factor`.

    From s = Q Kᵀ and dp = dO Vᵀ.
    """
    top, rest, row_term = rows
    x, c, tanh = logits(spec, refs, at, s)
    p = exp2(x, c, top, rest)
    if at.masked or may_hide(spec):
        dp = jnp.where(p == 0.0, 0.0, dp)  # a hidden value may be so large that its dP is infinite
    kept = dropped(spec, refs, at, p)
    if spec.dropout_rate > 0:
        dx = kept * dp - p * (row_term * (1 - spec.dropout_rate))
    else:
        dx = p * (dp - row_term)
    return kept, dx, dx if tanh is None else dx * (1 - tanh * tanh)


def dropout_factor(spec: AttentionSpec) -> float:
    """What is kept counts for what is dropped."""
    return 1 / (1 - spec.dropout_rate)
