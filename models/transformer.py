"""A decoder-only language model over bytes: RMSNorm, rotary positions, grouped heads, SwiGLU.

    x = embedding[tokens]
    x = x + attention(norm(x));  x = x + mlp(norm(x))      once per block
    logits = norm(x) @ head

B batch, T positions, D width of the residual stream, N query heads, K key/value heads, H head dim,
F inner width of the feed-forward layer, L blocks.

The norms have no gains: each stands before a matrix, which can hold them. The blocks' weights are
arrays with a leading axis L, over which `jax.lax.scan` runs one compiled block, or all of them.
"""

import dataclasses
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from jattn import dot_product_attention
from models.implementations import JATTN_NAMES, AttnImplementation
from models.positions import RotaryTable, document_positions, rotate, table_of
from models.rematerialisation import Rematerialize, rematerialized

VOCABULARY = 256  # one token per byte value


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

    rematerialize: Rematerialize = "nothing"
    """What backward computes again instead of keeping it: nothing; what is no matrix product, of
    which the gates' product alone is kept otherwise (elementwise); the whole block but attention,
    of which the output and log-sum-exp are kept (block); or attention too, the dearest part of a
    long block (everything)."""

    scan_blocks: bool = True
    """Compile one block and loop over the layers, instead of compiling each layer by itself, which
    takes longer and somewhat more memory: train.py loops where that alone fits. The loop copies
    what a layer keeps for backward, 3 to 5% of a step on an H100."""

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
        """About 0.4 million weights, for minutes on two cores."""
        return cls()

    @classmethod
    def gpu(cls) -> "TransformerConfig":
        """136 million weights in bfloat16, for sequences of 32k to 128k bytes."""
        return cls(
            hidden_size=1024,
            num_layers=12,
            num_heads=8,
            num_key_value_heads=2,
            head_dim=128,
            mlp_size=2816,
            rope_theta=500_000.0,
            rematerialize="elementwise",
            scan_blocks=False,
            dtype="bfloat16",
        )


def rotary_table(positions: jax.Array, config: TransformerConfig) -> RotaryTable:
    """The cosines and sines of RoFormer (Su et al. 2021), section 3.2.

    Args:
        positions: int32 (B or 1, T).
        config: the head dim H and the base of the wavelengths.

    Returns:
        Two arrays float32 (B or 1, T, 1, 2, H / 2).
    """
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = positions[..., None].astype(jnp.float32) * (config.rope_theta**-exponents)[None, None]
    return table_of(jnp.cos(angles), jnp.sin(angles))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def normalize(x: jax.Array, epsilon: float) -> jax.Array:
    """x over its root mean square (RMSNorm, Zhang and Sennrich 2019), along the last axis."""
    return _normalize(x, epsilon)[0]


def _normalize(x: jax.Array, epsilon: float) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    wide = x.astype(jnp.float32)
    factor = jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + epsilon)
    out = (wide * factor).astype(x.dtype)
    return out, (out, factor)


def _normalize_backward(
    epsilon: float, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array]:
    """From the result, which the product that follows keeps too, rather than from x."""
    out, factor = kept
    wide, wide_gradient = out.astype(jnp.float32), gradient.astype(jnp.float32)
    along = (wide * wide_gradient).mean(axis=-1, keepdims=True)
    return ((factor * (wide_gradient - wide * along)).astype(out.dtype),)


normalize.defvjp(_normalize, _normalize_backward)


