"""The `cudnn` backend: cuDNN's fused attention, through `jax.nn.dot_product_attention`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

# By its own name from now on: a user may put jattn's function in its place in jax.nn.
from jax.nn import dot_product_attention as jax_attention

from jattn.backends.elsewhere import WithLoops
from jattn.call.band import Band
from jattn.call.row_arrays import AnyBackwardRows
from jattn.call.spec import AttentionSpec, Operands
from jattn.call.target import Target
from jattn.transforms import derivatives

__all__ = ["attend", "gradient_bytes", "lacks", "refusals"]


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
            not _has_gpu() and not target.is_supposed
        ),
        f"dtype {spec.dtype.name} is not bfloat16 or float16": spec.element_bytes != 2,
        f"value head dim {spec.value_dim} differs from head dim {spec.head_dim}": (
            spec.value_dim != spec.head_dim
        ),
        f"a mask {spec.mask_shape} that hides a whole row would give the mean of the values": (
            spec.mask_shape is not None
        ),
        f"bias {spec.bias_shape}: one float32 for log-sum-exp loses the weights beside -1e9": (
            spec.bias_shape is not None
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
        **_band(spec),
    }
    return [reason for reason, applies in found.items() if applies]


def gradient_bytes(spec: AttentionSpec, target: Target) -> int:
    """Bytes that the gradient holds, as measured on an H100 (cuDNN 9.19).

    dQ in float32 and two numbers a row; dK and dV of each query head where heads share keys.
    """
    own = spec.batch * spec.queries * spec.heads * (spec.head_dim + 2) * 4
    grouped = spec.batch * spec.keys * spec.heads * (spec.head_dim + spec.value_dim)
    return own + (grouped * spec.element_bytes if spec.group > 1 else 0)


def attend(spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
    """Output (B, T, N, D) and log-sum-exp (B, T, N), which nobody asks of cuDNN, as 0."""
    return derivatives.attend(WithLoops(_Fused()), spec, operands)


@dataclass(frozen=True)
class _Fused:
    """cuDNN's pair (`transforms.kernels`), out of the one differentiable function that JAX has.

    It keeps a row's log-sum-exp as one float32, which is `top`.
    """

    can_partition = True
    takes_output = True
    takes_parts = False

    def makes_row_term(self, spec: AttentionSpec) -> bool:
        return False

    def unit(self, spec: AttentionSpec) -> float:
        return 1.0

    def forward(self, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array, Array]:
        out, backward = self._differentiable(spec, operands)
        (top,) = (x.swapaxes(1, 2) for x in jax.tree.leaves(backward) if _is_by_row(spec, x))
        return out, top, jnp.zeros_like(top)

    def backward(
        self,
        spec: AttentionSpec,
        operands: Operands,
        rows: AnyBackwardRows,
        /,
        *,
        wants_bias: bool,
        wants_scale: bool,
    ) -> tuple[Array, ...]:
        out, backward = self._differentiable(spec, operands)

        def saved(x: Any) -> Any:
            if x is out:
                return rows.of_output
            return rows.top.swapaxes(1, 2) if _is_by_row(spec, x) else x

        # Of its own forward nothing is left, and the compiler leaves it out.
        gradients: tuple[Array, ...] = jax.tree.map(saved, backward)(rows.d_out)
        return gradients

    def _differentiable(self, spec: AttentionSpec, operands: Operands) -> Any:
        window = None if spec.band.lower is None else (-spec.band.lower, 0)
        call = partial(
            jax_attention,
            scale=spec.scale,
            is_causal=spec.band.upper is not None,
            local_window_size=window,
            implementation="cudnn",
        )
        return jax.vjp(call, operands.query, operands.key, operands.value)


def _is_by_row(spec: AttentionSpec, x: Any) -> bool:
    """Of what JAX's rule saves: whether it is the log-sum-exp, (B, N, T)."""
    found: bool = x.dtype == spec.accumulator and x.shape == (spec.batch, spec.heads, spec.queries)
    return found


def _has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _head_dim(spec: AttentionSpec, target: Target) -> dict[str, bool]:
    most = 256 if (target.compute_capability or (0, 0)) >= (9, 0) else 128
    fits = spec.head_dim % 8 == 0 and spec.head_dim <= most
    return {f"head dim {spec.head_dim} is not a multiple of 8 up to {most}": not fits}


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
