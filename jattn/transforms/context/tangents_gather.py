"""Tangents by a gather: every device gets all keys, values and their tangents of some heads."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jattn.call.spec import AttentionSpec
from jattn.transforms.context.gather import gathered, of_all_keys, scattered
from jattn.transforms.context.moving import OF_KEYS, OF_ROWS, Given, Moving, own_keys
from jattn.transforms.context.parts import context_of

__all__ = ["moved"]


def moved(kernel: Moving, spec: AttentionSpec, given: Given) -> dict[str, Array]:
    """The results of a device's rows and keys, by name.

    Queries stay where they are; the tangents of keys' gradients are added up over the devices and
    scattered.
    """
    context = context_of(spec)
    keys, t_keys = (
        {name: gathered(context, x) for name, x in of.items()} for of in own_keys(given)
    )
    rows: dict[str, list[Array]] = {name: [] for name in kernel.named(OF_ROWS)}
    terms: dict[str, list[Array]] = {name: [] for name in kernel.named(OF_KEYS)}
    bias = kernel.bias(spec, given.operands)
    for part in of_all_keys(spec):
        found = kernel.of(part, spec, given.at(part, spec, keys, t_keys))
        for name, held in (rows | terms).items():
            held.append(found[name])
        bias = kernel.with_bias(spec, bias, part, found)
    whole = {name: jnp.concatenate(x, axis=1) for name, x in rows.items()}
    sums = [[x.astype(spec.accumulator) for x in held] for held in terms.values()]
    of_keys = scattered(context, sums) if sums else []
    return whole | dict(zip(terms, of_keys, strict=True)) | bias
