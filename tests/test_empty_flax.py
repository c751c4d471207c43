"""Flax's layers on batches of nothing: no output, and gradients of zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from jattn.flax import attention_fn

CALLS: list[tuple[dict[str, Any], tuple[int, ...], tuple[int, int]]] = [
    ({"is_causal": True}, (0,), (5, 5)),
    ({"implementation": "eager"}, (2, 0), (5, 3)),
    ({"local_window_size": 2}, (0, 3), (0, 5)),
    ({"sinks": jnp.ones(2)}, (2,), (0, 5)),
]
HEADS, FEATURES, RATE = 2, 8, 0.5


def of_nnx(function: Any, batch: tuple[int, ...]) -> tuple[Any, Callable[..., Any]]:
    model = nnx.MultiHeadAttention(
        HEADS, FEATURES, decode=False, rngs=nnx.Rngs(0), attention_fn=function, dropout_rate=RATE
    )
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def apply(parameters: Any, x: Any, y: Any, mask: Any) -> Any:
        return nnx.merge(graph, parameters, rest)(
            x, y, mask=mask, deterministic=False, rngs=nnx.Rngs(dropout=1)
        )

    return parameters, apply


def of_linen(function: Any, batch: tuple[int, ...]) -> tuple[Any, Callable[..., Any]]:
    model = linen.MultiHeadDotProductAttention(HEADS, attention_fn=function, dropout_rate=RATE)
    parameters = model.init(jax.random.key(0), jnp.ones((*batch, 2, FEATURES)), deterministic=True)

    def apply(parameters: Any, x: Any, y: Any, mask: Any) -> Any:
        rngs = {"dropout": jax.random.key(1)}
        return model.apply(parameters, x, y, y, mask=mask, deterministic=False, rngs=rngs)

    return parameters, apply


@pytest.mark.parametrize("flavour", [of_nnx, of_linen])
@pytest.mark.parametrize(("options", "batch", "sizes"), CALLS, ids=str)
def test_layers_of_empty_batches(
    flavour: Any, options: dict[str, Any], batch: tuple[int, ...], sizes: tuple[int, int]
) -> None:
    t, s = sizes
    x, y = jnp.ones((*batch, t, FEATURES)), jnp.ones((*batch, s, FEATURES))
    mask = jnp.ones((*batch, 1, t, s), bool)
    parameters, apply = flavour(attention_fn(**options), batch)

    def loss(parameters: Any) -> Any:
        out = apply(parameters, x, y, mask)
        return out.sum(), out

    gradients, out = jax.jit(jax.grad(loss, has_aux=True))(parameters)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    for gradient in jax.tree.leaves(gradients):
        np.testing.assert_array_equal(gradient, np.zeros(gradient.shape))


def test_decoding_an_empty_batch() -> None:
    function = attention_fn(is_causal=True)
    step = jnp.ones((0, 1, FEATURES))
    layer = nnx.MultiHeadAttention(
        HEADS, FEATURES, decode=True, rngs=nnx.Rngs(0), attention_fn=function
    )
    layer.init_cache((0, 5, FEATURES))
    assert layer(step).shape == step.shape
    model = linen.MultiHeadDotProductAttention(HEADS, attention_fn=function, decode=True)
    variables = model.init(jax.random.key(0), jnp.ones((0, 5, FEATURES)))
    assert model.apply(variables, step, mutable=["cache"])[0].shape == step.shape


@pytest.mark.parametrize("sizes", [(0, 2), (3, 0)], ids=str)
def test_the_function_under_vmap(sizes: tuple[int, int]) -> None:
    q = jnp.ones((*sizes, 5, HEADS, FEATURES))
    function = attention_fn(local_window_size=1)
    assert jax.vmap(lambda q: function(q, q, q))(q).shape == q.shape