class Attention(nnx.Module):
    """Causal self-attention with grouped heads and rotary positions: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        width, heads = config.hidden_size, config.num_heads * config.head_dim
        key_value_heads = config.num_key_value_heads * config.head_dim
        self.query = _weights(width, heads, config, rngs)
        self.key = _weights(width, key_value_heads, config, rngs)
        self.value = _weights(width, key_value_heads, config, rngs)
        self.out = _weights(heads, width, config, rngs, into_residual=True)

    def __call__(
        self, x: jax.Array, table: RotaryTable, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        config = self.config
        queries, keys = config.num_heads, config.num_key_value_heads
        # One product for all three: of few columns, or a sum over few, a product waits for memory.
        weights = [each[...].astype(x.dtype) for each in (self.query, self.key, self.value)]
        heads = (x @ jnp.concatenate(weights, axis=1)).reshape(*x.shape[:2], -1, config.head_dim)
        query, key, value = jnp.split(heads, (queries, queries + keys), axis=2)
        attended = dot_product_attention(
            rotate(query, table),
            rotate(key, table),
            value,
            is_causal=True,
            query_segment_ids=segment_ids,
            key_value_segment_ids=segment_ids,
            implementation=JATTN_NAMES[config.attn_implementation],
        )
        assert isinstance(attended, jax.Array)  # no log-sum-exp was asked for
        out = self.out[...].astype(x.dtype).reshape(*attended.shape[2:], -1)
        return jnp.einsum("btnh,nhd->btd", attended, out)  # of attention's result as it is kept


class SwiGLU(nnx.Module):
    """out(silu(gate(x)) * up(x)), Shazeer 2020: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.gate = _weights(config.hidden_size, config.mlp_size, config, rngs)
        self.up = _weights(config.hidden_size, config.mlp_size, config, rngs)
        self.out = _weights(config.mlp_size, config.hidden_size, config, rngs, into_residual=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        def gated(gate: jax.Array, up: jax.Array, weights: jax.Array) -> jax.Array:
            return (nnx.silu(gate) * up) @ weights

        if self.config.rematerialize == "elementwise":
            gated = jax.checkpoint(gated, prevent_cse=not self.config.scan_blocks)
        return gated(_product(x, self.gate), _product(x, self.up), self.out[...].astype(x.dtype))


class Block(nnx.Module):
    """One decoder block, normalised before each half: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.attention = Attention(config, rngs=rngs)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(
        self, x: jax.Array, table: RotaryTable, segment_ids: jax.Array | None = None
    ) -> jax.Array:
        epsilon = self.config.norm_epsilon
        x = x + self.attention(normalize(x, epsilon), table, segment_ids)
        return x + self.mlp(normalize(x, epsilon))


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
        # Drawn for all layers at once: a compiler's time goes by the number of random arrays.
        layers = rngs.split(config.num_layers)
        self.blocks = nnx.vmap(lambda rngs: Block(config, rngs=rngs))(layers)
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
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        if segment_ids is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        else:
            positions = document_positions(segment_ids)
        table = rotary_table(positions, config)
        graph, weights = nnx.split(self.blocks)
        weights = jax.tree.map(lambda weight: weight.astype(dtype), weights)  # once, for all uses

        def block(x: jax.Array, weights: Any) -> jax.Array:
            layer: Block = nnx.merge(graph, weights)
            return layer(x, table, segment_ids)

        if config.rematerialize in ("block", "everything"):
            block = rematerialized(block, config.rematerialize, in_a_loop=config.scan_blocks)
        # A product rather than a gather: on a GPU a gather's gradient adds in no fixed order.
        one_hot = jax.nn.one_hot(tokens, VOCABULARY, dtype=dtype)
        x, _ = jax.lax.scan(
            lambda x, weights: (block(x, weights), None),
            one_hot @ self.embedding[...].astype(dtype),
            weights,
            unroll=1 if config.scan_blocks else config.num_layers,
        )
        head = self.embedding if self.head is None else self.head
        return jnp.matmul(
            normalize(x, config.norm_epsilon),
            head[...].astype(dtype).T,
            preferred_element_type=jnp.float32,
        )


def _product(x: jax.Array, weights: nnx.Param[jax.Array]) -> jax.Array:
    return x @ weights[...].astype(x.dtype)


def _weights(
    inputs: int,
    outputs: int,
    config: TransformerConfig,
    rngs: nnx.Rngs,
    *,
    into_residual: bool = False,
) -> Any:
    # Layers that write to the residual stream start small, so that depth does not set its size.
    depth = 2 * config.num_layers if into_residual else 1
    return _matrix(inputs, outputs, config, rngs, scale=(depth * inputs) ** -0.5)


def _matrix(
    rows: int, columns: int, config: TransformerConfig, rngs: nnx.Rngs, *, scale: float
) -> Any:
    values = scale * jax.random.normal(rngs.params(), (rows, columns))
    return nnx.Param(values.astype(config.param_dtype))
