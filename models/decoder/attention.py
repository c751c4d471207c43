"""A block's self-attention, and what a key/value cache has to be for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jattn import dot_product_attention
from models.decoder.config import DecoderConfig
from models.decoder.layers import Linear, RMSNorm
from models.implementations import JATTN_NAMES, AttnImplementation
from models.positions import RotaryTable, rotate
from models.rematerialisation import HEADS

__all__ = ["AttentionCall", "Cache", "CacheStep", "Context", "SelfAttention", "padding_segments"]


@dataclass(frozen=True)
class AttentionCall:
    """What a layer's attention is, apart from its arrays."""

    window: int | None
    """How many keys a query sees, itself included; None for all before it."""

    scale: float
    soft_cap: float | None
    implementation: str | None
    """jattn's name of it."""

    def options(self) -> dict[str, Any]:
        """The keywords of `jattn.dot_product_attention` that say so."""
        return {
            "is_causal": True,
            "local_window_size": None if self.window is None else (self.window - 1, 0),
            "scale": self.scale,
            "logits_soft_cap": self.soft_cap,
            "implementation": self.implementation,
        }


class CacheStep(Protocol):
    """A cache while one call of the decoder goes through it, layer by layer."""

    @property
    def positions(self) -> jax.Array:
        """int32 (B or 1, T): of the call's tokens, counted from each row's first real one."""

    def attend(
        self, layer: int, query: jax.Array, key: jax.Array, value: jax.Array, call: AttentionCall
    ) -> tuple[jax.Array, Self]:
        """Keeps keys and values (B, T, K, H); what the queries (B, T, N, H) find in all of them."""

    def end(self) -> Cache:
        """The cache with the call's tokens in it."""


class Cache(Protocol):
    """Keys and values of the tokens so far; a pytree."""

    def begin(self, count: int, attention_mask: jax.Array | None) -> CacheStep:
        """Starts a call with `count` more tokens a row, of which the mask (B, T) says the real."""


@dataclass(frozen=True)
class Context:
    """What all of a call's layers share."""

    tables: dict[Any, RotaryTable]
    """By the layers' `Rope`."""

    segment_ids: jax.Array | None = None
    """int32 (B, T): tokens see only those of their own id."""

    dropout_rng: jax.Array | None = None


def padding_segments(attention_mask: jax.Array) -> jax.Array:
    """Ids that part a row's tokens from its padding, int32 (B, T), in an order that skips blocks.

    Real tokens have 1, padding before them 0, after them 2; such that padding within them has 0.
    """
    real = attention_mask.astype(bool)
    index = jnp.arange(real.shape[1], dtype=jnp.int32)[None]
    last = jnp.max(jnp.where(real, index, -1), axis=1, keepdims=True)
    return jnp.where(real, 1, jnp.where(index > last, 2, 0)).astype(jnp.int32)


class SelfAttention(nnx.Module):
    """Causal self-attention with grouped heads and rotary positions: (B, T, D) -> (B, T, D)."""

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        *,
        attn_implementation: AttnImplementation,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.index, self.head_dim = index, config.head_dim
        self.rope = config.layers[index].rope
        self.dropout_rate = config.attention_dropout
        self.call = AttentionCall(
            window=config.layers[index].window,
            scale=config.attention_scale,
            soft_cap=config.attention_soft_cap,
            implementation=JATTN_NAMES[attn_implementation],
        )
        width = config.hidden_size
        heads = config.num_attention_heads * config.head_dim
        key_value_heads = config.num_key_value_heads * config.head_dim
        linear = partial(Linear, param_dtype=param_dtype, rngs=rngs)
        self.q_proj = linear(width, heads, bias=config.query_key_value_bias)
        self.k_proj = linear(width, key_value_heads, bias=config.query_key_value_bias)
        self.v_proj = linear(width, key_value_heads, bias=config.query_key_value_bias)
        self.o_proj = linear(heads, width, bias=config.output_bias)
        norm = partial(RMSNorm, config.head_dim, config, param_dtype=param_dtype)
        self.q_norm = norm() if config.query_key_norm else None
        self.k_norm = norm() if config.query_key_norm else None

    def __call__(
        self, x: jax.Array, context: Context, cache: CacheStep | None = None
    ) -> tuple[jax.Array, CacheStep | None]:
        table = context.tables[self.rope]
        query = self._heads(self.q_proj(x), self.q_norm, table)
        key = self._heads(self.k_proj(x), self.k_norm, table)
        value = self._heads(self.v_proj(x))
        if cache is not None:
            attended, cache = cache.attend(self.index, query, key, value, self.call)
        else:
            attended = self._attended(query, key, value, context)
        return self.o_proj(attended.reshape(*x.shape[:2], -1)), cache

    def _heads(
        self, x: jax.Array, norm: RMSNorm | None = None, table: RotaryTable | None = None
    ) -> jax.Array:
        x = x.reshape(*x.shape[:2], -1, self.head_dim)
        if norm is not None:
            x = norm(x)
        heads: jax.Array = checkpoint_name(x if table is None else rotate(x, table), HEADS)
        return heads

    def _attended(
        self, query: jax.Array, key: jax.Array, value: jax.Array, context: Context
    ) -> jax.Array:
        dropout: dict[str, Any] = {}
        if context.dropout_rng is not None and self.dropout_rate:
            rng = jax.random.fold_in(context.dropout_rng, self.index)
            dropout = dict(dropout_rate=self.dropout_rate, dropout_rng=rng)
        out = dot_product_attention(
            query,
            key,
            value,
            query_segment_ids=context.segment_ids,
            key_value_segment_ids=context.segment_ids,
            **self.call.options(),
            **dropout,
        )
        assert isinstance(out, jax.Array)  # no log-sum-exp was asked for
        return out
