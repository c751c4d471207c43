"""Tangents of what one device holds of a longer call, by the schedules' own transfers.

    heads     all queries, keys and their tangents of a share of the heads, by all-to-alls
    ring      keys, values and their tangents from device to device
    gather    all keys, values and their tangents, some heads at a time

Those of gradients of keys go the way that the keys came.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from jattn.call.row_arrays import BackwardTangentRows, TangentRows
from jattn.call.spec import AttentionSpec, Operands, Tangents
from jattn.transforms.context import tangents_gather, tangents_heads, tangents_ring
from jattn.transforms.context.gather import gathered, of_all_keys
from jattn.transforms.context.kernels import Forward
from jattn.transforms.context.moving import OF_KEYS, OF_ROWS, Given, Moving
from jattn.transforms.context.parts import Keys, Part, context_of
from jattn.transforms.context.pieces import put
from jattn.transforms.context.plan import Plan, plan_of
from jattn.transforms.context.spread import Exchange
from jattn.transforms.kernels import Kernels

__all__ = ["backward_tangent", "formula", "tangent"]


def tangent(
    kernels: Kernels,
    spec: AttentionSpec,
    operands: Operands,
    rows: TangentRows,
    tangents: Tangents,
) -> tuple[Array, Array]:
    """`kernels.tangent` of a call that may be part of a longer one."""
    if spec.context is None:
        return kernels.tangent(spec, operands, rows, tangents)
    plan = plan_of(spec)
    lowered = jax.jit(kernels.tangent, static_argnums=0)  # once for all parts that are alike

    def run(spec: AttentionSpec, given: Given) -> tuple[Array, ...]:
        own = TangentRows(*(given.rows.get(name) for name in TangentRows._fields))  # type: ignore[arg-type]
        found: tuple[Array, ...] = lowered(spec, given.operands, own, given.tangents)
        return found

    kernel, given = Moving(run, ("t_out", "t_lse")), Given.of(operands, rows, tangents)
    around = partial(tangents_ring.of_output, Forward.of(kernels, spec))
    if plan.schedule == "ring":  # where the output is made again
        given = given._replace(rows={n: x for n, x in given.rows.items() if n != "out"})
    t_out, t_lse = _moved(kernel, plan, spec, given, around)
    return t_out, t_lse


def backward_tangent(
    kernels: Kernels,
    spec: AttentionSpec,
    operands: Operands,
    rows: BackwardTangentRows,
    tangents: Tangents,
    *,
    wanted: tuple[str, ...],
) -> tuple[Array, ...]:
    """`kernels.backward_tangent` likewise."""
    if spec.context is None:
        return kernels.backward_tangent(spec, operands, rows, tangents, wanted=wanted)
    plan = plan_of(spec)
    lowered = jax.jit(kernels.backward_tangent, static_argnums=0, static_argnames="wanted")

    def run(spec: AttentionSpec, given: Given) -> tuple[Array, ...]:
        names = BackwardTangentRows._fields
        own = BackwardTangentRows(*(given.rows.get(name) for name in names))  # type: ignore[arg-type]
        found: tuple[Array, ...] = lowered(spec, given.operands, own, given.tangents, wanted=wanted)
        return found

    kernel, given = Moving(run, wanted), Given.of(operands, rows, tangents)
    return _moved(kernel, plan, spec, given, tangents_ring.moved)


type Around = Callable[[Moving, Plan, AttentionSpec, Given], dict[str, Array]]


def _moved(
    kernel: Moving, plan: Plan, spec: AttentionSpec, given: Given, around: Around
) -> tuple[Array, ...]:
    """A device's results by the plan's schedule, in order. around: those by a ring, by name."""
    if plan.schedule == "heads":
        return kernel.finished(spec, tangents_heads.moved(kernel, plan, spec, given))
    pieces = 1 if plan.context.has_whole_keys else plan.pieces
    found: list[Array] = []
    bias: list[Array] = []
    for number in range(pieces):
        part, own = given.of_heads(spec, number, pieces)
        if plan.schedule == "ring":
            made = _around(kernel, plan, part, own, around)
        else:
            made = tangents_gather.moved(kernel, part, own)
        if "bias" in made:
            bias.append(made.pop("bias"))
        found = put(found, [made[name] for name in kernel.named(OF_ROWS + OF_KEYS)], number, pieces)
        if number + 1 < pieces:  # no more than one piece's keys are held
            found, bias, given = lax.optimization_barrier((found, bias, given))
    whole = dict(zip(kernel.named(OF_ROWS + OF_KEYS), found, strict=True))
    if bias:
        of_all = bias[0].shape[1] == 1
        whole["bias"] = sum(bias[1:], bias[0]) if of_all else jnp.concatenate(bias, axis=1)
    return kernel.finished(spec, whole)


def _around(
    kernel: Moving, plan: Plan, spec: AttentionSpec, given: Given, around: Around
) -> dict[str, Array]:
    """By a ring, of arrays made zigzag where that makes work even."""
    exchange = Exchange(plan, spec)
    operands, t = given.operands, given.tangents
    named = ("query", "key", "value", "query_segments", "key_segments")
    own = {name: exchange.rows(x) for name in named if (x := getattr(operands, name)) is not None}
    moving = {
        name: exchange.rows(x)
        for name in ("query", "key", "value")
        if (x := getattr(t, name)) is not None
    }
    rows = {name: exchange.rows(x) for name, x in given.rows.items()}
    even = Given(operands._replace(**own), rows, t._replace(**moving))
    even = lax.optimization_barrier(even) if plan.is_balanced else even
    found = around(kernel, plan, exchange.spec, even)
    return {name: x if name == "bias" else exchange.back(x) for name, x in found.items()}


def formula(kernels: Kernels, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
    """`kernels.formula` likewise."""
    if spec.context is None:
        return kernels.formula(spec, operands)
    keys = _keys(spec, operands)
    found = []
    for part in of_all_keys(spec):
        own_spec, own = _own(part, spec, operands, keys)
        found.append(kernels.formula(own_spec, own._replace(sinks=operands.sinks)))
    out, lse = (jnp.concatenate(x, axis=1) for x in zip(*found, strict=True))
    return out, lse


def _own(
    part: Part, spec: AttentionSpec, operands: Operands, keys: Keys
) -> tuple[AttentionSpec, Operands]:
    """A part's call; whether a sink is in its rows' sums is known from the spec."""
    own = replace(part.spec(spec), has_sinks=spec.has_sinks)
    return own, part.operands(spec, operands, keys)


def _keys(spec: AttentionSpec, operands: Operands) -> Keys:
    """All keys, values and segment ids."""
    named = ("key", "value", "key_segments")
    own = {name: x for name in named if (x := getattr(operands, name)) is not None}
    return {name: gathered(context_of(spec), x) for name, x in own.items()}
