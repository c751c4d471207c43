"""What a call of the decoder may be told, and what each position's logits may depend on."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.decoder import Decoder, decoder_config
from tests.models.reference import assert_right, config, expected, fixed, loaded, padded

# Norms of heads, windows in some layers, biases: whatever a call could go past.
NAME = "qwen3-window"

type Array = np.ndarray[Any, Any]


@cache
def _model() -> tuple[Any, Any]:
    call, weights = fixed(loaded(NAME, attn_implementation="eager"))
    return jax.jit(call, static_argnames="logits_to_keep"), weights


def _logits(tokens: Any, **keywords: Any) -> Array:
    call, weights = _model()
    with jax.default_matmul_precision("highest"):
        return np.asarray(call(weights, jnp.asarray(tokens), **keywords))


def test_packed_documents_equal_separate_ones_and_padding_is_none_of_them() -> None:
    tokens, logits = expected(NAME)["tokens"], expected(NAME)["logits"]
    packed = np.concatenate((tokens[0, :14], tokens[1, :11], tokens[0, :7]))[None]
    ids = np.repeat([5, 2, 9], (14, 11, 7))[None].astype(np.int32)
    real = ids != 9
    together = _logits(packed, segment_ids=jnp.asarray(ids), attention_mask=jnp.asarray(real))[0]
    assert_right(NAME, "logits", together[:14], np.s_[0, :14])
    assert_right(NAME, "logits", together[14:25], np.s_[1, :11])
    assert np.abs(_logits(packed)[0, 14:25] - logits[1, :11]).max() > 0.1


def test_padding_among_documents_of_one_id_is_not_seen() -> None:
    """A document's real tokens see no padding, though the ids there are its own."""
    tokens = expected(NAME)["tokens"]
    ids = jnp.zeros(tokens.shape, jnp.int32)
    mask = jnp.ones(tokens.shape, jnp.int32).at[:, :9].set(0)
    row = np.concatenate((np.full((2, 9), 10**6), tokens[:, :-9]), axis=1).astype(np.int32)
    found = _logits(row, attention_mask=mask, segment_ids=ids)[:, 9:]
    assert_right(NAME, "logits", found, np.s_[:, :-9])


def test_positions_are_those_given() -> None:
    tokens, logits = expected(NAME)["tokens"], expected(NAME)["logits"]
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    assert_right(NAME, "logits", _logits(tokens, positions=index + 40))  # only distances matter
    assert np.abs(_logits(tokens, positions=2 * index) - logits).max() > 0.1


def test_only_the_last_logits_are_made_where_no_others_are_asked_for() -> None:
    tokens = expected(NAME)["tokens"]
    assert_right(NAME, "logits", _logits(tokens, logits_to_keep=3), np.s_[:, -3:])
    call, weights = fixed(loaded("gemma3-written"))  # no other width of it is the vocabulary's
    call = jax.jit(call, static_argnames="logits_to_keep")
    text = call.lower(weights, jnp.asarray(tokens), logits_to_keep=3).as_text()
    assert "2x3x64xf32" in text
    assert "2x32x64xf32" not in text


@pytest.mark.parametrize("token", [64, -1])
def test_a_token_that_the_vocabulary_lacks_shows(token: int) -> None:
    tokens, logits = expected(NAME)["tokens"], expected(NAME)["logits"]
    wrong = _logits(
        np.concatenate((tokens[:, :20], np.full((2, 12), token)), axis=1, dtype="int32")
    )
    assert np.isnan(wrong[:, 20:]).all()
    assert not np.isnan(logits).any()


def test_attention_drops_only_where_a_key_is_given() -> None:
    dropping = dataclasses.replace(config(NAME), attention_dropout=0.5)
    built = nnx.eval_shape(lambda: Decoder(dropping, rngs=nnx.Rngs(0), attn_implementation="eager"))
    graph, _ = nnx.split(built)
    _, weights = _model()
    tokens = jnp.asarray(expected(NAME)["tokens"])

    @jax.jit
    def call(weights: Any, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
        model: Decoder = nnx.merge(graph, weights)
        return model(tokens), model(tokens, dropout_rng=rng)

    without, first = call(weights, jax.random.key(0))
    _, second = call(weights, jax.random.key(1))
    assert_right(NAME, "logits", without)
    assert np.abs(first - without).max() > 0.1
    assert np.abs(first - second).max() > 0.1
    assert (
        decoder_config({"model_type": "llama", "attention_dropout": 0.1}).attention_dropout == 0.1
    )


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"tokens": jnp.zeros(4, jnp.int32)}, r"tokens must be integers \(B, T\), got int32\(4,\)"),
        ({"tokens": jnp.zeros((1, 4))}, "tokens must be integers"),
        ({"attention_mask": jnp.ones((1, 3))}, r"attention_mask .* \(1, 4\): \(1, 3\)"),
        ({"attention_mask": jnp.ones((1, 1, 4, 4))}, "attention_mask"),
        ({"segment_ids": jnp.ones((2, 4), jnp.int32)}, "segment_ids"),
        ({"positions": jnp.arange(4)}, "positions"),
        ({"logits_to_keep": 5}, "logits_to_keep must be from 1 to 4, got 5"),
        ({"logits_to_keep": 0}, "logits_to_keep must be from 1 to 4, got 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(keywords: dict[str, Any], text: str) -> None:
    model = loaded(NAME)
    with pytest.raises(ValueError, match=text):
        model(keywords.pop("tokens", jnp.zeros((1, 4), jnp.int32)), **keywords)


@pytest.mark.parametrize(
    ("keywords", "text"),
    [
        ({"attn_implementation": "flex"}, "attn_implementation must be one of .* got 'flex'"),
        ({"dtype": "int8"}, "dtype must be one of .* got 'int8'"),
        ({"param_dtype": "float64"}, "param_dtype"),
        ({"rematerialize": "all"}, "rematerialize"),
    ],
)
def test_options_that_are_none_are_named(keywords: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Decoder(config(NAME), rngs=nnx.Rngs(0), **keywords)


def test_padding_takes_memory_that_grows_linearly() -> None:
    one_layer = decoder_config(
        {
            "model_type": "llama",
            "vocab_size": 8,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "intermediate_size": 16,
            "num_attention_heads": 2,
        }
    )
    call, weights = fixed(nnx.eval_shape(lambda: Decoder(one_layer, rngs=nnx.Rngs(0))))

    def masked(weights: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        logits: jax.Array = call(weights, tokens, attention_mask=mask)
        return logits

    def held(length: int) -> int:
        row = jax.ShapeDtypeStruct((1, length), jnp.int32)
        memory = jax.jit(masked).lower(weights, row, row).compile().memory_analysis()
        assert memory is not None
        return int(memory.temp_size_in_bytes)

    once, twice = held(2048), held(4096)
    assert twice < 2.2 * once


@pytest.mark.parametrize("name", ["gemma2"])
def test_half_precision_errs_as_transformers_does(name: str) -> None:
    """By the root mean square of the distance to float32's logits."""
    model = loaded(name, dtype="bfloat16", attn_implementation="eager")
    call, weights = fixed(model)
    weights = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)
    logits = jax.jit(call)(weights, padded(name)[0][:2])
    assert logits.dtype == jnp.float32
    error = np.sqrt(np.square(np.asarray(logits) - expected(name)["logits"]).mean())
    assert error < 1.2 * expected(name)["bfloat16_error"]
    assert error > 1e-4  # it did compute in bfloat16
