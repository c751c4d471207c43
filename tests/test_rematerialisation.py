"""Policies of `jax.checkpoint` can keep attention's result, so that its forward runs once."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractDevice, AbstractMesh

import jattn
from models import TransformerConfig, TransformerLM
from models.transformer import Rematerialize
from tests import formula
from tests.backends import quick_jit
from tests.cases import thorough

KEEP = jax.checkpoint_policies.save_only_these_names(*jattn.CHECKPOINT_NAMES)

# The function, and the device for which it is traced.
ATTENTION = {
    "XLA": (jattn.memory_efficient_attention, None),
    "portable flash": (jattn.flash_attention, "NVIDIA A100"),
    "portable chunked": (jattn.memory_efficient_attention, "NVIDIA A100"),
    "hopper": (jattn.flash_attention, "NVIDIA H200"),
}


def traced_for(kind: str | None) -> AbstractContextManager[object]:
    if kind is None:
        return nullcontext()
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def calls(function: Callable[..., Any], *args: Any) -> int:
    """How many times a function runs attention, forward or backward."""
    found = equations(jax.make_jaxpr(function)(*args).jaxpr)
    return sum(equation.primitive.name == "custom_partitioning" for equation in found)


def layer(attention: Callable[..., Any], weight: jax.Array, x: jax.Array) -> jax.Array:
    q, k, v = (jnp.einsum("btnh,hd->btnd", x, w) for w in weight)
    sinks = jnp.linspace(-1, 1, x.shape[2], dtype=x.dtype)
    out, lse = attention(q, k, v, is_causal=True, sinks=sinks, return_residual=True)
    return jnp.sin(out) + 0.1 * lse[..., None].astype(out.dtype)


def inputs(dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(1))
    return (
        jax.random.normal(keys[0], (3, 16, 16), dtype) / 4,
        jax.random.normal(keys[1], (2, 24, 2, 16), dtype),
    )


@pytest.mark.parametrize("name", ATTENTION)
def test_forward_runs_once_where_a_policy_keeps_the_names_and_twice_where_none_does(
    name: str,
) -> None:
    attention, kind = ATTENTION[name]
    weight, x = inputs(jnp.bfloat16)
    plain = partial(layer, attention)

    def both_ways(function: Callable[..., Any], x: jax.Array) -> int:
        return calls(
            jax.grad(lambda w, x: function(w, x).astype(jnp.float32).sum(), (0, 1)), weight, x
        )

    with traced_for(kind):
        assert both_ways(plain, x) == 2
        assert both_ways(jax.checkpoint(plain), x) == 3
        assert both_ways(jax.checkpoint(plain, policy=KEEP), x) == 2
        assert both_ways(jax.checkpoint(jax.jit(plain), policy=KEEP), x) == 2
        rows = jax.vmap(plain, in_axes=(None, 0))
        assert both_ways(jax.checkpoint(rows, policy=KEEP), x[:, None]) == 2


@pytest.mark.parametrize("policy", [KEEP, *thorough((None,))])
def test_gradients_are_those_without_rematerialisation(policy: Any) -> None:
    weight, x = inputs()

    def gradients(function: Callable[..., Any], *arrays: jax.Array) -> Any:
        return jax.grad(lambda w, x: function(w, x).sum(), (0, 1))(*arrays)

    plain = partial(layer, jattn.memory_efficient_attention)
    kept = jax.checkpoint(plain, policy=policy)
    found = quick_jit(partial(gradients, kept))(weight, x)
    formula.check(found, lambda of, *arrays: gradients(partial(layer, of), *arrays), weight, x)


def test_nothing_else_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside its arguments: the output, and the log-sum-exp of each row."""
    weight, x = inputs()
    plain = partial(layer, jattn.memory_efficient_attention)
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(plain, policy=KEEP), weight, x)
    kept = [line for line in capsys.readouterr().out.splitlines() if "argument" not in line]
    assert sorted(line.split()[0] for line in kept) == [
        "f32[2,24,2,16]",
        *["f32[2,24,2]"] * 2,
    ], kept


@pytest.mark.parametrize("rematerialize", get_args(Rematerialize))
def test_the_models_blocks_keep_attention_unless_asked_not_to(rematerialize: Any) -> None:
    config = dataclasses.replace(
        TransformerConfig.cpu(),
        attn_implementation="memory_efficient",
        rematerialize=rematerialize,
    )
    graph, weights = nnx.split(TransformerLM(config, rngs=nnx.Rngs(0)))

    def loss(weights: Any) -> jax.Array:
        out: jax.Array = nnx.merge(graph, weights)(jnp.zeros((1, 16), jnp.int32)).sum()
        return out

    # In the loops' bodies, of which there is one each way whatever the number of layers.
    assert calls(jax.grad(loss), weights) == (3 if rematerialize == "everything" else 2)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["flash", "cudnn", "memory_efficient"])
def test_forward_runs_once_on_a_gpu(name: str) -> None:
    weight, x = inputs(jnp.bfloat16)

    def attend(weight: jax.Array, x: jax.Array) -> jax.Array:
        q, k, v = (jnp.einsum("btnh,hd->btnd", x, w) for w in weight)
        out = jattn.dot_product_attention(q, k, v, is_causal=True, implementation=name)
        return jnp.sin(out).astype(jnp.float32)

    def kernels(function: Callable[..., Any]) -> int:
        # With the value: else nothing asks for the output of the first run.
        gradient = jax.value_and_grad(lambda w, x: function(w, x).sum())
        text: str = jax.jit(gradient).lower(weight, x).compile().as_text()
        return len(re.findall(r'custom_call_target="(?!__cublas)', text))

    once = kernels(attend)
    assert kernels(jax.checkpoint(attend, policy=KEEP)) == once
    assert kernels(jax.checkpoint(attend)) > once
