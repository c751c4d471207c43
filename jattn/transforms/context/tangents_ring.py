"""Tangents by a ring: keys, values and their tangents go from device to device, as in `ring`.

    gradients'   the rows' log-sum-exp and its tangent are known, so that what some keys add to a
                 row's is a term of a sum; those of keys, in float32, go on with them, then home
    output's     of a hop's keys alone, whose own output and log-sum-exp are made again, and merged

The latter are seven products, not five. As terms of a sum, each rounded, they would cancel; nor do
kernels give such: what they take off the logits' tangents is of all keys of their call.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jattn.call.row_arrays import TangentRows
from jattn.call.spec import AttentionSpec
from jattn.transforms.context.kernels import Forward
from jattn.transforms.context.merge import Merged, Moved
from jattn.transforms.context.moving import OF_KEYS, Given, Moving, own_keys
from jattn.transforms.context.parts import Part
from jattn.transforms.context.plan import Plan
from jattn.transforms.context.ring import added, query_runs, sent

__all__ = ["moved", "of_output"]


def moved(kernel: Moving, plan: Plan, spec: AttentionSpec, given: Given) -> dict[str, Array]:
    """The results of a device's rows and keys, by name."""
    rows = kernel.sums_of_rows(given, spec.accumulator)
    bias = kernel.bias(spec, given.operands)
    held, at = own_keys(given), 0
    shapes = {name: getattr(given.operands, name).shape for name in kernel.named(OF_KEYS)}
    arriving: dict[str, Array] | None = None
    for number, hop in enumerate(plan.hops):
        if number == 0:
            held, at = sent(spec, held, hop.distance), hop.distance
        is_last = number + 1 == len(plan.hops)
        step = 0 if is_last else plan.hops[number + 1].distance - at
        coming = ({}, {}) if is_last else sent(spec, held, step)
        own = {name: jnp.zeros(shape, spec.accumulator) for name, shape in shapes.items()}
        for _, _, part in hop.parts:
            found = kernel.of(part, spec, given.at(part, spec, *held))
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


def of_output(
    forward: Forward, kernel: Moving, plan: Plan, spec: AttentionSpec, given: Given
) -> dict[str, Array]:
    """The tangents of the output and of the log-sum-exp of a device's rows, by name.

    kernel: of those of a part's keys.
    """
    sizes = [(spec.batch, run.count, spec.heads) for run in query_runs(spec)]
    moved = [Moved.of_nothing(size, spec.value_dim, spec.accumulator) for size in sizes]
    held, at = own_keys(given), 0
    for number, hop in enumerate(plan.hops):
        if number == 0:
            held, at = sent(spec, held, hop.distance), hop.distance
        is_last = number + 1 == len(plan.hops)
        coming = ({}, {}) if is_last else sent(spec, held, plan.hops[number + 1].distance - at)
        for i, _, part in hop.parts:
            its = given.at(part, spec, *held)
            out, top, rest = forward.run(part.spec(spec), its.operands)
            rows = TangentRows(top, rest, out.astype(spec.dtype), None)
            t_out, t_lse = kernel.run(part.spec(spec), Given.of(its.operands, rows, its.tangents))
            found = Moved(Merged(out, top, rest), t_out, t_lse)
            moved[i] = moved[i].and_of(found, forward.unit)
        held, moved = lax.optimization_barrier((coming, moved))
        at = at if is_last else plan.hops[number + 1].distance
    whole = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1), *moved)
    if spec.has_sinks:
        of_sinks = given.rows.get("of_sinks")
        whole = whole.beside(given.rows["top"], given.rows["rest"], of_sinks, forward.unit)
    return {"t_out": whole.t_out, "t_lse": whole.t_lse}


def _with_part(x: Array, part: Array, of: Part) -> Array:
    return added(x, part, of.queries.first)
