"""How a tile's weights, and the gradient of its logits, change with what they are made of.

With z = Q Kᵀ scale, x = cap tanh(z / cap) + bias, P = exp(x - lse), and mu the tangent of lse,
t before a letter being a tangent:

    tz = (tQ Kᵀ + Q tKᵀ) scale + Q Kᵀ tscale        tx = tz (1 - tanh²(z / cap)) + tbias
    tP = P m                                        m = tx - mu
    tdP = dropout(tdO Vᵀ + dO tVᵀ)                  tdx = m dx + P (tdP - tD)
    tdz = (tdx - dx tz 2 tanh(z / cap) / cap) (1 - tanh²(z / cap))

in the letters of `weights`. What has no tangent takes no product. Works either way up.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.portable import columns
from pallas_kernels.portable.columns import Matrix
from pallas_kernels.portable.elements import (
    Place,
    dropped,
    logits,
    matrix,
    may_hide,
    placed,
    scale_of,
)
from pallas_kernels.portable.triton import Mask, exp2, load

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec

__all__ = [
    "Changes",
    "Gradients",
    "Numbers",
    "Side",
    "changes",
    "gradients",
    "key_side",
    "query_side",
    "row_numbers",
    "scale_tangent_of",
]


class Side(NamedTuple):
    """Rows of query and d_out, or of key and value: x and y, and their tangents."""

    x: Matrix
    tx: Matrix | None
    y: Matrix
    ty: Matrix | None


class Numbers(NamedTuple):
    """The rows' own, shaped as a place's queries: log-sum-exp in two numbers, tangent, D, tD."""

    top: Array
    rest: Array
    mu: Array
    row_term: Array
    t_row_term: Array


class Changes(NamedTuple):
    """P; tx, None if nothing changes the logits; the cap's slope; and tz 2 tanh(z / cap) / cap.

    The last two are None without a cap, and the last where tz is. All are finite where P is 0.
    """

    p: Array
    tx: Array | None
    slope: Array | None
    bend: Array | None


class Gradients(NamedTuple):
    """Weights after dropout, dx and dz, and their tangents, to be multiplied by `dropout_factor`.

    And Q Kᵀ with its tangent, None if it has none.
    """

    kept: Array
    t_kept: Array
    dx: Array
    t_dx: Array
    dz: Array
    t_dz: Array
    s: Array
    ts: Array | None

    def by_scale(self) -> Array:
        """The tangent of dz Q Kᵀ, element by element; 0 where dz is, whatever the product."""
        total = jnp.where(self.t_dz == 0.0, 0.0, self.t_dz * self.s)
        if self.ts is None:
            return total
        return total + jnp.where(self.dz == 0.0, 0.0, self.dz * self.ts)


def query_side(
    spec: AttentionSpec, refs: SimpleNamespace, batch: Array, row: Array, head: Array, inside: Mask
) -> Side:
    """Of rows of queries, (rows, 1), of one head."""
    at = (batch, row, head, inside)
    return Side(
        columns.read(refs.q, spec.head_dim, *at),
        _read(refs, "tq", spec.head_dim, *at),
        columns.read(refs.d_out, spec.value_dim, *at),
        _read(refs, "t_d_out", spec.value_dim, *at),
    )


def key_side(
    spec: AttentionSpec, refs: SimpleNamespace, batch: Array, row: Array, head: Array, inside: Mask
) -> Side:
    """Of rows of keys, (rows, 1), of one key head."""
    at = (batch, row, head, inside)
    return Side(
        columns.read(refs.k, spec.head_dim, *at),
        _read(refs, "tk", spec.head_dim, *at),
        columns.read(refs.v, spec.value_dim, *at),
        _read(refs, "tv", spec.value_dim, *at),
    )


def row_numbers(
    refs: SimpleNamespace, batch: Array, head: Array, query: Array, inside: Mask
) -> Numbers:
    """Those of rows that do not exist give them no weight."""
    index = (batch, head, query)
    others = (refs.rest, refs.mu, refs.row_term, refs.t_row_term)
    top = load(refs.top, index, inside, jnp.inf)
    return Numbers(top, *(load(ref, index, inside) for ref in others))


def scale_tangent_of(refs: SimpleNamespace, batch: Array) -> Array | None:
    """The tangent of the scale, a number; None if it has none."""
    if not hasattr(refs, "t_scale"):
        return None
    own: Array = load(refs.t_scale, (batch if refs.t_scale.shape[0] > 1 else 0,))
    return own


def changes(
    spec: AttentionSpec,
    refs: SimpleNamespace,
    at: Place,
    log_sum_exp: tuple[Array, Array],
    s: Array,
    ts: Array | None,
) -> Changes:
    """From s = Q Kᵀ and ts = tQ Kᵀ + Q tKᵀ, which is None if neither has a tangent."""
    x, c, tanh = logits(spec, refs, at, s)
    p = exp2(x, c, *log_sum_exp)
    tz = None if ts is None else ts * scale_of(spec, refs, at.batch)
    t_scale = scale_tangent_of(refs, at.batch)
    if t_scale is not None:
        tz = s * t_scale if tz is None else tz + s * t_scale
    if tz is not None:
        tz = _of_seen(spec, at, p, tz)
    tx, slope, bend = tz, None, None
    if tanh is not None:
        slope = 1 - tanh * tanh
        if tz is not None:
            assert spec.logits_soft_cap is not None
            tx, bend = tz * slope, tz * tanh * (2 / spec.logits_soft_cap)
    if hasattr(refs, "t_bias"):
        index, inside = placed(spec, "t_bias", refs.t_bias.shape, at)
        t_bias = matrix(load(refs.t_bias, index, inside)).astype(jnp.float32)
        t_bias = _of_seen(spec, at, p, jnp.broadcast_to(t_bias, p.shape))
        tx = t_bias if tx is None else tx + t_bias
    return Changes(p, tx, slope, bend)


def gradients(
    spec: AttentionSpec, refs: SimpleNamespace, at: Place, rows: Numbers, a: Side, b: Side
) -> Gradients:
    """Of the tile whose rows are those of `a` and whose columns those of `b`."""
    s, ts = columns.against(a.x, b.x), _tangent(a.x, a.tx, b.x, b.tx)
    p, tx, slope, bend = changes(spec, refs, at, (rows.top, rows.rest), s, ts)
    dp = _of_seen(spec, at, p, columns.against(a.y, b.y))
    t_dp = _tangent(a.y, a.ty, b.y, b.ty)
    m = -rows.mu if tx is None else tx - rows.mu
    kept = dropped(spec, refs, at, p)
    if spec.dropout_rate > 0:
        kept_share = 1 - spec.dropout_rate
        dx = kept * dp - p * (rows.row_term * kept_share)
        t_dx = m * dx - p * (rows.t_row_term * kept_share)
        if t_dp is not None:
            t_dx = t_dx + kept * _of_seen(spec, at, p, t_dp)
    else:
        dx = p * (dp - rows.row_term)
        beside = -rows.t_row_term
        if t_dp is not None:
            beside = _of_seen(spec, at, p, t_dp) - rows.t_row_term
        t_dx = m * dx + p * beside
    dz, t_dz = dx, t_dx
    if slope is not None:
        dz, t_dz = dx * slope, (t_dx if bend is None else t_dx - bend * dx) * slope
    return Gradients(kept, kept * m, dx, t_dx, dz, t_dz, s, ts)


def _tangent(x: Matrix, tx: Matrix | None, y: Matrix, ty: Matrix | None) -> Array | None:
    """That of X Yᵀ."""
    first = None if tx is None else columns.against(tx, y)
    second = None if ty is None else columns.against(x, ty)
    if first is None or second is None:
        return second if first is None else first
    return first + second


def _of_seen(spec: AttentionSpec, at: Place, p: Array, x: Array) -> Array:
    """x with zeros where nothing is seen: what is hidden may be so large that x is infinite."""
    return jnp.where(p == 0.0, 0.0, x) if at.masked or may_hide(spec) else x


def _read(
    refs: SimpleNamespace,
    name: str,
    size: int,
    batch: Array,
    row: Array,
    head: Array,
    inside: Mask,
) -> Matrix | None:
    ref = getattr(refs, name, None)
    return None if ref is None else columns.read(ref, size, batch, row, head, inside)
