"""The running softmax of 64 rows, in base 2.

    m' = max(m, c rowmax S)    P = 2^(c S - m')    l' = l 2^(m - m') + rowsum P    c = scale log2 e

(Milakov and Gimelshein, 2018; Dao et al., 2022, section 3.1.) A row that has seen no key has
m = -inf and l = 0.

With a bias m is natural and P = 2^(c (S - m)): there may be no room for c times a number that
hides, and that has rounding errors of its own, which 2^x would multiply.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.hopper.seam import Ref, Seam
from pallas_kernels.hopper.tiles import ROWS

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = ["LN2", "LOG2E", "Softmax", "across", "logits", "scale_of", "unit"]

LOG2E = math.log2(math.e)
LN2 = math.log(2)
ROW = plgpu.Layout.WGMMA.reduce(1)


def across(x: Array, columns: int) -> Array:
    """One value a row, as a matrix."""
    return lax.broadcast_in_dim(x, (ROWS, columns), [0])


def scale_of(spec: AttentionSpec, refs: Ref, batch: Array) -> Array | float:
    """What Q Kᵀ is multiplied by: a number, or read where it is an array."""
    if spec.scale is not None:
        return spec.scale
    own: Array = refs.scale[batch if refs.scale.shape[0] > 1 else 0]
    return own


def logits(spec: AttentionSpec, scale: Array | float, s: Array) -> tuple[Array, float]:
    """Q Kᵀ as (x, c) such that x c are the logits in base 2; c is positive."""
    cap = spec.logits_soft_cap
    if cap is not None:
        # The instruction tanh.approx is off by up to 2^-11, which a cap of 50 makes 0.02 in the
        # logit. tanh(y) = 1 - 2 / (e^2y + 1) would lose three times as much of a small y.
        e = jnp.exp2(jnp.minimum(s * (scale * (2 * LOG2E / cap)), 64.0))
        return (e - 1) / (e + 1), cap * LOG2E
    if spec.scale is not None and spec.scale > 0:
        return s, spec.scale * LOG2E
    return s * scale, LOG2E


def unit(spec: AttentionSpec) -> float:
    """What 1 in the rows' maxima is of the natural logarithm."""
    return LN2 if spec.bias_shape is None else 1.0


class Softmax(NamedTuple):
    """The rows' maximum and sum so far, each (64,)."""

    m: Array
    l: Array

    @staticmethod
    def start(seam: Seam) -> Softmax:
        """Of rows that have seen nothing."""
        return Softmax(
            seam.layout(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW),
            seam.layout(jnp.zeros((ROWS,), jnp.float32), ROW),
        )

    def update(
        self, s: Array, c: float, *, masked: bool, natural: bool = False
    ) -> tuple[Array, Softmax, Array]:
        """P of a block, the softmax that includes it, and the correction of what came before.

        natural: so is the maximum, which else is in base 2 as the logits s c are.
        """
        if natural:
            m = jnp.maximum(self.m, s.max(axis=1))
            shift = jnp.where(m == -jnp.inf, 0.0, m)
            correction = jnp.exp2((self.m - shift) * c)
            p = jnp.exp2((s - across(shift, s.shape[1])) * c)
            return p, Softmax(m, self.l * correction + p.sum(axis=1)), correction
        m = jnp.maximum(self.m, s.max(axis=1) * c)
        shift = jnp.where(m == -jnp.inf, 0.0, m) if masked else m
        correction = jnp.exp2(self.m - shift)
        p = jnp.exp2(s * c - across(shift, s.shape[1]))
        return p, Softmax(m, self.l * correction + p.sum(axis=1)), correction

    def factor(self, sink: Array | None, *, natural: bool = False) -> Array:
        """What the output is multiplied by, 0 for a row that sees no key.

        sink: one more logit, natural, which has no value.
        """
        none = self.l == 0.0
        total = jnp.where(none, 1.0, self.l)
        if sink is not None:  # infinite if far above all keys: what is divided by it is 0
            m = jnp.where(none, 0.0, self.m)
            total += jnp.exp2((sink - m) * LOG2E if natural else sink * LOG2E - m)
        return jnp.where(none, 0.0, 1.0 / total)
