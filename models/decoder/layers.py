"""The parts of a block that are not attention: products, norms, the feed-forward layer.

Weights stand as Hugging Face stores them, a product's (outputs, inputs): a checkpoint's bytes then
go to the device as they are, and a product with one row reads each output's weights in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from models.decoder.config import DecoderConfig
from models.rematerialisation import GATES, NORMALIZED

__all__ = ["ACTIVATIONS", "MLP", "Embedding", "Linear", "RMSNorm", "product"]

_INITIAL = 0.02  # standard deviation of fresh weights, Hugging Face's initializer_range

_tanh_gelu = partial(jax.nn.gelu, approximate=True)
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": _tanh_gelu,
    "gelu_new": _tanh_gelu,
    "relu": jax.nn.relu,
}
"""The gates of feed-forward layers by Hugging Face's names."""


def product(
    x: jax.Array, weight: jax.Array, preferred_element_type: DTypeLike | None = None
) -> jax.Array:
    """x Wᵀ: (..., inputs) and (outputs, inputs) -> (..., outputs), in x's dtype or the preferred.

    Outside `jax.jit` too no transposed weight is made.
    """
    last = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        x, weight.astype(x.dtype), last, preferred_element_type=preferred_element_type
    )


class Linear(nnx.Module):
    """x Wᵀ + b: (..., inputs) -> (..., outputs), in x's dtype."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.weight = nnx.Param(_drawn(rngs, (outputs, inputs), param_dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, param_dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        out = product(x, self.weight[...])
        if self.bias is None:
            return out
        return out + jnp.expand_dims(self.bias[...].astype(out.dtype), range(out.ndim - 1))


class Embedding(nnx.Module):
    """The rows of a table that tokens name: int32 (B, T) -> (B, T, features)."""

    def __init__(
        self, tokens: int, features: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.weight = nnx.Param(_drawn(rngs, (tokens, features), param_dtype))

    def __call__(self, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
        """NaN for a token that the table does not have: traced code cannot raise."""
        table = self.weight[...]
        beyond = jnp.asarray(table.shape[0], tokens.dtype)  # negative ones would count from its end
        tokens = jnp.where(tokens < 0, beyond, tokens)
        return jnp.take(table, tokens, axis=0, mode="fill").astype(dtype)


class RMSNorm(nnx.Module):
    """x over its root mean square (Zhang and Sennrich 2019) times a weight, along the last axis.

    Sums are float32. The weight multiplies what is rounded to x's dtype (Llama) or, as 1 + weight,
    before it is rounded (Gemma).
    """

    def __init__(self, size: int, config: DecoderConfig, *, param_dtype: DTypeLike) -> None:
        self.epsilon, self.unit_offset = config.rms_norm_eps, config.unit_offset_norms
        fresh = jnp.zeros if self.unit_offset else jnp.ones
        self.weight = nnx.Param(fresh(size, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + self.epsilon)
        weight = jnp.expand_dims(self.weight[...], range(x.ndim - 1))
        if self.unit_offset:
            out = (wide * (1 + weight.astype(jnp.float32))).astype(x.dtype)
        else:
            out = wide.astype(x.dtype) * weight.astype(x.dtype)
        named: jax.Array = checkpoint_name(out, NORMALIZED)
        return named


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), Shazeer 2020: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: DecoderConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        width, inner = config.hidden_size, config.intermediate_size
        linear = partial(Linear, bias=config.mlp_bias, param_dtype=param_dtype, rngs=rngs)
        self.activation = config.activation
        self.gate_proj = linear(width, inner)
        self.up_proj = linear(width, inner)
        self.down_proj = linear(inner, width)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate = checkpoint_name(self.gate_proj(x), GATES)
        up = checkpoint_name(self.up_proj(x), GATES)
        down: jax.Array = self.down_proj(ACTIVATIONS[self.activation](gate) * up)
        return down


def _drawn(rngs: nnx.Rngs, shape: tuple[int, int], dtype: DTypeLike) -> jax.Array:
    return jnp.asarray(_INITIAL * jax.random.normal(rngs.params(), shape), dtype)
