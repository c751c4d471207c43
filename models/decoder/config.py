"""What a decoder is: every size and choice that changes its results, resolved for each layer."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.decoder.rope import Rope

__all__ = ["DecoderConfig", "Layer"]


@dataclass(frozen=True)
class Layer:
    """What one block has of its own."""

    window: int | None
    """How many keys a query sees, itself included; None for all before it."""

    rope: Rope
    """The rotary positions of its queries and keys."""


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder, as `models.decoder.decoder_config` reads it from the fields of a `config.json`.

    Names are Hugging Face's where the meaning is. Compares and hashes by value, `source` left out.
    """

    family: str
    """`model_type` of config.json: one of `models.decoder.FAMILIES`."""

    vocab_size: int
    hidden_size: int
    """Width of the residual stream."""

    intermediate_size: int
    """Inner width of the feed-forward layer."""

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layers: tuple[Layer, ...]
    """One a block, from the embedding upwards."""

    rms_norm_eps: float
    activation: str
    """Of the feed-forward layer's gate; one of `models.decoder.layers.ACTIVATIONS`."""

    max_position_embeddings: int
    """The longest sequence it was trained for; nothing here stops at it."""

    tie_word_embeddings: bool
    """The embedding is the output layer too."""

    attention_scale: float
    """What multiplies Q Kᵀ."""

    query_key_value_bias: bool = False
    output_bias: bool = False
    """Of attention's output layer."""

    mlp_bias: bool = False
    query_key_norm: bool = False
    """RMSNorm of each query and key head, before the rotary positions (Qwen 3, Gemma 3)."""

    unit_offset_norms: bool = False
    """Norms multiply by 1 + weight, in float32, instead of by weight (Gemma)."""

    post_norms: bool = False
    """A norm also after attention and after the feed-forward layer (Gemma 2 and 3)."""

    embedding_scale: float = 1.0
    """What multiplies the embedding, rounded to the computation's dtype (Gemma)."""

    attention_soft_cap: float | None = None
    """cap * tanh(logits / cap) of attention's logits, before any mask (Gemma 2)."""

    logits_soft_cap: float | None = None
    """The same of the output logits."""

    attention_dropout: float = 0.0
    """Share of attention's weights dropped where a call brings a `dropout_rng`."""

    dtype: str | None = None
    """What the checkpoint is for: float32, bfloat16 or float16; None if it does not say."""

    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a text."""

    pad_token_id: int | None = None

    source: str = field(default="{}", compare=False, repr=False)
    """The fields it was read from, as JSON."""
