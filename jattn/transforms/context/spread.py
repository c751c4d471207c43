"""A pair of kernels that know of one device, as one for what a device holds of a longer call."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from jax import Array

from jattn.call import masking
from jattn.call.spec import AttentionSpec, Operands
from jattn.transforms.context import gather, heads, ring
from jattn.transforms.context.balance import contiguous, zigzagged
from jattn.transforms.context.kernels import Backward, Forward, Pair, Saved
from jattn.transforms.context.parts import context_of, device_index, queries_of
from jattn.transforms.context.plan import Plan, plan_of
from jattn.transforms.context.runs import runs

__all__ = ["backward", "forward", "past_zeroed"]

_SCHEDULES = {"gather": gather, "heads": heads, "ring": ring}


def forward(kernels: Pair, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array, Array]:
    """`kernels.forward` of a call that may be part of a longer one."""
    if spec.context is None:
        return kernels.forward(spec, operands)
    plan = plan_of(spec)
    exchange = _Exchange(plan, spec)
    kernel = Forward(kernels.forward, kernels.unit(spec))
    own_spec, own = exchange.spec, exchange.operands(operands)
    found = _SCHEDULES[plan.schedule].forward(kernel, plan, own_spec, own)
    out, top, rest = found
    if operands.sinks is not None:
        shift = jnp.where(top == -jnp.inf, 0, top) * kernel.unit
        sinks = operands.sinks.astype(top.dtype).reshape(-1, 1, spec.heads)
        out = found.beside(sinks - shift)
    out, top, rest = (exchange.back(x) for x in (out.astype(spec.dtype), top, rest))
    return out, top, rest


def backward(
    kernels: Pair,
    spec: AttentionSpec,
    operands: Operands,
    saved: tuple[Array, Array, Array, Array],
    *,
    wants_bias: bool,
    wants_scale: bool,
) -> tuple[Array, ...]:
    """`kernels.backward` likewise."""
    if spec.context is None:
        return kernels.backward(
            spec, operands, *saved, wants_bias=wants_bias, wants_scale=wants_scale
        )
    plan = plan_of(spec)
    exchange = _Exchange(plan, spec)
    kernel = Backward(kernels, wants_bias, wants_scale)
    rows = Saved(*(exchange.rows(x) for x in saved))
    found = _SCHEDULES[plan.schedule].backward(
        kernel, plan, exchange.spec, exchange.operands(operands), rows
    )
    d_query, d_key, d_value, d_bias = found
    gradients = (
        exchange.back(d_query),
        exchange.back(d_key.astype(spec.dtype)),
        exchange.back(d_value.astype(spec.dtype)),
    )
    if d_bias is None:
        return gradients
    assert spec.d_bias_shape is not None
    return (*gradients, d_bias[..., : spec.d_bias_shape[3]].astype(spec.bias_dtype))


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


class _Exchange:
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

    def operands(self, operands: Operands) -> Operands:
        """Those of a call."""
        names = ("query", "query_segments", "key", "value", "key_segments")
        own = {name: getattr(operands, name) for name in names}
        made = {name: self.rows(x) for name, x in own.items() if x is not None}
        return operands._replace(**made)
