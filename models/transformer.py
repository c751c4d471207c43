"""A decoder-only language model over bytes: RMSNorm, rotary positions, grouped heads, SwiGLU.

    x = embedding[tokens]
    x = x + attention(norm(x));  x = x + mlp(norm(x))      once per block
    logits = norm(x) @ head

B batch, T positions, D width of the residual stream, N query heads, K key/value heads, H head dim.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from jattn import CHECKPOINT_NAMES, dot_product_attention

VOCABULARY = 256  # one token per byte value

AttnImplementation = Literal["eager", "sdpa", "flash", "memory_efficient", "flash_attention_2"]

# The names Hugging Face gives them -> jattn's `implementation=`; None lets jattn pick.
_JATTN_NAMES: dict[str, str | None] = {
    "eager": "eager",
    "sdpa": None,
    "flash": "flash",
    "memory_efficient": "memory_efficient",
    "flash_attention_2": "flash",
}

RotaryTable = tuple[jax.Array, jax.Array]  # cosines and sines, each (B or 1, T, 1, H / 2), float32


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and choices of the model; every value is checked when the config is made.

    Raises:
        ValueError: a size that is not positive, heads that do not group, an odd head dim, or an
            unknown implementation or dtype; the text carries the value and what is allowed.
    """

    hidden_size: int = 128
    """Width of the residual stream."""

    num_layers: int = 2
    """Number of decoder blocks."""

    num_heads: int = 4
    """Query heads of each attention layer; a multiple of the key/value heads."""

    num_key_value_heads: int = 2
    """Key and value heads, each shared by a group of query heads."""

    head_dim: int = 32
    """Size of one head; even, since rotary positions turn pairs."""

    mlp_size: int = 352
    """Inner width of the SwiGLU feed-forward layer."""

    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths; raise it for longer sequences."""

    norm_epsilon: float = 1e-6
    """Added to the mean square inside RMSNorm."""

    tie_embeddings: bool = False
    """Use the embedding table as the output layer too instead of a second matrix."""

    attn_implementation: AttnImplementation = "sdpa"
    """Attention by name, or an error; sdpa lets jattn pick, flash_attention_2 is flash."""

    rematerialize: bool = False
    """Recompute each block in the backward pass instead of keeping its activations."""

    rematerialize_attention: bool = False
    """With rematerialize: recompute attention too, the dearest part of a long block. Else a layer
    keeps its output and log-sum-exp, which takes H elements and 8 bytes a query head and token."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of activations and matrix products; sums inside norms and logits stay float32."""

    param_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type that the weights are stored and updated in."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) and not value > 0:
                raise ValueError(f"{field.name} must be positive, got {value}")
            allowed = get_args(field.type)
            if allowed and value not in allowed:
                raise ValueError(f"{field.name} must be one of {', '.join(allowed)}; got {value!r}")
        if self.num_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of"
                f" num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")

    @classmethod
    def cpu(cls) -> "TransformerConfig":
        """About 0.4 million weights: learns visibly in a minute on two cores."""
        return cls()

    @classmethod
    def gpu(cls) -> "TransformerConfig":
        """About 150 million weights in bfloat16, rematerialised, for sequences of 32k bytes."""
        return cls(
            hidden_size=1024,
            num_layers=12,
            num_heads=8,
            num_key_value_heads=2,
            head_dim=128,
            mlp_size=2816,
            rope_theta=500_000.0,
            rematerialize=True,
            dtype="bfloat16",
        )


