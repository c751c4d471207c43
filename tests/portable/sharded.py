"""Calls of the portable kernels, interpreted, on four CPU devices: see `tests.four_devices`."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from jattn.backends.kernels import only
from tests import formula
from tests.backends import quick_jit

B, T, S, N, H = 4, 24, 20, 4, 8
FLOATING = ("query", "key", "value", "bias", "sinks")
GATHER = re.compile("all-gather|all-to-all|collective-permute")


def arrays_of(bias: str, mask: str, kv_heads: int) -> dict[str, Any]:
    """Operands, a bias and a mask with the axes named, as `jattn.flash_attention` takes them."""
    rng = np.random.default_rng(0)
    sizes = {"B": B, "N": N, "T": T, "S": S, "1": 1}

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return {
        "query": normal(B, T, N, H),
        "key": normal(B, S, kv_heads, H),
        "value": normal(B, S, kv_heads, H),
        "bias": normal(*(sizes[letter] for letter in bias)),
        "sinks": normal(N),
        "mask": jnp.asarray(rng.random([sizes[letter] for letter in mask]) < 0.8),
        "key_value_seq_lengths": jnp.array([S, 9, 0, 17], jnp.int32),
        "query_offset": jnp.array([0, -5, 7, 3], jnp.int32),
    }


def places(arrays: dict[str, Any], batch: Any, heads: Any) -> dict[str, P]:
    """Rows over the mesh axis `batch`, heads over `heads`, where an array has them."""
    kv_heads = heads if arrays["key"].shape[2] > 1 else None
    found = {"query": P(batch, None, heads), "sinks": P(heads)}
    found |= {"key_value_seq_lengths": P(batch), "query_offset": P(batch)}
    found |= {"key": P(batch, None, kv_heads), "value": P(batch, None, kv_heads)}
    for name in ("bias", "mask"):
        b, n = arrays[name].shape[:2]
        found[name] = P(batch if b > 1 else None, heads if n > 1 else None)
    return {name: found[name] for name in arrays}


def results(function: Any, *, rate: float = 0.25, shared: bool = False) -> Any:
    """Output, log-sum-exp and gradients, as a function of the arrays."""
    attend = partial(
        function, is_causal=True, dropout_rate=rate, dropout_rng=jax.random.key(3),
        broadcast_dropout=shared, return_residual=True,
    )  # fmt: skip

    def everything(arrays: dict[str, Any]) -> Any:
        floats = {name: arrays[name] for name in FLOATING}
        rest = {name: x for name, x in arrays.items() if name not in floats}

        def loss(floats: dict[str, Any]) -> Any:
            out, lse = attend(**floats, **rest)
            return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum(), (out, lse)

        return jax.grad(loss, has_aux=True)(floats)

    return everything


def flash(*args: Any, **options: Any) -> Any:
    with only("portable", interpret=True):
        return jattn.flash_attention(*args, **options)


def check(found: Any, arrays: dict[str, Any], *, shared: bool = False) -> None:
    formula.check(found, lambda of, arrays: results(of, shared=shared)(arrays), arrays)


def mesh_of(kind: AxisType) -> Any:
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(kind, kind))


JIT = [
    ("1NTS", "B1TS", 2, "x", "y", False),
    ("BNTS", "11TS", 4, "x", "y", False),
    ("11TS", "BN1S", 1, "x", "y", True),
    ("1N1S", "B1T1", 4, None, ("x", "y"), False),
]


def jit(number: int) -> None:
    """Rows and heads stay where they are; sums over them are all that devices exchange."""
    mesh = mesh_of(AxisType.Auto)
    bias, mask, kv_heads, batch, heads, shared = JIT[number]
    arrays = arrays_of(bias, mask, kv_heads)
    specs = places(arrays, batch, heads)
    held = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in arrays.items()}
    compiled = quick_jit(results(flash, shared=shared)).lower(held).compile()
    assert not GATHER.search(compiled.as_text()), (bias, mask, kv_heads)
    check(compiled(held), arrays, shared=shared)


def explicit() -> None:
    """A mesh whose axes are part of the arrays' types."""
    arrays = arrays_of("1NTS", "B1TS", 2)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        specs = places(arrays, "x", "y")
        held = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in arrays.items()}
        gradients, (out, lse) = quick_jit(results(flash))(held)
        assert jax.typeof(out).sharding.spec == P("x", None, "y", None)
    check((gradients, (out, lse)), arrays)


def shard_map() -> None:
    """Manual axes; a bias that all devices share gets its gradient from all."""
    arrays = arrays_of("1NTS", "B1TS", 2)
    mesh = mesh_of(AxisType.Auto)
    specs = places(arrays, "x", "y")

    def sharded(function: Any) -> Any:
        def attend(arrays: dict[str, Any]) -> Any:
            return function(**arrays, is_causal=True)

        # Checked types are beyond Pallas' interpreter; tests/portable/compile_sharded.py has them.
        return jax.shard_map(
            attend, mesh=mesh, in_specs=(specs,), out_specs=specs["query"], check_vma=False
        )

    def gradient(call: Any, arrays: dict[str, Any]) -> Any:
        floats = {name: arrays[name] for name in FLOATING}
        rest = {name: x for name, x in arrays.items() if name not in floats}
        return jax.grad(lambda floats: (call(floats | rest) ** 2).sum())(floats)

    def whole(attention: Any, arrays: dict[str, Any]) -> Any:
        return gradient(lambda arrays: attention(**arrays, is_causal=True), arrays)

    formula.check(quick_jit(partial(gradient, sharded(flash)))(arrays), whole, arrays)
