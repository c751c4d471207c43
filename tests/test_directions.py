"""Tangents along several directions at once: as exact as along each, and the weights made once."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests import formula
from tests.cases import thorough

B, T, S, N, K, H, D = 2, 20, 27, 4, 2, 8, 4
CHUNKED = partial(jattn.memory_efficient_attention, query_chunk_size=8, key_chunk_size=8)
SHAPES = {
    "q": (B, T, N, H), "k": (B, S, K, H), "v": (B, S, K, D), "bias": (B, N, 1, S), "sinks": (N,),
}  # fmt: skip


def drawn(directions: int) -> tuple[dict[str, Any], dict[str, Any]]:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    x = {name: draw(*shape) for name, shape in SHAPES.items()}
    return x, {name: draw(directions, *shape) for name, shape in SHAPES.items()}


def attend(attention: Any, x: dict[str, Any]) -> Any:
    out, lse = attention(
        x["q"], x["k"], x["v"], x["bias"], sinks=x["sinks"], is_causal=True, logits_soft_cap=3.0,
        key_value_seq_lengths=jnp.array([27, 13], jnp.int32), return_residual=True,
        causal_alignment="bottom_right", dropout_rate=0.2, dropout_rng=jax.random.key(3),
    )  # fmt: skip
    return out, jnp.where(jnp.isfinite(lse), lse, 0)


def scaled(attention: Any, x: dict[str, Any]) -> Any:
    return attention(x["q"], x["k"], x["v"], scale=x["sinks"][0])


def pulled_by_scale(attention: Any, x: dict[str, Any], t: dict[str, Any]) -> Any:
    def weighted(x: dict[str, Any], t: dict[str, Any]) -> Any:
        along = jax.vmap(lambda t: jax.jvp(partial(scaled, attention), (x,), (t,))[1])(t)
        return (along**2).sum()

    return jax.grad(weighted, (0, 1))(x, t)


def loss(attention: Any, x: dict[str, Any]) -> Any:
    out, lse = attend(attention, x)
    return (out**2).sum() + (lse**2).sum()


def pushed(attention: Any, x: dict[str, Any], t: dict[str, Any]) -> Any:
    return jax.vmap(lambda t: jax.jvp(partial(attend, attention), (x,), (t,))[1])(t)


def products(attention: Any, x: dict[str, Any], t: dict[str, Any]) -> Any:
    return jax.vmap(lambda t: jax.jvp(jax.grad(partial(loss, attention)), (x,), (t,))[1])(t)


def pulled(attention: Any, x: dict[str, Any], t: dict[str, Any]) -> Any:
    """The gradient, by the directions too, of what is pushed along them."""

    def weighted(x: dict[str, Any], t: dict[str, Any]) -> Any:
        return sum((y**2).sum() for y in jax.tree.leaves(pushed(attention, x, t)))

    return jax.grad(weighted, (0, 1))(x, t)


def along_queries(attention: Any, x: dict[str, Any], t: dict[str, Any]) -> Any:
    """One tangent of the bias and of sinks for all directions."""
    others = {name: y[0] for name, y in t.items() if name != "q"}

    def along(tq: Any) -> Any:
        gradient = jax.grad(partial(loss, attention))
        return jax.jvp(gradient, (x,), (others | {"q": tq},))[1]

    return jax.vmap(along)(t["q"])


def nested(attention: Any, x: dict[str, Any], t: dict[str, Any]) -> Any:
    """Directions of directions, and of a batch of calls."""
    halves = jax.tree.map(lambda y: y.reshape(2, -1, *y.shape[1:]), t)
    several = jax.tree.map(lambda y: jnp.stack([y, y * 0.5]), x)
    return (
        jax.vmap(lambda t: pushed(attention, x, t))(halves),
        jax.vmap(lambda x: pushed(attention, x, t))(several),
    )


@pytest.mark.parametrize(
    ("way", "directions"),
    [
        (pushed, 6),
        # The gradients' tangents along two: tests/test_every_derivative.py, always.
        *thorough(
            (pulled, 2),
            (products, 4),
            (pulled_by_scale, 3),
            (along_queries, 2),
            (nested, 4),
            (pushed, 11),
            (products, 9),
        ),
    ],
)
def test_each_is_as_exact_as_alone(way: Any, directions: int) -> None:
    x, t = drawn(directions)
    formula.check(jax.jit(partial(way, CHUNKED))(x, t), way, x, t)


def plain(attention: Any, x: dict[str, Any]) -> Any:
    return attention(x["q"], x["k"], x["v"])


def most_weights(directions: int) -> int:
    """Of a block, in the program as it is lowered."""
    x, t = drawn(directions)

    def along(x: dict[str, Any], t: dict[str, Any]) -> Any:
        return jax.vmap(lambda t: jax.jvp(partial(plain, CHUNKED), (x,), (t,))[1])(t)

    text = jax.jit(along).lower(x, t).as_text()
    shapes = re.findall(r"stablehlo.exponential .* : tensor<([0-9x]+)xf32>", text)
    return max(math.prod(map(int, shape.split("x"))) for shape in shapes)


@pytest.mark.parametrize(("directions", "copies"), [(6, 1), (11, 11)])
def test_weights_are_made_once_where_some_directions_go_together(
    directions: int, copies: int
) -> None:
    assert most_weights(directions) == copies * B * N * 8 * 8
