"""Keys and values of the tokens so far: prefill in chunks, then one token at a time.

A layer that sees all of a row keeps position p in slot p. One with a window of W keys keeps it in
slot p mod W, over the last position that no later query sees:

    window 4, positions 0 to 5 are there        slot    0  1  2  3
                                                holds   4  5  2  3

A step of one token writes one slot of a row and reads each slot once: attention does not ask in
which order keys stand, as their rotary positions are in them. A chunk of several tokens needs keys
that its own tokens overwrite, so it reads the window in order, itself behind it, then writes.

Each row counts its own tokens: its first real one is at position 0, in slot 0, whatever padding
stood to its left. What a query may see follows from its position, and no mask is kept.

B rows, T tokens of a call, K key/value heads, H head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from jattn import dot_product_attention

if TYPE_CHECKING:
    from models.decoder.attention import AttentionCall
    from models.decoder.config import DecoderConfig

__all__ = ["KVCache", "LayerCache"]


class LayerCache(NamedTuple):
    """One layer's keys and values, (B, slots, K, H) each: heads are not repeated for queries."""

    keys: Array
    values: Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """What a `Decoder` is called with as `cache=`, and returns; a pytree of constant shapes.

    Donate it to the function that takes it, and no step copies it.

    Example:
        >>> from models.decoder import decoder_config
        >>> config = decoder_config({
        ...     "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
        ...     "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2})
        >>> cache = KVCache.empty(config, batch=1, capacity=16)
        >>> cache.layers[0].keys.shape
        (1, 16, 2, 8)

    Then `logits, cache = model(tokens, cache=cache)`, for any number of tokens at a time.
    """

    layers: tuple[LayerCache, ...]
    lengths: Array
    """int32 (B,): how many tokens each row has."""

    capacity: int = field(metadata={"static": True})
    """How many tokens a row may have."""

    @classmethod
    def empty(
        cls, config: DecoderConfig, *, batch: int, capacity: int, dtype: DTypeLike = "float32"
    ) -> KVCache:
        """A cache without tokens.

        Args:
            config: of the decoder.
            batch: B.
            capacity: tokens a row may have; a query past them finds NaN. Layers with a window
                keep no more than that.
            dtype: the decoder's `dtype`.
        """
        if batch < 1 or capacity < 1:
            raise ValueError(f"batch and capacity must be at least 1: {batch}, {capacity}")

        def layer(window: int | None) -> LayerCache:
            slots = capacity if window is None else min(window, capacity)
            shape = batch, slots, config.num_key_value_heads, config.head_dim
            return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

        layers = tuple(layer(each.window) for each in config.layers)
        return cls(layers, jnp.zeros(batch, jnp.int32), capacity)

    def begin(self, count: int, attention_mask: Array | None = None) -> Step:
        """Starts a call with `count` more tokens a row.

        Args:
            count: T.
            attention_mask: (B, T), nonzero for a row's real tokens, which are one run or none; what
                is around them is not kept. None if all are real.
        """
        if attention_mask is None:
            first = jnp.zeros_like(self.lengths)
            real = jnp.full_like(self.lengths, count)
        else:
            is_real = attention_mask.astype(bool)
            real = is_real.sum(axis=1, dtype=jnp.int32)
            first = jnp.where(real > 0, jnp.argmax(is_real, axis=1).astype(jnp.int32), count)
        return Step(self, self.layers, _Chunk(self.lengths, first, real, count))


@dataclass(frozen=True)
class _Chunk:
    """The tokens of one call: of row b the real ones are at `first[b]` and the `real[b] - 1` after.

    Query i of row b is at position `offset[b] + i`; one that is padding may be anywhere.
    """

    lengths: Array
    first: Array
    real: Array
    count: int

    @property
    def offset(self) -> Array:
        """int32 (B,): the position of query 0."""
        return self.lengths - self.first

    @property
    def end(self) -> Array:
        """int32 (B,): each row's length with these tokens."""
        return self.lengths + self.real

    @property
    def index(self) -> Array:
        """int32 (1, T)."""
        return jnp.arange(self.count, dtype=jnp.int32)[None]

    @property
    def positions(self) -> Array:
        """int32 (B, T)."""
        return self.offset[:, None] + self.index

    @property
    def is_real(self) -> Array:
        """bool (B, T)."""
        return (self.positions >= self.lengths[:, None]) & (self.positions < self.end[:, None])


