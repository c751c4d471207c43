"""A wrong argument raises an error that names it, says what was given and what is allowed."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests import formula

B, T, S, N, K, H = 2, 6, 9, 4, 2, 8
Q, KV = jnp.zeros((B, T, N, H)), jnp.zeros((B, S, K, H))
CALLS = {
    "dot_product_attention": jattn.dot_product_attention,
    "eager": jattn.eager_attention,
    "memory_efficient": jattn.memory_efficient_attention,
    "flash": jattn.flash_attention,
    "explain": jattn.explain,
}
IDS, LENGTHS = partial(jnp.zeros, dtype=jnp.int32), partial(jnp.zeros, dtype=jnp.int32)
KEY = jax.random.key(0)


def case(name: str, error: type[Exception], *words: str, **arguments: Any) -> Any:
    return pytest.param(error, words, arguments, id=name)


WRONG = [
    case("rank_2", ValueError, "query", "BTNH", "(6, 8)", query=jnp.zeros((T, H))),
    case("rank_5", ValueError, "query", "BTNH", "(1, 2, 6, 4, 8)", query=Q[None]),
    case("mixed_ranks", ValueError, "key", "rank", "(9, 2, 8)", key=KV[0]),
    case("mixed_ranks_value", ValueError, "value", "rank", "(9, 2, 8)", value=KV[0]),
    case(
        "batches",
        ValueError,
        "key",
        "batch",
        "3",
        "2",
        key=jnp.zeros((3, S, K, H)),
        value=jnp.zeros((3, S, K, H)),
    ),
    case("value_length", ValueError, "value", "(2, 9, 2)", "(2, 8, 2)", value=KV[:, :8]),
    case("value_heads", ValueError, "value", "(2, 9, 2)", "(2, 9, 1)", value=KV[:, :, :1]),
    case("value_batch", ValueError, "value", "(1, 9, 2)", value=KV[:1]),
    case("head_dims", ValueError, "key", "head dim", "7", "8", key=KV[..., :7]),
    case("head_multiple", ValueError, "query heads (3)", "multiple", "(2)", query=Q[:, :, :3]),
    case("fewer_query_heads", ValueError, "query heads (1)", "multiple", "(2)", query=Q[:, :, :1]),
    case("no_head_dim", ValueError, "query", "above 0", query=Q[..., :0], key=KV[..., :0]),
    case("no_value", TypeError, "value", "array", "None", value=None),
    case("text_key", TypeError, "key must be an array", "'keys' (str)", key="keys"),
    case("object_bias", TypeError, "bias must be an array", "{1} (set)", bias={1}),
    case("large_int_bias", TypeError, "bias must be an array", f"{2**70} (int)", bias=2**70),
    case("text_sinks", TypeError, "sinks must be an array", "['a'] (list)", sinks=["a"]),
    case("key_as_flag", TypeError, "is_causal", "key<fry>", is_causal=KEY),
    case("array_as_flag", TypeError, "is_causal", "an array, float32[2, 6, 4, 8]", is_causal=Q),
    case("array_as_rate", TypeError, "dropout_rate", "float32[2, 6, 4, 8]", dropout_rate=Q),
    case("int_query", TypeError, "query", "float32", "int32", query=Q.astype(jnp.int32)),
    case("int_value", TypeError, "value", "float32", "int8", value=KV.astype(jnp.int8)),
    case("complex_key", TypeError, "key", "complex64", key=KV.astype(jnp.complex64)),
    case("mixed_dtypes", TypeError, "key", "float32", "bfloat16", key=KV.astype(jnp.bfloat16)),
    case(
        "mixed_dtypes_value", TypeError, "value", "float32", "float16", value=KV.astype(jnp.float16)
    ),
    case(
        "bias_keys",
        ValueError,
        "bias",
        "(2, 4, 6, 9)",
        "(1, 1, 1, 8)",
        bias=jnp.zeros((1, 1, 1, 8)),
    ),
    case(
        "bias_kv_heads",
        ValueError,
        "bias",
        "(2, 4, 6, 9)",
        "(2, 2, 6, 9)",
        bias=jnp.zeros((2, 2, 6, 9)),
    ),
    case("bias_batch", ValueError, "bias", "(3, 1, 1, 1)", bias=jnp.zeros((3, 1, 1, 1))),
    case("bias_rank", ValueError, "bias", "(1, 2, 4, 6, 9)", bias=jnp.zeros((1, 2, 4, 6, 9))),
    case("bias_bool", TypeError, "bias", "bool", "mask", bias=jnp.ones((1, 1, T, S), bool)),
    case(
        "bias_complex", TypeError, "bias", "complex64", bias=jnp.zeros((1, 1, T, S), jnp.complex64)
    ),
    case("mask_float", TypeError, "mask", "bool", "float32", mask=jnp.ones((1, 1, T, S))),
    case("mask_int", TypeError, "mask", "bool", "int32", mask=jnp.ones((1, 1, T, S), jnp.int32)),
    case("mask_shape", ValueError, "mask", "(2, 4, 6, 9)", "(9, 6)", mask=jnp.ones((S, T), bool)),
    case("mask_rank", ValueError, "mask", "(1, 1, 1, 6, 9)", mask=jnp.ones((1, 1, 1, T, S), bool)),
    case(
        "query_lengths_shape",
        ValueError,
        "query_seq_lengths",
        "(2,)",
        "(3,)",
        query_seq_lengths=LENGTHS(3),
    ),
    case(
        "key_lengths_shape",
        ValueError,
        "key_value_seq_lengths",
        "(2,)",
        "(1, 2)",
        key_value_seq_lengths=LENGTHS((1, 2)),
    ),
    case(
        "key_lengths_scalar",
        ValueError,
        "key_value_seq_lengths",
        "(2,)",
        "()",
        key_value_seq_lengths=LENGTHS(()),
    ),
    case(
        "lengths_float",
        TypeError,
        "key_value_seq_lengths",
        "integer",
        "float32",
        key_value_seq_lengths=jnp.ones(B),
    ),
    case(
        "lengths_bool",
        TypeError,
        "query_seq_lengths",
        "integer",
        "bool",
        query_seq_lengths=jnp.ones(B, bool),
    ),
    case(
        "query_segments_only",
        ValueError,
        "query_segment_ids",
        "key_value_segment_ids",
        "together",
        query_segment_ids=IDS((B, T)),
    ),
    case(
        "key_segments_only",
        ValueError,
        "query_segment_ids",
        "key_value_segment_ids",
        "together",
        key_value_segment_ids=IDS((B, S)),
    ),
    case(
        "segments_swapped",
        ValueError,
        "query_segment_ids",
        "(2, 6)",
        "(2, 9)",
        query_segment_ids=IDS((B, S)),
        key_value_segment_ids=IDS((B, T)),
    ),
    case(
        "segments_rank",
        ValueError,
        "query_segment_ids",
        "(2, 6)",
        "(6,)",
        query_segment_ids=IDS(T),
        key_value_segment_ids=IDS(S),
    ),
    case(
        "segments_float",
        TypeError,
        "key_value_segment_ids",
        "integer",
        "float32",
        query_segment_ids=IDS((B, T)),
        key_value_segment_ids=jnp.zeros((B, S)),
    ),
    case(
        "alignment",
        ValueError,
        "causal_alignment",
        "'top_left'",
        "'bottom_right'",
        "'centre'",
        causal_alignment="centre",
    ),
    case(
        "alignment_none",
        ValueError,
        "causal_alignment",
        "'top_left'",
        "None",
        causal_alignment=None,
    ),
    case("window_negative", ValueError, "local_window_size", "-1", local_window_size=-1),
    case(
        "window_negative_side",
        ValueError,
        "local_window_size",
        "(3, -2)",
        local_window_size=(3, -2),
    ),
    case(
        "window_triple", ValueError, "local_window_size", "(1, 2, 3)", local_window_size=(1, 2, 3)
    ),
    case(
        "window_float", (ValueError, TypeError), "local_window_size", "2.5", local_window_size=2.5
    ),
    case(
        "window_bool", (ValueError, TypeError), "local_window_size", "True", local_window_size=True
    ),
    case("window_text", (ValueError, TypeError), "local_window_size", "ab", local_window_size="ab"),
    case("soft_cap_zero", ValueError, "logits_soft_cap", "positive", "0", logits_soft_cap=0.0),
    case("soft_cap_negative", ValueError, "logits_soft_cap", "positive", "-5", logits_soft_cap=-5),
    case("soft_cap_nan", ValueError, "logits_soft_cap", "nan", logits_soft_cap=float("nan")),
    case("soft_cap_text", TypeError, "logits_soft_cap", "'big'", logits_soft_cap="big"),
    case("scale_infinite", ValueError, "scale", "finite", "inf", scale=float("inf")),
    case("scale_text", TypeError, "scale", "'auto'", scale="auto"),
    case("scale_array", ValueError, "scale", "one number", "(2,)", scale=np.ones(2)),
    case("sinks_shape", ValueError, "sinks", "(4,)", "(2,)", sinks=jnp.zeros(K)),
    case("sinks_rank", ValueError, "sinks", "(4,)", "(1, 4)", sinks=jnp.zeros((1, N))),
    case("sinks_int", TypeError, "sinks", "float", "int32", sinks=jnp.zeros(N, jnp.int32)),
    case("dropout_no_key", ValueError, "dropout_rng", "dropout_rate", "0.1", dropout_rate=0.1),
    case(
        "dropout_one",
        ValueError,
        "dropout_rate",
        "[0, 1)",
        "1.0",
        dropout_rate=1.0,
        dropout_rng=KEY,
    ),
    case(
        "dropout_negative",
        ValueError,
        "dropout_rate",
        "[0, 1)",
        "-0.1",
        dropout_rate=-0.1,
        dropout_rng=KEY,
    ),
    case(
        "dropout_nan", ValueError, "dropout_rate", "nan", dropout_rate=float("nan"), dropout_rng=KEY
    ),
    case("dropout_text", TypeError, "dropout_rate", "'low'", dropout_rate="low", dropout_rng=KEY),
    case(
        "dropout_key_int",
        TypeError,
        "dropout_rng",
        "int32",
        dropout_rate=0.1,
        dropout_rng=jnp.int32(3),
    ),
    case(
        "dropout_keys",
        TypeError,
        "dropout_rng",
        "2",
        dropout_rate=0.1,
        dropout_rng=jax.random.split(KEY),
    ),
    case("causal_text", TypeError, "is_causal", "'yes'", is_causal="yes"),
    case("causal_none", TypeError, "is_causal", "None", is_causal=None),
    case(
        "broadcast_dropout_text",
        TypeError,
        "broadcast_dropout",
        "'heads'",
        broadcast_dropout="heads",
    ),
    case("residual_text", TypeError, "return_residual", "'yes'", return_residual="yes"),
]


@pytest.mark.parametrize(("error", "words", "arguments"), WRONG)
@pytest.mark.parametrize("function", ["dot_product_attention", "explain"])
def test_the_error_names_what_is_wrong(
    function: str, error: type[Exception], words: tuple[str, ...], arguments: dict[str, Any]
) -> None:
    with pytest.raises(error) as caught:
        CALLS[function](**{"query": Q, "key": KV, "value": KV, **arguments})
    text = str(caught.value)
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in {text!r}"
    assert "\n" not in text


@pytest.mark.parametrize("function", CALLS)
def test_every_function_checks_its_arguments(function: str) -> None:
    call = CALLS[function]
    with pytest.raises(
        ValueError, match=r"query heads \(3\) must be a multiple of key heads \(2\)"
    ):
        call(Q[:, :, :3], KV, KV)
    with pytest.raises(TypeError, match="unexpected keyword argument 'is_casual'"):
        call(Q, KV, KV, is_casual=True)
    with pytest.raises(TypeError, match="positional"):
        call(Q, KV, KV, None, None, 0.5)
    with pytest.raises(TypeError, match="value"):
        call(Q, KV)


@pytest.mark.parametrize(
    ("name", "value"),
    [("logits_soft_cap", 3.0), ("dropout_rate", 0.1), ("is_causal", True)],
)
def test_a_traced_number_is_refused_by_name(name: str, value: Any) -> None:
    def call(x: Any) -> Any:
        return jattn.dot_product_attention(Q, KV, KV, dropout_rng=KEY, **{name: x})

    with pytest.raises(TypeError, match=name):
        jax.jit(call)(value)
    assert jax.jit(call, static_argnums=0)(value).shape == Q.shape


@pytest.mark.parametrize("name", ["query_chunk_size", "key_chunk_size"])
@pytest.mark.parametrize("size", [0, -4, 2.0, True, "8"])
def test_chunk_sizes_must_be_positive_integers(name: str, size: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=name) as caught:
        jattn.memory_efficient_attention(Q, KV, KV, **{name: size})
    assert str(size) in str(caught.value)


def test_chunk_sizes_belong_to_memory_efficient_alone() -> None:
    for call in (jattn.dot_product_attention, jattn.eager_attention, jattn.flash_attention):
        with pytest.raises(TypeError, match="query_chunk_size"):
            call(Q, KV, KV, query_chunk_size=8)


@pytest.mark.parametrize("size", [1, np.int64(3), 2**70])
def test_any_positive_chunk_size_works(size: Any) -> None:
    q, k = (
        jnp.asarray(np.random.default_rng(0).standard_normal(x.shape), x.dtype) for x in (Q, KV)
    )
    found = jattn.memory_efficient_attention(
        q, k, k, is_causal=True, query_chunk_size=size, key_chunk_size=size
    )
    formula.check({"out": found}, lambda of, q, k: {"out": of(q, k, k, is_causal=True)}, q, k)
