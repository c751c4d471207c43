"""The model's layers: one compiled block for all of them, and what backward keeps of each."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from models import TransformerConfig, TransformerLM
from models.transformer import Rematerialize, normalize
from tests.cases import thorough
from tests.promotion import of_others

TINY = TransformerConfig(
    hidden_size=32, num_layers=3, num_heads=4, num_key_value_heads=2, head_dim=8, mlp_size=48
)
TOKENS = jnp.asarray(np.random.default_rng(1).integers(256, size=(2, 24)), jnp.uint8)


@cache
def _weights() -> tuple[Any, Any]:
    graph, shapes = nnx.split(nnx.eval_shape(lambda: TransformerLM(TINY, rngs=nnx.Rngs(0))))
    draw = np.random.default_rng(0)
    return graph, jax.tree.map(lambda x: jnp.asarray(draw.normal(0, 0.2, x.shape), x.dtype), shapes)


def _loss(config: TransformerConfig, weights: Any) -> jax.Array:
    model = nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0)))
    logits: jax.Array = nnx.merge(nnx.graphdef(model), weights)(TOKENS)
    return jnp.square(logits).mean()


@cache
def _loss_and_gradients(config: TransformerConfig) -> Any:
    compute = jax.jit(jax.value_and_grad(lambda weights: _loss(config, weights)))
    return jax.tree.map(np.asarray, compute(_weights()[1]))


def _by_hand(weights: Any) -> jax.Array:
    """The loss of the formulas in the module's docstring, layer after layer."""
    pure, size = nnx.to_pure_dict(weights), TINY.head_dim
    batch, length = TOKENS.shape

    def norm(x: jax.Array) -> jax.Array:
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + TINY.norm_epsilon)

    def heads(x: jax.Array) -> jax.Array:
        return x.reshape(batch, length, -1, size)

    angles = jnp.arange(length)[:, None] * TINY.rope_theta ** -(jnp.arange(0, size, 2) / size)
    turn = jnp.exp(1j * angles)[:, None]

    def rotated(x: jax.Array) -> jax.Array:
        turned = (heads(x)[..., : size // 2] + 1j * heads(x)[..., size // 2 :]) * turn
        return jnp.concatenate([turned.real, turned.imag], -1)

    x = pure["embedding"][TOKENS]
    for layer in range(TINY.num_layers):
        block = jax.tree.map(lambda weight, layer=layer: weight[layer], pure["blocks"])
        w, h = block["attention"], norm(x)
        q, k, v = rotated(h @ w["query"]), rotated(h @ w["key"]), heads(h @ w["value"])
        k, v = (jnp.repeat(y, TINY.num_heads // TINY.num_key_value_heads, axis=2) for y in (k, v))
        logits = jnp.einsum("btnh,bsnh->bnts", q, k) * size**-0.5
        seen = jnp.where(jnp.tril(jnp.ones((length, length), bool)), logits, -jnp.inf)
        attended = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(seen), v)
        x = x + attended.reshape(batch, length, -1) @ w["out"]
        w, h = block["mlp"], norm(x)
        x = x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["out"]
    return jnp.square(norm(x) @ pure["head"].T).mean()


@pytest.fixture(scope="module")
def exact() -> Any:
    with jax.enable_x64(True), of_others():  # the formulas by hand promote
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), _weights()[1])
        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(_by_hand))(wide))


@pytest.mark.parametrize(
    ("rematerialize", "scan_blocks"),
    [
        *((name, True) for name in get_args(Rematerialize)),
        ("elementwise", False),
        *thorough(("block", False)),
    ],
)
def test_loss_and_gradients_are_those_of_the_formulas(
    rematerialize: Any, exact: Any, *, scan_blocks: bool
) -> None:
    config = dataclasses.replace(TINY, rematerialize=rematerialize, scan_blocks=scan_blocks)
    for got, want in zip(
        jax.tree.leaves(_loss_and_gradients(config)), jax.tree.leaves(exact), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max(), rtol=0)


def _equations(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def _primitives(config: TransformerConfig, layers: int) -> list[str]:
    config = dataclasses.replace(config, num_layers=layers)
    weights = nnx.state(nnx.eval_shape(lambda: TransformerLM(config, rngs=nnx.Rngs(0))))
    traced = jax.make_jaxpr(jax.grad(lambda weights: _loss(config, weights)))(weights)
    return [equation.primitive.name for equation in _equations(traced.jaxpr)]


def test_a_program_is_of_one_size_whatever_the_number_of_layers() -> None:
    assert _primitives(TINY, 3) == _primitives(TINY, 9)


def test_what_is_kept_is_not_computed_again() -> None:
    """Products of matrices in forward and backward of the loop's body."""
    products = {
        name: _primitives(dataclasses.replace(TINY, rematerialize=name), 3).count("dot_general")
        for name in get_args(Rematerialize)
    }
    assert products["elementwise"] == products["nothing"]
    # That of query, key and value, out, gate and up; the block's last its gradient needs not.
    assert products["block"] == products["nothing"] + 4
    assert products["everything"] > products["block"]


def test_what_a_layer_keeps_is_what_the_choice_names() -> None:
    def kept(rematerialize: Any) -> int:
        config = dataclasses.replace(TINY, rematerialize=rematerialize)
        residuals = jax.eval_shape(
            lambda weights: jax.vjp(lambda weights: _loss(config, weights), weights)[1],
            _weights()[1],
        )
        stacks = [
            leaf.size // TINY.num_layers
            for leaf in jax.tree.leaves(residuals)
            if leaf.shape[:3] == (TINY.num_layers, *TOKENS.shape)
        ]
        return sum(stacks) // TOKENS.size

    width, heads = TINY.hidden_size, TINY.num_heads * TINY.head_dim
    keys = TINY.num_key_value_heads * TINY.head_dim
    everything = width
    block = everything + heads + 2 * TINY.num_heads  # the log-sum-exp of a row is kept twice
    elementwise = 2 * width + 2 + 2 * heads + 2 * TINY.num_heads + 2 * keys + 2 * TINY.mlp_size
    found = {name: kept(name) for name in ("everything", "block", "elementwise")}
    assert found == {"everything": everything, "block": block, "elementwise": elementwise}


def test_a_normalized_rows_gradient_is_that_of_the_formula() -> None:
    x, towards = np.random.default_rng(2).normal(size=(2, 5, 16))
    rows = jnp.asarray(x, jnp.float32)
    out, backward = jax.vjp(lambda x: normalize(x, 1e-6), rows)
    size = np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(out, x / size, atol=1e-6)
    along = (x * towards).mean(-1, keepdims=True)
    exact = towards / size - x * along / size**3
    np.testing.assert_allclose(backward(jnp.asarray(towards, jnp.float32))[0], exact, atol=1e-5)
