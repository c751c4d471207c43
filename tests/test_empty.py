"""No batch row, no query or no key: an empty result, or what a query gives that sees nothing."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.backends.flash import interpreted

EMPTY = {"batch": (0, 4, 5), "queries": (2, 0, 5), "keys": (2, 4, 0), "both": (2, 0, 0)}
FUNCTIONS = [
    jattn.dot_product_attention,
    jattn.eager_attention,
    jattn.memory_efficient_attention,
    jattn.flash_attention,
]


@pytest.mark.parametrize("sizes", EMPTY.values(), ids=EMPTY)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_nothing_in_gives_nothing_and_no_keys_give_zeros(function: Any, sizes: Any) -> None:
    b, t, s = sizes
    arrays = {
        "query": jnp.ones((b, t, 4, 8)),
        "key": jnp.ones((b, s, 2, 8)),
        "value": jnp.ones((b, s, 2, 6)),
        "bias": jnp.ones((1, 4, t, s)),
        "sinks": jnp.ones(4),
    }
    options = {"is_causal": True, "key_value_seq_lengths": jnp.zeros(b, jnp.int32)}

    def loss(arrays: Any) -> Any:
        out, lse = function(**arrays, **options, return_residual=True)
        return out.sum(), (out, lse)

    with interpreted("portable"):
        for run in (loss, jax.jit(loss)):
            gradient, (out, lse) = jax.grad(run, has_aux=True)(arrays)
            assert out.shape == (b, t, 4, 6)
            np.testing.assert_array_equal(out, np.zeros((b, t, 4, 6)))
            np.testing.assert_array_equal(lse, np.full((b, t, 4), -np.inf))
            for name, x in arrays.items():
                np.testing.assert_array_equal(gradient[name], np.zeros(x.shape), err_msg=name)


FAMILIES: dict[str, Any] = {
    "eager": (jattn.eager_attention, nullcontext),
    "memory_efficient": (jattn.memory_efficient_attention, nullcontext),
    "portable": (jattn.flash_attention, partial(interpreted, "portable")),
    "hopper": (jattn.flash_attention, partial(interpreted, "hopper")),
}
# What hides, moves or drops: an array of each, with its axis to map, and what stands beside it.
MAPPED: dict[str, tuple[Any, dict[str, Any]]] = {
    "lengths": ({"key_value_seq_lengths": jnp.ones((0, 2), jnp.int32)}, {"is_causal": True}),
    "segments": (
        {
            "query_segment_ids": jnp.zeros((0, 2, 5), jnp.int32),
            "key_value_segment_ids": jnp.zeros((0, 2, 5), jnp.int32),
        },
        {},
    ),
    "offset": ({"query_offset": jnp.zeros((0, 2), jnp.int32)}, {"local_window_size": 2}),
    "sinks": ({"sinks": jnp.ones((0, 4))}, {}),
    "scale": ({"scale": jnp.ones(0)}, {}),
    "bias_and_mask": (
        {"bias": jnp.ones((0, 1, 4, 5, 5)), "mask": jnp.ones((0, 2, 1, 5, 5), bool)},
        {},
    ),
    "dropout": ({"dropout_rng": jax.random.split(jax.random.key(0), 0)}, {"dropout_rate": 0.5}),
}
NOT_ON_HOPPER = ("bias_and_mask", "dropout")


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (family, kind)
        for family in FAMILIES
        for kind in MAPPED
        if family != "hopper" or kind not in NOT_ON_HOPPER
    ],
)
def test_a_mapped_axis_of_size_0_gives_none_of_each(family: str, kind: str) -> None:
    function, context = FAMILIES[family]
    mapped, options = MAPPED[kind]
    dtype = jnp.bfloat16 if family == "hopper" else jnp.float32
    query, key = jnp.ones((0, 2, 5, 4, 64), dtype), jnp.ones((2, 5, 2, 64), dtype)
    arrays = {"query": query, "key": key, "value": key, **mapped}
    axes = {name: None if name in ("key", "value") else 0 for name in arrays}
    floats = {n: x for n, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.floating)}
    rest = {n: x for n, x in arrays.items() if n not in floats}

    def each(floats: Any, rest: Any) -> Any:
        def loss(floats: Any) -> Any:
            out, lse = function(**floats, **rest, **options, return_residual=True)
            return out.astype(jnp.float32).sum() + lse.sum(), (out, lse)

        return jax.grad(loss, has_aux=True)(floats)

    own = ({n: axes[n] for n in floats}, {n: axes[n] for n in rest})
    with context():
        gradients, (out, lse) = jax.vmap(each, own)(floats, rest)
        total = jax.grad(lambda x: jax.vmap(each, own)(x, rest)[1][1].sum())(floats)
    assert (out.shape, out.dtype) == (query.shape, dtype)
    assert (lse.shape, lse.dtype) == ((0, 2, 5, 4), jnp.float32)
    for name, x in floats.items():
        shape = (0, *x.shape) if axes[name] is None else x.shape
        assert (gradients[name].shape, gradients[name].dtype) == (shape, x.dtype), name
        np.testing.assert_array_equal(total[name], np.zeros(x.shape), err_msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", [None, "flash", "cudnn", "memory_efficient"])
def test_a_mapped_axis_of_size_0_on_a_gpu(implementation: str | None) -> None:
    x = jnp.ones((0, 2, 64, 2, 64), jnp.bfloat16)
    key = jnp.ones((2, 64, 2, 64), jnp.bfloat16)

    def loss(x: Any, key: Any) -> Any:
        return jattn.dot_product_attention(x, key, key, implementation=implementation).sum()

    for way in (lambda f: f, jax.jit):
        d_x, d_key = way(jax.vmap(jax.grad(loss, (0, 1)), (0, None)))(x, key)
        assert (d_x.shape, d_x.dtype) == (x.shape, x.dtype)
        assert (d_key.shape, d_key.dtype) == ((0, *key.shape), key.dtype)


@pytest.mark.parametrize("sizes", [(2, 0), (0, 2)], ids=str)
def test_gradients_in_nested_maps_of_size_0_are_empty(sizes: tuple[int, int]) -> None:
    x = jnp.ones((*sizes, 1, 5, 2, 8))
    bias = jnp.ones((1, 2, 5, 5))

    def loss(x: Any, bias: Any) -> Any:
        return jattn.memory_efficient_attention(x, x, x, bias).sum()

    d_x, d_bias = jax.vmap(jax.vmap(jax.grad(loss, (0, 1)), (0, None)), (0, None))(x, bias)
    assert d_x.shape == x.shape
    assert d_bias.shape == (*sizes, *bias.shape)


def test_no_keys_give_zeros_without_a_batch_axis_and_in_chunks() -> None:
    query, key = jnp.ones((3, 2, 8), jnp.bfloat16), jnp.ones((0, 2, 8), jnp.bfloat16)
    out = jattn.memory_efficient_attention(query, key, key, query_chunk_size=2)
    assert out.shape == query.shape
    assert out.dtype == jnp.bfloat16
    assert not out.any()


def test_a_backend_that_cannot_run_refuses_empty_arrays_too() -> None:
    x = jnp.ones((0, 4, 2, 8))
    with pytest.raises(jattn.UnsupportedAttentionError, match="float32"):
        jattn.dot_product_attention(x, x, x, implementation="cudnn")


@pytest.mark.parametrize(
    ("device", "chosen"), [("cpu", "memory_efficient"), ("A100", "flash"), ("H100", "flash")]
)
def test_explain_takes_empty_arrays(device: str, chosen: str) -> None:
    for b, t, s in EMPTY.values():
        shapes = ((b, t, 4, 64), (b, s, 2, 64), (b, s, 2, 64), (b, 4, t, s))
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
        found = jattn.explain(*arrays, is_causal=True, device=device)
        assert found.chosen == chosen
        assert [x.gradient_bytes for x in found.reports if x.name == chosen] == [0]


def test_no_heads_and_no_head_dim_are_refused() -> None:
    x = jnp.ones((1, 4, 0, 8))
    with pytest.raises(ValueError, match=r"query must have heads and a head dim above 0"):
        jattn.dot_product_attention(x, x, x)
