"""The `cudnn` backend: cuDNN's fused attention, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

# By its own name from now on: a user may put jattn's function in its place in jax.nn.
from jax.nn import dot_product_attention as jax_attention

from jattn.call.band import Band
from jattn.call.spec import AttentionSpec, Operands
from jattn.call.target import Target
from jattn.transforms.rematerialisation import LOG_SUM_EXP, named

__all__ = ["attend", "lacks", "refusals"]


def lacks(target: Target) -> str | None:
    """What the target lacks for cuDNN; None if it runs there."""
    # cuDNN developer guide, "Fused flash attention": from Ampere on; JAX itself does not check.
    if target.is_nvidia and (target.compute_capability or (8, 0)) >= (8, 0):
        return None
    return f"needs an NVIDIA GPU of compute capability 8.0 or later, the target is {target}"


def refusals(spec: AttentionSpec, target: Target) -> list[str]:
    """Why cuDNN cannot do the call with the semantics promised; empty if it can."""
    found = {
        "this process has no GPU, and cuDNN plans a call where the GPU is": (
            jax.default_backend() != "gpu" and not target.is_supposed
        ),
        f"dtype {spec.dtype.name} is not bfloat16 or float16": spec.element_bytes != 2,
        f"value head dim {spec.value_dim} differs from head dim {spec.head_dim}": (
            spec.value_dim != spec.head_dim
        ),
        f"a mask {spec.mask_shape} that hides a whole row would give the mean of the values": (
            spec.mask_shape is not None
        ),
        f"an odd length (T {spec.queries}, S {spec.keys}) has no gradient": (
            spec.queries % 2 != 0 or spec.keys % 2 != 0
        ),
        "query_offset is an array, whose values it cannot see": spec.has_query_offset,
        "segment ids would need a dense mask": spec.has_segments,
        "sequence lengths: rows and keys past them are not promised to be left out": (
            spec.has_query_lengths or spec.has_key_lengths
        ),
        f"logits_soft_cap {spec.logits_soft_cap}": spec.logits_soft_cap is not None,
        "sinks": spec.has_sinks,
        "scale is an array, where cuDNN takes a number": spec.scale is None,
        f"dropout_rate {spec.dropout_rate}: its mask is not the one all backends share": (
            spec.dropout_rate > 0
        ),
        "return_residual: its log-sum-exp is rounded and has no gradient": spec.wants_residual,
        **_head_dim(spec, target),
        **_bias(spec),
        **_band(spec),
    }
    return [reason for reason, applies in found.items() if applies]


def attend(spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
    """Output (B, T, N, D); the log-sum-exp is never asked of cuDNN and comes as 0."""
    out = _attend(spec, operands.query, operands.key, operands.value, operands.bias)
    return out, jnp.zeros(out.shape[:-1], spec.accumulator)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    spec: AttentionSpec, query: Array, key: Array, value: Array, bias: Array | None
) -> Array:
    return _cudnn(spec, query, key, value, bias)


def _cudnn(
    spec: AttentionSpec, query: Array, key: Array, value: Array, bias: Array | None
) -> Array:
    window = None if spec.band.lower is None else (-spec.band.lower, 0)
    out: Array = jax_attention(
        query,
        key,
        value,
        bias,
        scale=spec.scale,
        is_causal=spec.band.upper is not None,
        local_window_size=window,
        implementation="cudnn",
    )
    return out


def _attend_forward(spec: AttentionSpec, *inputs: Array | None) -> tuple[Array, Any]:
    """jax's own rule, with names on what it saves beside the inputs."""
    out, backward = jax.vjp(partial(_cudnn, spec), *inputs)
    named_out, _ = named(out, None)
    rows = (out.size // spec.value_dim, spec.accumulator)

    def keep(x: Any) -> Any:
        if x is out:
            return named_out
        return checkpoint_name(x, LOG_SUM_EXP) if (x.size, x.dtype) == rows else x

    return named_out, jax.tree.map(keep, backward)


def _attend_backward(spec: AttentionSpec, backward: Any, d_out: Array) -> Any:
    return backward(d_out)


_attend.defvjp(_attend_forward, _attend_backward)


def _head_dim(spec: AttentionSpec, target: Target) -> dict[str, bool]:
    most = 256 if (target.compute_capability or (0, 0)) >= (9, 0) else 128
    fits = spec.head_dim % 8 == 0 and spec.head_dim <= most
    return {f"head dim {spec.head_dim} is not a multiple of 8 up to {most}": not fits}


def _bias(spec: AttentionSpec) -> dict[str, bool]:
    shape = spec.bias_shape
    full = (1, spec.heads, spec.queries, spec.keys)
    return {
        f"bias {shape} is not (1, N, T, S) = {full}, for which alone it has a gradient": (
            shape is not None and shape != full
        ),
    }


def _band(spec: AttentionSpec) -> dict[str, bool]:
    band = spec.band
    lower = band.lower
    return {
        f"{band.describe()} is neither causal nor causal with a left window": (
            band != Band() and (band.upper != 0 or (lower is not None and lower > 0))
        ),
        f"{band.describe()} leaves queries without a key": (
            lower is not None and spec.queries - 1 + lower >= spec.keys
        ),
    }