@dataclass(frozen=True)
class Step:
    """A cache while a call of the decoder goes through its layers."""

    cache: KVCache
    layers: tuple[LayerCache, ...]
    chunk: _Chunk

    @property
    def positions(self) -> Array:
        """int32 (B, T): of the tokens, each row's first real one being 0; 0 of padding before."""
        return jnp.maximum(self.chunk.positions, 0)

    def attend(
        self, layer: int, query: Array, key: Array, value: Array, call: AttentionCall
    ) -> tuple[Array, Step]:
        """Keeps a layer's keys and values (B, T, K, H); what queries (B, T, N, H) find in all."""
        before = self.layers[layer]
        _check_fit(before, key, value)
        slots, chunk = before.keys.shape[1], self.chunk
        wraps = slots < self.cache.capacity
        write = _write_ring if wraps else _write
        after = LayerCache(write(before.keys, key, chunk), write(before.values, value, chunk))
        options = call.options()
        if not wraps:
            out = _attention(query, after, options | {"query_offset": chunk.offset})
            lost = chunk.is_real & (chunk.positions >= self.cache.capacity)
            out = jnp.where(lost[..., None, None], jnp.nan, out)
        elif chunk.count == 1:  # all that it keeps is all that it sees
            options |= {"is_causal": False, "local_window_size": None}
            lengths = jnp.minimum(chunk.end, slots)
            out = _attention(query, after, options | {"key_value_seq_lengths": lengths})
        else:
            base = jnp.maximum(chunk.lengths - slots, 0)
            in_order = LayerCache(
                _in_order(before.keys, key, base, chunk),
                _in_order(before.values, value, base, chunk),
            )
            out = _attention(query, in_order, options | {"query_offset": chunk.offset - base})
        layers = (*self.layers[:layer], after, *self.layers[layer + 1 :])
        return out, replace(self, layers=layers)

    def end(self) -> KVCache:
        """The cache with the call's tokens in it."""
        return replace(self.cache, layers=self.layers, lengths=self.chunk.end)


def _attention(query: Array, kept: LayerCache, options: dict[str, object]) -> Array:
    out = dot_product_attention(query, kept.keys, kept.values, **options)  # type: ignore[arg-type]
    assert isinstance(out, jax.Array)  # no log-sum-exp was asked for
    return out


def _write(kept: Array, new: Array, chunk: _Chunk) -> Array:
    """`kept` with the real ones of `new` at their positions, as far as there are slots."""
    position, slots = chunk.positions, kept.shape[1]
    fits = chunk.is_real & (position < slots)
    return _put(kept, new, jnp.where(fits, position, slots + chunk.index))


def _write_ring(kept: Array, new: Array, chunk: _Chunk) -> Array:
    """`kept` with the last real ones of `new`, as many as there are slots."""
    position, slots = chunk.positions, kept.shape[1]
    stays = chunk.is_real & (position >= chunk.end[:, None] - slots)
    return _put(kept, new, jnp.where(stays, position % slots, slots + chunk.index))


def _put(kept: Array, new: Array, slot: Array) -> Array:
    """`kept` with `new` in its rows' slots (B, T), those past the last left out."""
    row = jnp.arange(kept.shape[0], dtype=jnp.int32)[:, None]
    return kept.at[row, slot].set(
        new, mode="drop", unique_indices=True, wrap_negative_indices=False
    )


def _in_order(ring: Array, new: Array, base: Array, chunk: _Chunk) -> Array:
    """(B, slots + T, K, H): positions from `base` on, first what the ring has, then the new."""
    slots = ring.shape[1]
    position = base[:, None] + jnp.arange(slots + chunk.count, dtype=jnp.int32)[None]
    own = jnp.clip(position - chunk.offset[:, None], 0, chunk.count - 1)
    source = jnp.where(position < chunk.lengths[:, None], position % slots, slots + own)
    row = jnp.arange(ring.shape[0], dtype=jnp.int32)[:, None]
    both = jnp.concatenate([ring, new], axis=1)
    return both.at[row, source].get(mode="promise_in_bounds", wrap_negative_indices=False)


def _check_fit(kept: LayerCache, key: Array, value: Array) -> None:
    for name, old, new in (("keys", kept.keys, key), ("values", kept.values, value)):
        wanted, got = ((x.shape[0], *x.shape[2:]) for x in (old, new))
        if wanted != got or old.dtype != new.dtype:
            raise ValueError(
                f"the cache has {name} of (batch, heads, head dim) {wanted} in {old.dtype}, the"
                f" call {got} in {new.dtype}"
            )
