"""A pair of kernels that know of one device, as one for what a device holds of a longer call."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jax import Array, lax

from jattn.call import masking
from jattn.call.row_arrays import AnyBackwardRows, BackwardRows
from jattn.call.spec import AttentionSpec, Operands
from jattn.transforms.context import gather, heads, ring
from jattn.transforms.context.balance import contiguous, zigzagged
from jattn.transforms.context.kernels import Backward, Forward
from jattn.transforms.context.merge import Merged
from jattn.transforms.context.parts import context_of, device_index, kept_heads, queries_of
from jattn.transforms.context.pieces import put
from jattn.transforms.context.plan import Plan, plan_of
from jattn.transforms.context.runs import runs
from jattn.transforms.kernels import Pair

__all__ = ["Exchange", "backward", "forward", "past_zeroed"]

_SCHEDULES = {"gather": gather, "heads": heads, "ring": ring}


def forward(kernels: Pair, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array, Array]:
    """`kernels.forward` of a call that may be part of a longer one."""
    if spec.context is None:
        return kernels.forward(spec, operands)
    plan, kernel = plan_of(spec), Forward.of(kernels, spec)
    exchange = Exchange(plan, spec)
    own = exchange.segments(operands)
    found: list[Array] = []
    pieces = plan.pieces if plan.schedule == "ring" else 1
    for number in range(pieces):
        of_heads, part = exchange.piece(own, number, pieces)
        merged = _SCHEDULES[plan.schedule].forward(kernel, plan, of_heads, part)
        results = [exchange.back(x) for x in _with_sinks(merged, kernel, of_heads, part)]
        found = put(found, results, number, pieces) if pieces > 1 else results
        found, own = lax.optimization_barrier((found, own)) if pieces > 1 else (found, own)
    out, top, rest = found
    return out, top, rest


def _with_sinks(
    found: Merged, kernel: Forward, spec: AttentionSpec, operands: Operands
) -> tuple[Array, Array, Array]:
    """The output beside the call's sinks, in its dtype, and the numbers of the rows without."""
    out, top, rest = found
    if operands.sinks is not None:
        shift = jnp.where(top == -jnp.inf, 0, top) * kernel.unit
        sinks = operands.sinks.astype(top.dtype).reshape(-1, 1, spec.heads)
        out = found.beside(sinks - shift)
    return out.astype(spec.dtype), top, rest


def backward(
    kernels: Pair,
    spec: AttentionSpec,
    operands: Operands,
    rows: AnyBackwardRows,
    *,
    wants_bias: bool,
    wants_scale: bool,
) -> tuple[Array, ...]:
    """`kernels.backward` likewise."""
    if spec.context is None:
        return kernels.backward(
            spec, operands, rows, wants_bias=wants_bias, wants_scale=wants_scale
        )
    plan = plan_of(spec)
    kernel = Backward.of(kernels, wants_bias=wants_bias, wants_scale=wants_scale)
    exchange = Exchange(plan, spec)
    own = exchange.segments(operands)
    found: list[Array] = []
    d_bias: Array | None = None
    pieces = plan.pieces if plan.schedule == "ring" else 1
    for number in range(pieces):
        of_heads, part = exchange.piece(own, number, pieces)
        its = BackwardRows(*(exchange.rows(_of_piece(x, number, pieces)) for x in rows))
        *gradients, more = _SCHEDULES[plan.schedule].backward(kernel, plan, of_heads, part, its)
        d_query, *of_keys = gradients
        # Sums of keys' gradients are rounded before they go back: half the bytes of float32's.
        results = [exchange.back(x) for x in (d_query, *(x.astype(spec.dtype) for x in of_keys))]
        found = put(found, results, number, pieces) if pieces > 1 else results
        d_bias = _joined(d_bias, more)
        if pieces > 1:
            found, own, rows = lax.optimization_barrier((found, own, rows))
    if d_bias is None:
        return tuple(found)
    assert spec.d_bias_shape is not None
    return (*found, d_bias[..., : spec.d_bias_shape[3]].astype(spec.bias_dtype))


def _joined(d_bias: Array | None, more: Array | None) -> Array | None:
    """The gradient of a bias with that of a piece of its heads, or of the one for all of them."""
    if d_bias is None or more is None:
        return more
    return d_bias + more if more.shape[1] == 1 else jnp.concatenate([d_bias, more], axis=1)


def past_zeroed(spec: AttentionSpec, x: Array, lengths: Array) -> Array:
    """x (B, T, ...) with zeros past the rows' lengths, which are those of the whole call."""
    if spec.context is None:
        return masking.past_zeroed(x, lengths)
    device, context = device_index(spec), context_of(spec)
    found = [
        masking.past_zeroed(queries_of(run, x), lengths - run.start(device))
        for run in runs(context.query_layout, context.devices, spec.queries)
    ]
    return jnp.concatenate(found, axis=1)


class Exchange:
    """What balances a causal mask in a ring: arrays of queries and keys made zigzag."""

    def __init__(self, plan: Plan, spec: AttentionSpec) -> None:
        context = plan.context
        self._is_needed = plan.is_balanced and plan.schedule == "ring"
        self._axes, self._devices = context.axes, context.devices
        if self._is_needed:
            context = replace(context, query_layout="zigzag", key_layout="zigzag")
        self.spec = replace(spec, context=context)

    def rows(self, x: Array) -> Array:
        """An array of queries."""
        return zigzagged(self._axes, self._devices, x) if self._is_needed else x

    def back(self, x: Array) -> Array:
        """A result for each query, or each key."""
        return contiguous(self._axes, self._devices, x) if self._is_needed else x

    def segments(self, operands: Operands) -> Operands:
        """A call's arrays with these exchanged, as all of its heads have them."""
        own = {name: getattr(operands, name) for name in ("query_segments", "key_segments")}
        made = {name: self.rows(x) for name, x in own.items() if x is not None}
        return operands._replace(**made)

    def piece(self, operands: Operands, number: int, pieces: int) -> tuple[AttentionSpec, Operands]:
        """The call of one of so many pieces of the heads, its queries and keys exchanged."""
        count = self.spec.kv_heads // pieces
        spec, own = self.spec, operands
        if pieces > 1:
            spec, own = kept_heads(spec, operands, number * count, count)
            own = own._replace(
                key=_of_piece(own.key, number, pieces), value=_of_piece(own.value, number, pieces)
            )
        made = [self.rows(x) for x in (own.query, own.key, own.value)]
        if self._is_needed:
            # Else XLA makes one transfer of one array's exchange and another's first hop.
            made = lax.optimization_barrier(made)
        query, key, value = made
        return spec, own._replace(query=query, key=key, value=value)


def _of_piece(x: Array, number: int, pieces: int) -> Array:
    """Of (B, t, heads, ...) one of so many pieces of the heads."""
    count = x.shape[2] // pieces
    return x if pieces == 1 else x[:, :, number * count : (number + 1) * count]
