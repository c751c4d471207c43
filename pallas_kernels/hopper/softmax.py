"""The running softmax of 64 rows, in base 2.

    m' = max(m, c rowmax S)    P = 2^(c S - m')    l' = l 2^(m - m') + rowsum P    c = scale log2 e

(Milakov and Gimelshein, 2018; Dao et al., 2022, section 3.1.) A row that has seen no key has
m = -inf and l = 0.

With a bias m is natural: there may be no room for log2 e times a number that hides, and that has
rounding errors of its own, which 2^x would multiply: P = 2^((x - m) log2 e). Or this is one
operation for each element, where the row's maximum decides on two numbers (`Plan.one_power`):

    P = 2^(x f - t)    f = log2 e, t = m log2 e rounded    where |m| < 2^29
                       f = 1, t = m                        elsewhere: neighbours differ by 32

x f - t is rounded once. So P and l of a row are 2^e times what they should be, e = m f - t, at most
32: O / l is not, and l is put right at the end.
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

__all__ = ["LN2", "LOG2E", "Softmax", "across", "cap_slope", "logits", "scale_of", "unit"]

LOG2E = math.log2(math.e)
LN2 = math.log(2)
LEAST = -3.4028234663852886e38  # finfo.min of float32
ROW = plgpu.Layout.WGMMA.reduce(1)


def _powers(m: Array) -> tuple[Array, Array]:
    """f and t of rows with this maximum."""
    small = jnp.abs(m) < 2.0**29
    return jnp.where(small, LOG2E, jnp.ones_like(m)), jnp.where(small, m * LOG2E, m)


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


def cap_slope(x: Array, *, masked: bool) -> Array:
    """d tanh(y) = 1 - tanh² y, of what `logits` gives.

    masked: some of it was hidden, as -inf, and is zero. So it is made of what P is made of: x from
      before a mask would be kept beside, in registers that there are not.
    """
    x = jnp.maximum(x, -1.0) if masked else x
    return 1 - x * x


def unit(spec: AttentionSpec) -> float:
    """What 1 in the rows' maxima is of the natural logarithm."""
    return LN2 if spec.bias_shape is None else 1.0


class Softmax(NamedTuple):
    """The rows' maximum and sum so far, each (64,); and t, where there is one."""

    m: Array
    l: Array
    t: Array | None = None

    @staticmethod
    def start(seam: Seam) -> Softmax:
        """Of rows that have seen nothing."""
        return Softmax(
            seam.layout(jnp.full((ROWS,), -jnp.inf, jnp.float32), ROW),
            seam.layout(jnp.zeros((ROWS,), jnp.float32), ROW),
        )

    @staticmethod
    def start_beside_bias(seam: Seam, *, one_power: bool) -> Softmax:
        """The same where logits are natural."""
        if not one_power:
            return Softmax.start(seam)
        least = seam.layout(jnp.full((ROWS,), LEAST, jnp.float32), ROW)
        return Softmax(least, jnp.zeros_like(least), least)

    def update_natural(self, x: Array) -> tuple[Array, Softmax, Array]:
        """P of a block, the softmax that includes it, and the correction of what came before."""
        if self.t is None:
            return self.update(x, LOG2E, masked=True, natural=True)
        m = jnp.maximum(self.m, x.max(axis=1))
        f, t = _powers(m)
        # The difference of maxima, where these have different f.
        correction = jnp.exp2(jnp.minimum(self.t - t, self.m - m))
        p = jnp.exp2(x * across(f, x.shape[1]) - across(t, x.shape[1]))
        return p, Softmax(m, self.l * correction + p.sum(axis=1), t), correction

    def ended(self, seam: Seam) -> tuple[Softmax, Array | None]:
        """The maximum, -inf of a row that has seen nothing, with the sum that belongs to it.

        And what O is multiplied by where it belongs to another sum.
        """
        if self.t is None:
            return self, None
        f, t = _powers(self.m)
        factor = jnp.exp2(-seam.multiply_add(self.m, f, -t))
        m = jnp.where(self.l == 0.0, -jnp.inf, self.m)
        return Softmax(m, self.l * factor), factor

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
