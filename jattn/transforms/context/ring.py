"""A ring: keys and values go from device to device, and each makes its part of the result.

    forward     hop      0          1          2           K, V of hop h + 1 are sent before the
    kernel      |  K_i  |  K_i-1  |  K_i-2  |              kernel of hop h, and no hop before
    K, V        |--> sent -->|--> sent -->|                the kernel of hop h - 1 is done

    backward    kernel of hop h makes dK, dV of the keys that are there; what all devices before
                made of these, in float32, comes in meanwhile, and goes on with it; after the last
                hop they go home

(Liu et al., "Ring Attention with Blockwise Transformers", 2023; backward as in Li et al.,
"DISTFLASHATTN", 2023.) Backward takes the whole rows' log-sum-exp, so that a kernel's gradients are
parts of the sums, and are added up.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jattn.call.row_arrays import BackwardRows
from jattn.call.spec import AttentionSpec, Operands
from jattn.transforms.context.kernels import Backward, Forward, Gradients
from jattn.transforms.context.merge import Merged
from jattn.transforms.context.parts import Keys, context_of, queries_of
from jattn.transforms.context.plan import Plan
from jattn.transforms.context.runs import Run, runs

__all__ = ["added", "backward", "forward", "query_runs", "sent"]


def forward(kernel: Forward, plan: Plan, spec: AttentionSpec, operands: Operands) -> Merged:
    """The rows' output without sinks, in float32, and their numbers."""
    merged = [
        Merged.of_nothing((spec.batch, run.count, spec.heads), spec.value_dim, spec.accumulator)
        for run in query_runs(spec)
    ]
    held, at = _own_keys(operands), 0
    for number, hop in enumerate(plan.hops):
        if number == 0:
            held, at = sent(spec, held, hop.distance), hop.distance
        coming: Keys = {}
        if number + 1 < len(plan.hops):
            coming = sent(spec, held, plan.hops[number + 1].distance - at)
        for i, _, part in hop.parts:
            found = Merged(*kernel.run(part.spec(spec), part.operands(spec, operands, held)))
            merged[i] = merged[i].and_of(found, kernel.unit)
        # What comes is sent on only when this hop is done: two hops' keys are held at most.
        held, merged = lax.optimization_barrier((coming, merged))
        if number + 1 < len(plan.hops):
            at = plan.hops[number + 1].distance
    return Merged(*(jnp.concatenate(x, axis=1) for x in zip(*merged, strict=True)))


def backward(
    kernel: Backward, plan: Plan, spec: AttentionSpec, operands: Operands, rows: BackwardRows
) -> Gradients:
    """The gradients of a device's arrays."""
    gradients = Gradients.zeros(spec, operands, wants_bias=kernel.wants_bias)
    d_query = [queries_of(run, gradients.query) for run in query_runs(spec)]
    d_bias = gradients.bias
    held, at = _own_keys(operands), 0
    arriving: list[Array] | None = None
    for number, hop in enumerate(plan.hops):
        if number == 0:
            held, at = sent(spec, held, hop.distance), hop.distance
        is_last = number + 1 == len(plan.hops)
        step = 0 if is_last else plan.hops[number + 1].distance - at
        coming: Keys = {} if is_last else sent(spec, held, step)
        own = [jnp.zeros(x.shape, spec.accumulator) for x in (operands.key, operands.value)]
        for i, _, part in hop.parts:
            found = kernel.of_some_keys(
                part.spec(spec),
                part.operands(spec, operands, held),
                jax.tree.map(partial(queries_of, part.queries), rows),
            )
            d_query[i] = d_query[i] + found[0].astype(spec.accumulator)
            own = [added(x, d, part.keys.first) for x, d in zip(own, found[1:3], strict=True)]
            if d_bias is not None:
                d_bias = kernel.with_bias(spec, d_bias, part, found[3])
        sums = own if arriving is None else [a + b for a, b in zip(arriving, own, strict=True)]
        held, d_query, sums = lax.optimization_barrier((coming, d_query, sums))
        arriving = sent(spec, sums, -at if is_last else step)
        at += step
    if arriving is None:
        arriving = [gradients.key, gradients.value]
    d_key, d_value = arriving
    of_query = kernel.summed(spec, operands, jnp.concatenate(d_query, axis=1))
    return Gradients(of_query, d_key, d_value, d_bias)


def query_runs(spec: AttentionSpec) -> tuple[Run, ...]:
    """Those of a device."""
    context = context_of(spec)
    return runs(context.query_layout, context.devices, spec.queries)


def _own_keys(operands: Operands) -> Keys:
    names = ("key", "value", "key_segments")
    return {name: x for name in names if (x := getattr(operands, name)) is not None}


def sent[T](spec: AttentionSpec, tree: T, places: int) -> T:
    """Arrays as they come from the device that many places before."""
    context = context_of(spec)
    n = context.devices
    if places % n == 0:
        return tree
    pairs = [(i, (i + places) % n) for i in range(n)]
    sent: T = jax.tree.map(lambda x: lax.ppermute(x, context.axes, pairs), tree)
    return sent


def added(x: Array, part: Array, first: int) -> Array:
    """x with a part added to its positions from `first` on."""
    part = part.astype(x.dtype)
    if part.shape == x.shape:
        return x + part
    old = lax.slice_in_dim(x, first, first + part.shape[1], axis=1)
    return lax.dynamic_update_slice_in_dim(x, old + part, first, axis=1)
