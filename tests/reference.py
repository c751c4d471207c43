"""Attention in float64 NumPy, written from the definitions: what every backend is held to.

Nothing here imports jax or jattn; `attention` computes with NumPy or with a module like it
(tests/long_reference.py gives it jax's). Letters as in `jax.nn`: B batch, T queries, S keys,
N query heads, K key heads, H head dim, D value head dim. Arrays are BTNH.

    z = scale q k        s = cap tanh(z / cap) + bias        p = exp(s - lse)
    lse = log(sum_visible exp s + exp sink)                  out = (keep p / (1 - rate)) v
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def float64(array: Any, xp: Any = np) -> Floats:
    found: Floats = xp.asarray(array).astype(np.float64)
    return found


def visible(
    batch: int,
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    alignment: str = "top_left",
    offset: int | Sequence[int] | None = None,
    window: int | tuple[int | None, int | None] | None = None,
    query_lengths: Sequence[int] | None = None,
    key_lengths: Sequence[int] | None = None,
    query_segments: Any = None,
    key_segments: Any = None,
    mask: Any = None,
) -> Bools:
    """The boolean mask (B, 1 or N, T, S) that all the arguments stand for."""
    t, s = np.arange(queries)[:, None], np.arange(keys)
    shift = np.zeros(batch, object)  # integers of Python's, which have no end
    if alignment == "bottom_right":
        shift += cut(key_lengths, keys) - cut(query_lengths, queries)
    elif offset is not None:
        shift += np.array(offset, object)
    diagonal = t + shift[:, None, None, None]
    seen = np.ones((batch, 1, queries, keys), bool)
    if causal:
        seen &= s <= diagonal
    if window is not None:
        left, right = window if isinstance(window, tuple) else (window, window)
        if left is not None:
            seen &= diagonal - left <= s
        if right is not None:
            seen &= s <= diagonal + right
    for b in range(batch):
        if query_lengths is not None:
            seen[b] &= t < query_lengths[b]
        if key_lengths is not None:
            seen[b] &= s < key_lengths[b]
        if query_segments is not None:
            seen[b] &= np.equal.outer(query_segments[b], key_segments[b])
    return seen if mask is None else seen & np.asarray(mask)


def cut(lengths: Sequence[int] | None, size: int) -> Any:
    """Of each row how many of `size` positions there are."""
    return size if lengths is None else np.clip(lengths, 0, size).astype(object)


def _einsum(xp: Any, formula: str, *operands: Any) -> Any:
    return xp.einsum(formula, *operands, optimize=True)  # which calls BLAS


def sum_to(array: Floats, shape: tuple[int, ...]) -> Floats:
    """Sums over the axes along which `shape` was broadcast to give `array`."""
    array = array.sum(axis=tuple(range(array.ndim - len(shape))))
    axes = tuple(i for i, n in enumerate(shape) if n == 1 and array.shape[i] != 1)
    return array.sum(axis=axes, keepdims=True)


@dataclass(frozen=True)
class Attention:
    """One call: operands in float64 and what the formula makes of them.

    `magnitudes` are the same sums with every term made positive: a rounding error of relative size
    eps in each term moves a result by about eps times its magnitude, however much cancels.
    """

    q: Floats
    k: Floats
    v: Floats
    bias_shape: tuple[int, ...] | None
    sinks: Floats | None
    scale: float
    soft_cap: float | None
    seen: Bools
    z: Floats
    logits: Floats
    p: Floats
    kept: Floats
    out: Floats
    lse: Floats
    xp: Any = np

    def gradients(self, dout: Any, dlse: Any) -> dict[str, Floats]:
        """Gradients of sum(out dout) + sum(lse dlse) over rows that see a key."""
        dout, dlse = (float64(x, self.xp) for x in (dout, dlse))
        return self._backward(dout, dlse, absolute=False)

    def magnitudes(self, dout: Any = None, dlse: Any = None) -> dict[str, Floats]:
        xp = self.xp
        v = xp.repeat(xp.abs(self.v), self._groups, axis=2)
        logits = xp.where(self.seen, xp.maximum(xp.abs(self.z), xp.abs(self.logits)), 0.0)
        logits = logits.max(axis=-1, initial=0.0)
        sizes = {
            "out": _einsum(xp, "bnts,bsnd->btnd", self.kept * self.p, v),
            "lse": 1.0 + logits.transpose(0, 2, 1),
        }
        if dout is not None:
            dout, dlse = (xp.abs(float64(x, xp)) for x in (dout, dlse))
            sizes |= self._backward(dout, dlse, absolute=True)
        return sizes

    def tangent_magnitude(self, tangents: dict[str, Any]) -> Floats:
        """Of the log-sum-exp's tangent, (B, T, N), which is rowsum(p ts): with every term positive.

        tangents: of q, k, bias, sinks and scale, those that move.
        """
        t = {name: np.abs(float64(x)) for name, x in tangents.items()}
        q, k = np.abs(self.q), np.repeat(np.abs(self.k), self._groups, axis=2)
        tz = np.zeros_like(self.p)
        for factor, rows, columns in (
            (np.abs(self.scale), t.get("q"), k),
            (np.abs(self.scale), q, t.get("k")),
            (t.get("scale"), q, k),
        ):
            if factor is not None and rows is not None and columns is not None:
                columns = np.repeat(columns, q.shape[2] // columns.shape[2], axis=2)
                tz += factor * _einsum(np, "btnh,bsnh->bnts", rows, columns)
        if self.soft_cap is not None:
            with np.errstate(invalid="ignore"):
                tz *= 1.0 - np.tanh(self.z / self.soft_cap) ** 2
        ts = np.where(self.seen, tz + t.get("bias", 0.0), 0.0)
        size: Floats = (self.p * ts).sum(axis=-1).transpose(0, 2, 1)
        if "sinks" in t and self.sinks is not None:
            size += (1 - self.p.sum(axis=-1).transpose(0, 2, 1)) * t["sinks"]
        return size

    @property
    def _groups(self) -> int:
        return self.q.shape[2] // self.k.shape[2]

    def _backward(self, dout: Floats, dlse: Floats, *, absolute: bool) -> dict[str, Floats]:
        xp, sign = self.xp, 1.0 if absolute else -1.0
        q, k, v, scale = (
            xp.abs(x) if absolute else x for x in (self.q, self.k, self.v, self.scale)
        )
        k, v = xp.repeat(k, self._groups, axis=2), xp.repeat(v, self._groups, axis=2)
        dp = self.kept * _einsum(xp, "btnd,bsnd->bnts", dout, v)
        row = (dp * self.p).sum(axis=-1, keepdims=True)
        dlse = dlse.transpose(0, 2, 1)[..., None]
        ds = self.p * (dp + sign * row + dlse)
        dz = ds
        if self.soft_cap is not None:
            with np.errstate(invalid="ignore"):
                slope = 1.0 - xp.tanh(self.z / self.soft_cap) ** 2
            dz = xp.where(self.seen, ds * slope, 0.0)
        grads = {
            "q": scale * _einsum(xp, "bnts,bsnh->btnh", dz, k),
            "k": self._sum_groups(scale * _einsum(xp, "bnts,btnh->bsnh", dz, q)),
            "v": self._sum_groups(_einsum(xp, "bnts,btnd->bsnd", self.kept * self.p, dout)),
        }
        if self.bias_shape is not None:
            grads["bias"] = sum_to(xp.where(self.seen, ds, 0.0), self.bias_shape)
        if self.sinks is not None:
            lse = self.lse.transpose(0, 2, 1)[..., None]
            alive = xp.isfinite(lse)
            sink = self.sinks[None, :, None, None]
            p_sink = xp.exp(xp.where(alive, sink - xp.where(alive, lse, 0.0), -np.inf))
            grads["sinks"] = (p_sink * (sign * row + dlse)).sum(axis=(0, 2, 3))
        return grads

    def _sum_groups(self, array: Floats) -> Floats:
        b, s, n, h = array.shape
        return array.reshape(b, s, n // self._groups, self._groups, h).sum(axis=3)


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    seen: Bools,
    bias: Any = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Any = None,
    keep: Bools | None = None,
    rate: float = 0.0,
    xp: Any = np,
) -> Attention:
    """Attention over the pairs of `seen` (broadcast to B, N, T, S); dropout keeps those of `keep`.

    Queries, keys and values that no pair of `seen` touches are taken as zero, whatever they hold.
    """
    q, k, v = (float64(x, xp) for x in (q, k, v))
    (b, t, n, h), s = q.shape, k.shape[1]
    seen = xp.broadcast_to(seen, (b, n, t, s))
    q = xp.where(seen.any(axis=3).transpose(0, 2, 1)[..., None], q, 0.0)
    heads = seen.any(axis=2).reshape(b, k.shape[2], -1, s).any(axis=2).transpose(0, 2, 1)
    k, v = xp.where(heads[..., None], k, 0.0), xp.where(heads[..., None], v, 0.0)
    scale = h**-0.5 if scale is None else scale
    groups = n // k.shape[2]
    z = scale * _einsum(xp, "btnh,bsnh->bnts", q, xp.repeat(k, groups, axis=2))
    logits = z if soft_cap is None else soft_cap * xp.tanh(z / soft_cap)
    if bias is not None:
        logits = logits + float64(bias, xp)
    seen = seen & ~xp.isneginf(logits)
    logits = xp.where(seen, logits, -np.inf)
    alive = seen.any(axis=-1, keepdims=True)
    top = logits.max(axis=-1, keepdims=True)
    if sinks is not None:
        sinks = float64(sinks, xp)
        top = xp.maximum(top, sinks[:, None, None])
    top = xp.where(xp.isneginf(top), 0.0, top)
    weights = xp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + xp.exp(sinks[:, None, None] - top)
    p = xp.where(alive, weights / xp.where(alive, total, 1.0), 0.0)
    lse = xp.where(alive, top + xp.log(xp.where(alive, total, 1.0)), -np.inf)
    kept = xp.ones_like(p) if keep is None else xp.broadcast_to(keep, p.shape) / (1.0 - rate)
    return Attention(
        q=q,
        k=k,
        v=v,
        bias_shape=None if bias is None else np.shape(bias),
        sinks=sinks,
        scale=scale,
        soft_cap=soft_cap,
        seen=seen,
        z=z,
        logits=logits,
        p=p,
        kept=kept,
        out=_einsum(xp, "bnts,bsnd->btnd", kept * p, xp.repeat(v, groups, axis=2)),
        lse=lse[..., 0].transpose(0, 2, 1),
        xp=xp,
    )
