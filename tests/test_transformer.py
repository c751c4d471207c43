"""The language model: shapes, what each position may depend on, and its options."""

from __future__ import annotations

import dataclasses
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn import UnsupportedAttentionError
from models import TransformerConfig, TransformerLM
from models.positions import document_positions, rotate
from models.transformer import rotary_table
from tests.promotion import of_others

TINY = TransformerConfig(
    hidden_size=32, num_layers=2, num_heads=4, num_key_value_heads=2, head_dim=8, mlp_size=48
)
LENGTH = 24


@cache
def _weights(config: TransformerConfig) -> tuple[Any, Any]:
    """The model's graph and random weights, the head's too, which training starts from zero."""
    graph, shapes = nnx.split(nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0))))
    draw = np.random.default_rng(0)
    weights = jax.tree.map(
        lambda leaf: jnp.asarray(draw.normal(0, 0.3, leaf.shape), leaf.dtype), shapes
    )
    return graph, weights


def _call(config: TransformerConfig, weights: Any, *arguments: jax.Array) -> jax.Array:
    model: TransformerLM = nnx.merge(_weights(config)[0], weights)
    return model(*arguments)


_compiled = jax.jit(_call, static_argnums=0)


def _logits(config: TransformerConfig, *arguments: jax.Array) -> np.ndarray[Any, Any]:
    return np.asarray(_compiled(config, _weights(config)[1], *arguments))


def _tokens(rows: int = 2, length: int = LENGTH, seed: int = 1) -> jax.Array:
    draw = np.random.default_rng(seed)
    return jnp.asarray(draw.integers(256, size=(rows, length)), jnp.uint8)


@cache
def _gradients(config: TransformerConfig) -> Any:
    def loss(weights: Any) -> jax.Array:
        return jnp.square(_call(config, weights, _tokens())).mean()

    return nnx.to_pure_dict(jax.jit(jax.grad(loss))(_weights(config)[1]))


def _initial_logits(config: TransformerConfig) -> np.ndarray[Any, Any]:
    return np.asarray(jax.jit(lambda: TransformerLM(config, rngs=nnx.Rngs(0))(_tokens()))())


def _assert_close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_logits_are_float32_for_every_byte_whatever_the_model_computes_in() -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        config = dataclasses.replace(TINY, dtype=dtype, param_dtype=dtype)
        with of_others():  # Flax's norms of 16 bits
            logits = jax.eval_shape(partial(_call, config), _weights(config)[1], _tokens())
        assert logits.shape == (2, LENGTH, 256)
        assert logits.dtype == jnp.float32


def test_a_byte_changes_no_earlier_logits_and_does_change_its_own() -> None:
    tokens, place = _tokens(), 10
    changed = tokens.at[:, place].add(1)
    before, after = _logits(TINY, tokens), _logits(TINY, changed)
    np.testing.assert_array_equal(before[:, :place], after[:, :place])
    for later in (place, LENGTH - 1):
        assert np.abs(before[:, later] - after[:, later]).max() > 1e-3


def test_initial_model_gives_every_byte_the_same_chance() -> None:
    logits = _initial_logits(TINY)
    np.testing.assert_array_equal(logits, np.zeros_like(logits))


def test_grouped_heads_are_full_heads_with_repeated_keys_and_values() -> None:
    _, weights = _weights(TINY)
    full = dataclasses.replace(TINY, num_key_value_heads=TINY.num_heads)
    repeated = nnx.to_pure_dict(weights)
    attention = repeated["blocks"]["attention"]
    for name in ("key", "value"):
        shape = (TINY.num_layers, TINY.hidden_size, TINY.num_key_value_heads, TINY.head_dim)
        heads = jnp.repeat(attention[name].reshape(shape), 2, axis=2)
        attention[name] = heads.reshape(*shape[:2], -1)
    full_weights = nnx.clone(_weights(full)[1])
    nnx.replace_by_pure_dict(full_weights, repeated)
    _assert_close(_logits(TINY, _tokens()), _compiled(full, full_weights, _tokens()))


def test_implementations_agree_in_logits_and_gradients() -> None:
    eager, chunked = (
        dataclasses.replace(TINY, attn_implementation=name)
        for name in ("eager", "memory_efficient")
    )
    _assert_close(_logits(eager, _tokens()), _logits(chunked, _tokens()))
    for other in (chunked, TINY):
        jax.tree.map(_assert_close, _gradients(eager), _gradients(other))


def test_packed_documents_equal_separate_ones() -> None:
    apart = _tokens(2, LENGTH // 2)
    packed = apart.reshape(1, LENGTH)
    ids = jnp.asarray([[7] * (LENGTH // 2) + [2] * (LENGTH // 2)], jnp.int32)
    together = _logits(TINY, packed, ids)
    _assert_close(together.reshape(2, LENGTH // 2, 256), _logits(TINY, apart))
    assert np.abs(together - _logits(TINY, packed)).max() > 1e-2


def test_positions_restart_with_each_document() -> None:
    ids = jnp.asarray([[3, 3, 3, 1, 1, 9], [0, 0, 0, 0, 0, 0]], jnp.int32)
    np.testing.assert_array_equal(document_positions(ids), [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])


def test_rotary_products_depend_on_the_distance_alone() -> None:
    q, k = np.random.default_rng(5).standard_normal((2, 1, 1, 1, TINY.head_dim), np.float32)

    def product(query_at: int, key_at: int) -> float:
        turned = [
            rotate(jnp.asarray(x), rotary_table(jnp.asarray([[place]]), TINY))
            for x, place in ((q, query_at), (k, key_at))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product(11, 4) == pytest.approx(product(107, 100), abs=1e-4)
    assert product(11, 4) != pytest.approx(product(11, 5), abs=1e-2)


def test_a_tied_head_is_the_embedding_table() -> None:
    def count(config: TransformerConfig) -> int:
        state = nnx.state(nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0))))
        return sum(leaf.size for leaf in jax.tree.leaves(state))

    tied = dataclasses.replace(TINY, tie_embeddings=True)
    assert count(TINY) - count(tied) == 256 * TINY.hidden_size
    assert 0.3 < _initial_logits(tied).std() < 3


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="flash runs on a GPU")
@pytest.mark.parametrize("name", ["flash", "flash_attention_2"])
def test_a_named_implementation_is_used_or_refused(name: str) -> None:
    with pytest.raises(UnsupportedAttentionError, match="flash: needs an NVIDIA GPU"):
        _logits(dataclasses.replace(TINY, attn_implementation=name), _tokens())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, r"num_heads \(4\) must be a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "head_dim must be even for rotary positions, got 7"),
        ({"num_layers": 0}, "num_layers must be positive, got 0"),
        ({"rope_theta": float("nan")}, "rope_theta must be positive, got nan"),
        (
            {"attn_implementation": "fast"},
            "attn_implementation must be one of eager, sdpa, flash, memory_efficient,"
            " flash_attention_2; got 'fast'",
        ),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16; got 'int8'"),
    ],
)
def test_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_presets_are_small_on_a_cpu_and_large_in_bfloat16_on_a_gpu() -> None:
    cpu, gpu = TransformerConfig.cpu(), TransformerConfig.gpu()
    assert cpu.hidden_size < 256
    assert gpu.hidden_size >= 1024
    assert gpu.dtype == "bfloat16"
    assert gpu.rematerialize != "nothing"
