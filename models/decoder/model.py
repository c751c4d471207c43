"""The decoder that a `DecoderConfig` describes.

    x = embedding[tokens]
    x = x + attention(norm(x));  x = x + mlp(norm(x))      once per block
    logits = norm(x) @ head                                or their loss: see cross_entropy.py

B batch, T positions, D width of the residual stream, N query heads, K key/value heads, H head dim,
V vocabulary. Parameters have the paths of Hugging Face's keys, less the leading "model.".
"""

from __future__ import annotations

from typing import Any, get_args, overload

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.decoder.attention import Cache, CacheStep, Context, SelfAttention, padding_segments
from models.decoder.config import DecoderConfig
from models.decoder.cross_entropy import mean_cross_entropy
from models.decoder.layers import MLP, Embedding, Linear, RMSNorm, product
from models.decoder.rope import rotary_table
from models.implementations import AttnImplementation
from models.positions import document_positions
from models.rematerialisation import Rematerialize, rematerialized

__all__ = ["Block", "Decoder"]

_PADDING = -(2**31)  # the segment of padding among documents
_DTYPES = ("float32", "bfloat16", "float16")


class Block(nnx.Module):
    """One decoder block, normalised before each half: (B, T, D) -> (B, T, D)."""

    def __init__(
        self,
        config: DecoderConfig,
        index: int,
        *,
        attn_implementation: AttnImplementation,
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config, param_dtype=param_dtype)

        self.input_layernorm = norm()
        self.self_attn = SelfAttention(
            config,
            index,
            attn_implementation=attn_implementation,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        # Hugging Face's names: what stands before the feed-forward layer in most families is named
        # for standing after attention, and Gemma's of that name does stand there.
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm() if config.post_norms else None
        self.mlp = MLP(config, param_dtype=param_dtype, rngs=rngs)
        self.post_feedforward_layernorm = norm() if config.post_norms else None

    def __call__(
        self, x: jax.Array, context: Context, cache: CacheStep | None = None
    ) -> tuple[jax.Array, CacheStep | None]:
        attended, cache = self.self_attn(self.input_layernorm(x), context, cache)
        if self.pre_feedforward_layernorm is None or self.post_feedforward_layernorm is None:
            x = x + attended
            return x + self.mlp(self.post_attention_layernorm(x)), cache
        x = x + self.post_attention_layernorm(attended)
        fed = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(fed), cache


class Decoder(nnx.Module):
    """Causal language model over tokens.

    Args:
        config: what `decoder_config` reads from a `config.json`.
        rngs: for fresh weights.
        attn_implementation: attention by name, or an error when called; sdpa lets jattn pick,
            flash_attention_2 is flash.
        dtype: of activations and matrix products; sums in norms and softmax, rotary tables and
            logits are float32.
        param_dtype: what the weights are stored in; None for `dtype`.
        rematerialize: what backward computes again, see `models.rematerialisation`.

    Raises:
        ValueError: an unknown implementation or dtype.

    Example:
        >>> from models.decoder import Decoder, decoder_config
        >>> config = decoder_config({
        ...     "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2,
        ...     "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2})
        >>> model = Decoder(config, rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((2, 16), jnp.int32)).shape
        (2, 16, 64)
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rngs: nnx.Rngs,
        attn_implementation: AttnImplementation = "sdpa",
        dtype: DTypeLike = "float32",
        param_dtype: DTypeLike | None = None,
        rematerialize: Rematerialize = "nothing",
    ) -> None:
        _check("attn_implementation", attn_implementation, get_args(AttnImplementation))
        _check("rematerialize", rematerialize, get_args(Rematerialize))
        self.config, self.rematerialize = config, rematerialize
        self.dtype = _dtype("dtype", dtype)
        stored = self.dtype if param_dtype is None else _dtype("param_dtype", param_dtype)
        self.embed_tokens = Embedding(
            config.vocab_size, config.hidden_size, param_dtype=stored, rngs=rngs
        )
        self.layers = nnx.List(
            Block(
                config,
                index,
                attn_implementation=attn_implementation,
                param_dtype=stored,
                rngs=rngs,
            )
            for index in range(len(config.layers))
        )
        self.norm = RMSNorm(config.hidden_size, config, param_dtype=stored)
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else Linear(
                config.hidden_size, config.vocab_size, bias=False, param_dtype=stored, rngs=rngs
            )
        )

    @overload
    def __call__(
        self,
        tokens: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: None = None,
        logits_to_keep: int | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> jax.Array: ...

    @overload
    def __call__[C: Cache](
        self,
        tokens: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: C,
        logits_to_keep: int | None = None,
    ) -> tuple[jax.Array, C]: ...

    def __call__(
        self,
        tokens: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Any = None,
        logits_to_keep: int | None = None,
        dropout_rng: jax.Array | None = None,
    ) -> Any:
        """Logits of the token that follows each position.

        Args:
            tokens: integers (B, T); one that the vocabulary lacks makes NaN.
            attention_mask: bool or integers (B, T), nonzero for real tokens, zero for padding, on
                the left or on the right. Real tokens see no padding, and their positions count from
                the row's first real one; the logits of padding mean nothing.
            segment_ids: int32 (B, T), or None for one document per row. A document is a run of
                equal ids; no two documents of a row may share an id. Tokens see only their own
                document, and positions restart at each.
            positions: int32 (B or 1, T), if they are to be others.
            cache: keys and values of earlier tokens, see `Cache`.
            logits_to_keep: only of this many last positions; None for all.
            dropout_rng: a `jax.random` key; with it attention drops what `attention_dropout` of the
                configuration says, as in training.

        Returns:
            float32 (B, T or logits_to_keep, V); with a cache, also the cache with these tokens.

        Raises:
            ValueError: arguments whose shapes do not fit, or that a cache cannot be called with.
            jattn.UnsupportedAttentionError: the named implementation cannot run at this size.
        """
        tokens = jnp.asarray(tokens)
        _check_shapes(tokens, attention_mask, segment_ids, positions)
        if logits_to_keep is not None and not 1 <= logits_to_keep <= tokens.shape[1]:
            raise ValueError(
                f"logits_to_keep must be from 1 to {tokens.shape[1]}, got {logits_to_keep}"
            )
        if cache is not None and (segment_ids is not None or dropout_rng is not None):
            raise ValueError("a cache holds one document a row and no dropout")
        step: CacheStep | None = None
        if cache is not None:
            step = cache.begin(tokens.shape[1], attention_mask)
        x, step = self._hidden(tokens, attention_mask, segment_ids, positions, dropout_rng, step)
        if logits_to_keep is not None:
            x = x[:, x.shape[1] - logits_to_keep :]
        logits = self.logits(x)
        return logits if step is None else (logits, step.end())

    def loss(
        self,
        tokens: jax.Array,
        targets: jax.Array,
        *,
        attention_mask: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        dropout_rng: jax.Array | None = None,
        chunk: int | None = None,
    ) -> jax.Array:
        """Mean cross-entropy of the tokens that follow, without all logits in memory at once.

        That of `jax.nn.log_softmax(model(tokens, ...))` within rounding; so are its derivatives.

        Args:
            tokens, attention_mask, segment_ids, positions, dropout_rng: as of a call.
            targets: integers (B, T): the token that follows each position, `tokens[:, 1:]` and what
                comes after; negative where none is to be learnt, as in padding. One that the
                vocabulary lacks makes NaN.
            chunk: how many positions of each row have their logits made at once; None for about a
                gibibyte of them.

        Returns:
            float32 (), nats for each position that has a target; 0 if none has.

        Raises:
            ValueError: arguments whose shapes do not fit.
            jattn.UnsupportedAttentionError: the named implementation cannot run at this size.

        Example:
            >>> from models.decoder import Decoder, decoder_config
            >>> config = decoder_config({
            ...     "model_type": "llama", "vocab_size": 64, "hidden_size": 32,
            ...     "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4})
            >>> model, text = Decoder(config, rngs=nnx.Rngs(0)), jnp.zeros((2, 17), jnp.int32)
            >>> model.loss(text[:, :-1], text[:, 1:]).shape
            ()
        """
        tokens, targets = jnp.asarray(tokens), jnp.asarray(targets)
        _check_shapes(tokens, attention_mask, segment_ids, positions)
        if targets.shape != tokens.shape or not jnp.issubdtype(targets.dtype, jnp.signedinteger):
            raise ValueError(
                f"targets must be signed integers of the tokens' shape {tokens.shape}, got"
                f" {targets.dtype}{targets.shape}"
            )
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {chunk}")
        x, _ = self._hidden(tokens, attention_mask, segment_ids, positions, dropout_rng, None)
        return mean_cross_entropy(
            self.norm(x),
            self._head,
            targets,
            soft_cap=self.config.logits_soft_cap,
            chunk=chunk,
        )

    def _hidden(
        self,
        tokens: jax.Array,
        attention_mask: jax.Array | None,
        segment_ids: jax.Array | None,
        positions: jax.Array | None,
        dropout_rng: jax.Array | None,
        step: CacheStep | None,
    ) -> tuple[jax.Array, CacheStep | None]:
        """What leaves the last block, (B, T, D), and the cache's step behind it."""
        if attention_mask is not None:
            # Whatever stands in the padding, no token that the vocabulary lacks.
            tokens = jnp.where(attention_mask.astype(bool), tokens, 0)
        if positions is None:
            positions = (
                _positions(tokens.shape[1], attention_mask, segment_ids)
                if step is None
                else step.positions
            )
        context = Context(
            tables={
                rope: rotary_table(positions, rope)
                for rope in dict.fromkeys(layer.rope for layer in self.config.layers)
            },
            segment_ids=_segments(attention_mask, segment_ids),
            dropout_rng=dropout_rng,
        )
        x = self.embedded(tokens)
        for block in self.layers:
            x, step = self._through(block, x, context, step)
        return x, step

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """What enters the first block: (B, T) -> (B, T, D), in `dtype`."""
        x = self.embed_tokens(tokens, self.dtype)
        scale = self.config.embedding_scale
        # In the dtype of the computation, like the reference: Gemma is trained so.
        return x if scale == 1 else x * jnp.asarray(scale, self.dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        """Logits of what leaves the last block: (B, T, D) -> float32 (B, T, V)."""
        logits = product(self.norm(x), self._head, preferred_element_type=jnp.float32)
        cap = self.config.logits_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    @property
    def _head(self) -> jax.Array:
        """The output layer's weight, (V, D)."""
        head = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        return head[...]

    def _through(
        self, block: Block, x: jax.Array, context: Context, step: CacheStep | None
    ) -> tuple[jax.Array, CacheStep | None]:
        if step is not None or self.rematerialize == "nothing":
            return block(x, context, step)
        graph, weights = nnx.split(block)

        def of_weights(x: jax.Array, weights: Any) -> jax.Array:
            layer: Block = nnx.merge(graph, weights)
            return layer(x, context)[0]

        return rematerialized(of_weights, self.rematerialize)(x, weights), None


def _positions(
    length: int, attention_mask: jax.Array | None, segment_ids: jax.Array | None
) -> jax.Array:
    """int32 (B or 1, T): from the start of the row, of its document, or of its real tokens."""
    if segment_ids is not None:
        return document_positions(segment_ids)
    index = jnp.arange(length, dtype=jnp.int32)[None]
    if attention_mask is None:
        return index
    real = attention_mask.astype(bool)
    first = jnp.argmax(real, axis=1, keepdims=True).astype(jnp.int32)
    last = jnp.max(jnp.where(real, index, 0), axis=1, keepdims=True)
    return jnp.maximum(jnp.minimum(index, last) - first, 0)


def _segments(attention_mask: jax.Array | None, segment_ids: jax.Array | None) -> jax.Array | None:
    if attention_mask is None or segment_ids is None:
        return segment_ids if attention_mask is None else padding_segments(attention_mask)
    # No document's own: the padding of all of them.
    return jnp.where(attention_mask.astype(bool), segment_ids, _PADDING)


def _check_shapes(
    tokens: jax.Array,
    attention_mask: jax.Array | None,
    segment_ids: jax.Array | None,
    positions: jax.Array | None,
) -> None:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers (B, T), got {tokens.dtype}{tokens.shape}")
    for name, array in (("attention_mask", attention_mask), ("segment_ids", segment_ids)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"{name} must have the tokens' shape {tokens.shape}: {array.shape}")
    shapes = (tokens.shape, (1, tokens.shape[1]))
    if positions is not None and positions.shape not in shapes:
        raise ValueError(
            f"positions must have the shape {' or '.join(map(str, shapes))}: {positions.shape}"
        )


def _check(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


def _dtype(name: str, dtype: DTypeLike) -> Any:
    resolved = jnp.dtype(dtype)
    _check(name, resolved.name, _DTYPES)
    return resolved
