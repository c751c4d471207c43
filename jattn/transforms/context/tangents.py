"""Tangents of what one device holds of a longer call: every device gets all keys.

Queries stay where they are. Keys, values and their tangents are gathered, in the order of their
positions, and the tangents of their gradients are added up over the devices and scattered.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jattn.call.row_arrays import BackwardTangentRows, TangentRows
from jattn.call.spec import AttentionSpec, Operands, Tangents
from jattn.transforms.context.gather import gathered, of_all_keys, scattered
from jattn.transforms.context.kernels import Gradients, added_bias
from jattn.transforms.context.parts import Keys, Part, context_of, device_index, queries_of
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
    keys, t_keys = _keys(spec, operands), _tangents_of_keys(spec, tangents)
    found = []
    for part in of_all_keys(spec):
        own = _own(part, spec, operands, keys)
        its_rows = jax.tree.map(partial(queries_of, part.queries), rows)
        found.append(kernels.tangent(*own, its_rows, _along(part, spec, tangents, t_keys)))
    t_out, t_lse = (jnp.concatenate(x, axis=1) for x in zip(*found, strict=True))
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
    context = context_of(spec)
    keys, t_keys = _keys(spec, operands), _tangents_of_keys(spec, tangents)
    by_rows: dict[str, list[Array]] = {"query": [], "scale": []}
    sums: dict[str, Array] = {}
    bias = Gradients.zeros(spec, operands, wants_bias="bias" in wanted).bias
    for part in of_all_keys(spec):
        own = _own(part, spec, operands, keys)
        its_rows = jax.tree.map(partial(queries_of, part.queries), rows)
        along = _along(part, spec, tangents, t_keys)
        found = kernels.backward_tangent(*own, its_rows, along, wanted=wanted)
        for name, x in zip(wanted, found, strict=True):
            if name in by_rows:
                by_rows[name].append(x)
            elif name == "bias":
                assert bias is not None
                bias = added_bias(spec, bias, part, x)
            else:
                more = x.astype(spec.accumulator)
                sums[name] = sums[name] + more if name in sums else more

    def whole(name: str) -> Array:
        if name in by_rows:
            return jnp.concatenate(by_rows[name], axis=1)
        if name == "bias":
            assert bias is not None
            assert spec.d_bias_shape is not None
            return bias[..., : spec.d_bias_shape[3]].astype(spec.bias_dtype)
        (summed,) = scattered(context, [[sums[name]]])
        return summed.astype(spec.dtype)

    return tuple(whole(name) for name in wanted)


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


def _tangents_of_keys(spec: AttentionSpec, tangents: Tangents) -> Keys:
    own = {"key": tangents.key, "value": tangents.value}
    return {name: gathered(context_of(spec), x) for name, x in own.items() if x is not None}


def _along(part: Part, spec: AttentionSpec, tangents: Tangents, t_keys: Keys) -> Tangents:
    """A part's tangents."""
    found: dict[str, Any] = dict(t_keys)
    if tangents.query is not None:
        found["query"] = queries_of(part.queries, tangents.query)
    if tangents.bias is not None:
        first, whole = part.keys.start(device_index(spec)), context_of(spec)
        rows = queries_of(part.queries, tangents.bias, axis=2)
        found["bias"] = part.columns(rows, first, whole)
    return Tangents(**found, scale=tangents.scale)
