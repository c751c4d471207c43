"""Tangents by a ring: keys, values and their tangents go from device to device, as in `ring`.

Every row's log-sum-exp and its tangent are known, so that what some of the keys add to a row's
results are terms of a sum; and those of keys, in float32, go on with them and then home.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from jattn.call.spec import AttentionSpec
from jattn.transforms.context.moving import OF_KEYS, Given, Moving, own_keys
from jattn.transforms.context.parts import Part
from jattn.transforms.context.plan import Plan
from jattn.transforms.context.ring import added, sent

__all__ = ["moved"]


def moved(kernel: Moving, plan: Plan, spec: AttentionSpec, given: Given) -> dict[str, Array]:
    """The results of a device's rows and keys, by name."""
    rows = kernel.sums_of_rows(given, spec.accumulator)
    bias = kernel.bias(spec, given.operands)
    held, at = own_keys(given), 0
    shapes = {name: getattr(given.operands, name).shape for name in kernel.named(OF_KEYS)}
    arriving: dict[str, Array] | None = None
    begun: set[int] = set()
    for number, hop in enumerate(plan.hops):
        if number == 0:
            held, at = sent(spec, held, hop.distance), hop.distance
        is_last = number + 1 == len(plan.hops)
        step = 0 if is_last else plan.hops[number + 1].distance - at
        coming = ({}, {}) if is_last else sent(spec, held, step)
        own = {name: jnp.zeros(shape, spec.accumulator) for name, shape in shapes.items()}
        for i, _, part in hop.parts:
            its = given.at(part, spec, *held)
            if i in begun:  # the sinks' part is of a row, not of its keys
                its = its._replace(rows={n: x for n, x in its.rows.items() if n != "of_sinks"})
            begun.add(i)
            found = kernel.of(part, spec, its)
            rows = {name: _with_part(x, found[name], part) for name, x in rows.items()}
            own = {name: added(x, found[name], part.keys.first) for name, x in own.items()}
            bias = kernel.with_bias(spec, bias, part, found)
        sums = own if arriving is None else {name: x + arriving[name] for name, x in own.items()}
        held, rows, sums = lax.optimization_barrier((coming, rows, sums))
        arriving = sent(spec, sums, -at if is_last else step)
        at += step
    if arriving is None:
        arriving = {name: jnp.zeros(shape, spec.accumulator) for name, shape in shapes.items()}
    return rows | arriving | bias


def _with_part(x: Array, part: Array, of: Part) -> Array:
    return added(x, part, of.queries.first)