def document_positions(segment_ids: jax.Array) -> jax.Array:
    """Position of each token inside its document, counted from 0.

    Args:
        segment_ids: int32 (B, T); a document is a run of equal ids.

    Returns:
        int32 (B, T).
    """
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    starts = jnp.pad(
        segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def rotary_table(positions: jax.Array, config: TransformerConfig) -> RotaryTable:
    """Cosines and sines of RoFormer (Su et al. 2021), section 3.2, for positions (B or 1, T)."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = positions[..., None].astype(jnp.float32) * (config.rope_theta**-exponents)[None, None]
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x: jax.Array, table: RotaryTable) -> jax.Array:
    """Turns each pair (x[i], x[i + H / 2]) of (B, T, heads, H) by its position's angle."""
    cosine, sine = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention with grouped heads and rotary positions: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, heads = config.hidden_size, config.num_heads * config.head_dim
        key_value_heads = config.num_key_value_heads * config.head_dim
        self.query = _linear(width, heads, config, rngs)
        self.key = _linear(width, key_value_heads, config, rngs)
        self.value = _linear(width, key_value_heads, config, rngs)
        self.out = _linear(heads, width, config, rngs, into_residual=True)

    def __call__(
        self, x: jax.Array, table: RotaryTable, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        heads = (*x.shape[:2], -1, self.config.head_dim)
        attended = dot_product_attention(
            rotate(self.query(x).reshape(heads), table),
            rotate(self.key(x).reshape(heads), table),
            self.value(x).reshape(heads),
            is_causal=True,
            query_segment_ids=segment_ids,
            key_value_segment_ids=segment_ids,
            implementation=_JATTN_NAMES[self.config.attn_implementation],
        )
        assert isinstance(attended, jax.Array)  # no log-sum-exp was asked for
        return self.out(attended.reshape(*x.shape[:2], -1))


class SwiGLU(nnx.Module):
    """out(silu(gate(x)) * up(x)), Shazeer 2020: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.gate = _linear(config.hidden_size, config.mlp_size, config, rngs)
        self.up = _linear(config.hidden_size, config.mlp_size, config, rngs)
        self.out = _linear(config.mlp_size, config.hidden_size, config, rngs, into_residual=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """One decoder block, normalised before each half: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = _norm(config, rngs)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = _norm(config, rngs)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(
        self, x: jax.Array, table: RotaryTable, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        x = x + self.attention(self.attention_norm(x), table, segment_ids)
        return x + self.mlp(self.mlp_norm(x))


class TransformerLM(nnx.Module):
    """Byte-level causal language model.

    Example:
        >>> model = TransformerLM(TransformerConfig.cpu(), rngs=nnx.Rngs(0))
        >>> model(jnp.zeros((2, 16), jnp.uint8)).shape
        (2, 16, 256)
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        # As an output layer the table has to start with logits of size one.
        scale = config.hidden_size**-0.5 if config.tie_embeddings else 1.0
        self.embedding = _matrix(VOCABULARY, config.hidden_size, config, rngs, scale=scale)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = _norm(config, rngs)
        self.head = (
            None
            if config.tie_embeddings
            else _matrix(VOCABULARY, config.hidden_size, config, rngs, scale=0.0)
        )

    def __call__(self, tokens: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
        """Logits of the byte that follows each position.

        Args:
            tokens: integer (B, T), each 0 to 255.
            segment_ids: int32 (B, T), or None for one document per row. A document is a run of
                equal ids; no two documents of a row may share an id. Tokens see only their own
                document, and positions restart at each.

        Returns:
            float32 (B, T, 256).

        Raises:
            jattn.UnsupportedAttentionError: the named implementation cannot run at this size.
        """
        if segment_ids is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        else:
            positions = document_positions(segment_ids)
        table = rotary_table(positions, self.config)
        block = _rematerialized(self.config) if self.config.rematerialize else Block.__call__

        dtype = jnp.dtype(self.config.dtype)
        # A product rather than a gather: on a GPU a gather's gradient adds in no fixed order.
        one_hot = jax.nn.one_hot(tokens, VOCABULARY, dtype=dtype)
        x = one_hot @ self.embedding[...].astype(dtype)
        for layer in self.blocks:
            x = block(layer, x, table, segment_ids)
        head = self.embedding if self.head is None else self.head
        return jnp.matmul(
            self.norm(x), head[...].astype(dtype).T, preferred_element_type=jnp.float32
        )


def _rematerialized(config: TransformerConfig) -> Callable[..., jax.Array]:
    """A block of which backward finds its input, and what attention's backward needs."""
    if config.rematerialize_attention:
        return nnx.remat(Block.__call__)
    keep = jax.checkpoint_policies.save_only_these_names(*CHECKPOINT_NAMES)
    return nnx.remat(Block.__call__, policy=keep)


def _linear(
    inputs: int,
    outputs: int,
    config: TransformerConfig,
    rngs: nnx.Rngs,
    *,
    into_residual: bool = False,
) -> nnx.Linear:
    # Layers that write to the residual stream start small, so that depth does not set its size.
    depth = 2 * config.num_layers if into_residual else 1
    init = nnx.initializers.variance_scaling(1.0 / depth, "fan_in", "normal")
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=init,
        rngs=rngs,
    )


def _norm(config: TransformerConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(
        config.hidden_size,
        epsilon=config.norm_epsilon,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        rngs=rngs,
    )


def _matrix(
    rows: int, columns: int, config: TransformerConfig, rngs: nnx.Rngs, *, scale: float
) -> Any:
    values = scale * jax.random.normal(rngs.params(), (rows, columns))
    return nnx.Param(values.astype(config.param_dtype))
