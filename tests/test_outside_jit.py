"""Calls outside `jax.jit` are traced once: what is traced again costs more than small sequences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jattn
from jattn.backends import query_chunks

FUNCTIONS = [jattn.memory_efficient_attention, jattn.eager_attention]
X = jnp.ones((3, 2, 5, 2, 8))
BIAS = jnp.ones((2, 1, 5, 5))


def gradients(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def loss(x: Any, bias: Any) -> Any:
        lengths = jnp.array([3, 5], jnp.int32)
        return function(x, x, x, bias, is_causal=True, key_value_seq_lengths=lengths).sum()

    return jax.grad(loss, argnums=(0, 1))


WAYS: dict[str, Callable[[Any], Any]] = {
    "grad": lambda function: gradients(function)(X[0], BIAS),
    "vmap": lambda function: jax.vmap(lambda x: function(x, x, x, BIAS))(X),
    "vmap_of_grad": lambda function: jax.vmap(gradients(function), (0, None))(X, BIAS),
    "grad_of_vmap": lambda function: gradients(
        lambda *args, **options: jax.vmap(lambda x: function(x, x, x, args[3], **options))(args[0])
    )(X, BIAS),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_the_second_call_traces_and_compiles_nothing(
    function: Any, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = WAYS[way](function)

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr(query_chunks, "forward", again)
    monkeypatch.setattr(query_chunks, "backward", again)
    monkeypatch.setattr("jattn.backends.eager._softmax", again)
    monkeypatch.setattr("jattn.transforms.derivatives.bind", again)
    found = WAYS[way](function)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a == b).all()
