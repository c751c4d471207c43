"""Attention for Flax's attention modules, `flax.nnx` and `flax.linen` alike."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, Unpack, cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jattn.attention import dot_product_attention
from jattn.backends.table import Implementation
from jattn.call.arguments import AttentionOptions
from jattn.call.errors import UnsupportedAttentionError

__all__ = ["attention_fn"]

# What Flax passes at each call, so that setting it here would be overruled in silence.
_SET_ON_THE_MODULE = ("dropout_rate", "dropout_rng", "broadcast_dropout")


def attention_fn(
    *,
    implementation: Implementation | None = None,
    **options: Unpack[AttentionOptions],
) -> Callable[..., Array]:
    """An `attention_fn` for `nnx.MultiHeadAttention` and `linen.MultiHeadDotProductAttention`.

    Equal to Flax's own attention within rounding, for any number of batch dimensions, except for a
    query that may see no key (0 here, the mean of the values there) and for which elements dropout
    drops. What this attention cannot do (sowing the weights, custom einsums) it refuses.

    Args:
      implementation: as in `jattn.dot_product_attention`.
      **options: of `jattn.dot_product_attention`, but dropout, which the module sets, and
        `return_residual`. Attention is causal if `is_causal` is set here or in the module's call.

    Raises:
      TypeError: an option that the module sets. UnsupportedAttentionError, when called: a feature
        that needs the attention weights.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, jattn.flax
    >>> layer = nnx.MultiHeadAttention(
    ...     num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0),
    ...     attention_fn=jattn.flax.attention_fn(is_causal=True),
    ... )
    >>> layer(jnp.ones((1, 4, 8))).shape
    (1, 4, 8)
    """
    for name in _SET_ON_THE_MODULE:
        if name in options:
            raise TypeError(f"{name} is for the Flax module to set, not for attention_fn")
    if options.get("return_residual"):
        raise TypeError("return_residual: a Flax module takes one array from its attention_fn")
    always_causal = options.pop("is_causal", False)
    fixed: dict[str, Any] = dict(options)

    # Every keyword is named because linen passes only those that it finds in the signature.
    def attend(
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        input_positions: Any = None,
    ) -> Array:
        del force_fp32_for_softmax  # it always is
        _refuse_what_needs_weights(
            module=module,
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
            input_positions=input_positions,
        )
        common = jnp.result_type(query, key, value) if dtype is None else dtype
        batch = query.shape[:-3]
        with _matmul_precision(precision):
            out = dot_product_attention(
                _one_batch_axis(query.astype(common)),
                _one_batch_axis(key.astype(common)),
                _one_batch_axis(value.astype(common)),
                bias=None if bias is None else _logits_like(bias, batch),
                mask=None if mask is None else _logits_like(mask, batch).astype(bool),
                is_causal=always_causal or is_causal,
                implementation=implementation,
                dropout_rate=0.0 if deterministic else dropout_rate,
                dropout_rng=dropout_rng,
                broadcast_dropout=broadcast_dropout,
                **fixed,
            )
        return cast(Array, out).reshape(*batch, *out.shape[-3:])  # type: ignore[union-attr]

    return attend


def _refuse_what_needs_weights(**given: Any) -> None:
    advice = {
        "module": "sow_weights needs the attention weights, which are never stored",
        "input_positions": "apply the rotary embedding before attention",
    }
    for name, x in given.items():
        if x is not None:
            reason = advice.get(name, "the products run inside the attention backend")
            raise UnsupportedAttentionError(
                f"jattn.flax.attention_fn cannot take {name}: {reason}; "
                "Flax's own dot_product_attention can"
            )


def _matmul_precision(precision: Any) -> contextlib.AbstractContextManager[object]:
    if precision is None:
        return contextlib.nullcontext()
    if isinstance(precision, jax.lax.Precision):
        precision = precision.name.lower()
    if not isinstance(precision, str):
        raise TypeError(f"precision must be a jax.lax.Precision or its name, got {precision!r}")
    manager: contextlib.AbstractContextManager[object] = jax.default_matmul_precision(precision)
    return manager


def _one_batch_axis(x: Array) -> Array:
    """(batch..., length, heads, dim) with the batch axes made one, always."""
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _logits_like(x: Array, batch: tuple[int, ...]) -> Array:
    """A bias or mask broadcastable to (batch..., N, T, S) with one batch axis, of 1 if possible."""
    x = x[(None,) * (len(batch) + 3 - x.ndim)]
    own = x.shape[:-3]
    if math.prod(own) == 1:
        return x.reshape(1, *x.shape[-3:])
    x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
    return x.reshape(math.prod(batch), *x.shape[-3:])
