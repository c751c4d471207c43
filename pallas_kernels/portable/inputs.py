"""The arrays of a call as the kernels take them, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array

from jattn.call import dropout
from pallas_kernels.portable.precision import factor
from pallas_kernels.portable.reach import in_reach
from pallas_kernels.portable.triton import LOG2E

if TYPE_CHECKING:
    from jattn.call.row_arrays import AnyBackwardRows
    from jattn.call.spec import AttentionSpec, Operands, Tangents

__all__ = ["backward_inputs", "forward_inputs", "log_sum_exp_inputs", "tangent_inputs"]


def forward_inputs(spec: AttentionSpec, operands: Operands) -> dict[str, Array]:
    """q, k, v as products take them, what else the call has, and of dropout two words of each row.

    Those are (B, N, T), or (B, 1, T) where heads share the mask. A kernel would make them again for
    each block of a row.
    """
    inputs = {
        "q": factor(spec, operands.query),
        "k": factor(spec, operands.key),
        "v": factor(spec, operands.value),
        "bias": operands.bias,
        "mask": in_reach(operands.mask),
        "query_lengths": operands.query_lengths,
        "key_lengths": operands.key_lengths,
        "query_segments": operands.query_segments,
        "key_segments": operands.key_segments,
        "query_offset": operands.query_offset,
        "scale": operands.scale,
    }
    if operands.dropout_seeds is not None:
        seeds = operands.dropout_seeds[:, :, None, None]
        heads = jnp.arange(1 if spec.broadcast_dropout else spec.heads, dtype=jnp.int32)
        queries = jnp.arange(spec.queries, dtype=jnp.int32)
        if operands.dropout_start is not None:
            queries = queries + operands.dropout_start[0]
            inputs["dropout_key"] = operands.dropout_start[1:]
        inputs["row_words"], inputs["more_words"] = dropout.row_words(
            (seeds[:, 0], seeds[:, 1]), heads[None, :, None], queries[None, None, :]
        )
    return {name: x for name, x in inputs.items() if x is not None}


def backward_inputs(
    spec: AttentionSpec, operands: Operands, rows: AnyBackwardRows
) -> dict[str, Array]:
    """The same with d_out, and the rows' numbers by head, (B, N, T)."""
    return (
        forward_inputs(spec, operands)
        | log_sum_exp_inputs(rows.top, rows.rest)
        | {"row_term": jnp.swapaxes(rows.of_output, 1, 2), "d_out": factor(spec, rows.d_out)}
    )


def log_sum_exp_inputs(top: Array, rest: Array) -> dict[str, Array]:
    """The log-sum-exp by head, (B, N, T), `rest` in base 2.

    The maximum of a row that sees nothing is infinite, which makes all its weights 0.
    """
    return {
        "top": jnp.swapaxes(jnp.where(top > -jnp.inf, top, jnp.inf), 1, 2),
        "rest": jnp.swapaxes(rest * LOG2E, 1, 2),
    }


def tangent_inputs(spec: AttentionSpec, tangents: Tangents) -> dict[str, Array]:
    """The tangents of a call's logits and values, those that there are, as products take them."""
    factors = {"tq": tangents.query, "tk": tangents.key, "tv": tangents.value}
    inputs = {name: factor(spec, x) for name, x in factors.items() if x is not None}
    others = {"t_bias": tangents.bias, "t_scale": tangents.scale}
    return inputs | {name: x for name, x in others.items() if x is not None}
