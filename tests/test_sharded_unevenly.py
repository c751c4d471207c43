"""Arrays cut over devices that do not divide them, or cut as no name of the mesh says.

XLA may cut heads by a part of a mesh axis, and pads what it cannot cut evenly: both happen where a
program says how its arrays lie, as JAX itself takes no array of such a kind.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from tests import formula
from tests.cases import thorough
from tests.four_devices import run
from tests.portable.exact import ampere

__all__ = ["ampere"]

PRELUDE = """
import re
from functools import partial
import jax, jax.numpy as jnp, numpy as np
import jattn
from tests import formula
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

chunked = partial(jattn.memory_efficient_attention, query_chunk_size=8, key_chunk_size=8)
GATHERS = re.compile("all-gather|all-to-all|collective-permute")

def drawn(batch, length, heads, kv_heads, bias_batch=1):
    keys = iter(jax.random.split(jax.random.key(0), 8))
    shapes = [(batch, length, n, 8) for n in (heads, kv_heads, kv_heads, heads)]
    shapes += [(bias_batch, heads, length, length), (heads,)]
    q, k, v, weights, bias, sinks = (jax.random.normal(next(keys), shape) for shape in shapes)
    lengths = length - jnp.arange(batch, dtype=jnp.int32)
    ids = jnp.arange(length, dtype=jnp.int32)[None] // 11 * jnp.ones((batch, 1), jnp.int32)
    return (q, k, v, bias, sinks), (weights, lengths, ids)

def attend(attention, place, with_ids, x, others):
    q, k, v, bias, sinks = x
    if attention is not jattn.eager_attention:
        lie = partial(jax.lax.with_sharding_constraint, shardings=place)
        q, k, v = map(lie, (q, k, v))
    _, lengths, ids = others
    options = dict(query_segment_ids=ids, key_value_segment_ids=ids) if with_ids else {}
    return attention(
        q, k, v, bias, sinks=sinks, key_value_seq_lengths=lengths, is_causal=True,
        scale=jnp.asarray(0.3, q.dtype), return_residual=True, **options,
    )

def loss(attention, place, with_ids, others, *x):
    out, lse = attend(attention, place, with_ids, x, others)
    seen = jnp.where(jnp.isfinite(lse), lse, 0)
    return (out * others[0].astype(out.dtype)).sum() + jnp.sin(seen).sum()

def forward(attention, place, with_ids, others, *x):
    out, lse = attend(attention, place, with_ids, x, others)
    return {"out": out, "lse": lse}

def gradients(*given):
    return jax.grad(partial(loss, *given[:4]), (0, 1, 2, 3, 4))(*given[4:])

def tangent(*given):
    x = given[4:]
    return jax.jvp(partial(loss, *given[:4]), x, tuple(map(jnp.cos, x)))[1]

def second(*given):
    x = given[4:]
    return jax.jvp(lambda *x: gradients(*given[:4], *x), x, tuple(map(jnp.cos, x)))[1]

def check(place, x, others, with_ids=False, ways=(forward, gradients)):
    for way in ways:
        found = jax.jit(partial(way, chunked, place, with_ids, others))(*x)
        formula.check(found, lambda of, *x: way(of, place, with_ids, others, *x), *x)
"""

PROGRAMS = {
    # Of four devices two have one key head: XLA cuts them by a half of the mesh axis.
    "fewer key heads than devices": """
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
check(NamedSharding(mesh, P(None, None, "x")), *drawn(2, 20, 4, 2), ways=WAYS)
""",
    "heads, batch and sequence": """
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
for sizes, place in (
    ((2, 20, 6, 3), P(None, None, "x")),
    ((2, 20, 6, 2), P(None, None, "x")),
    ((3, 20, 2, 2), P("x")),
    ((6, 20, 2, 1), P("x")),
    ((2, 18, 2, 2), P(None, "x")),
    ((1, 5, 2, 2), P(None, "x")),
    ((1, 20, 2, 2), P(None, None, None, "x")),
):
    check(NamedSharding(mesh, place), *drawn(*sizes), ways=WAYS)
""",
    "two mesh axes": """
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
for sizes, place in (
    ((2, 20, 4, 2), P(None, None, ("x", "y"))),
    ((2, 20, 8, 4), P(None, None, ("y", "x"))),
    ((2, 20, 6, 2), P(None, None, ("x", "y"))),
    ((6, 20, 4, 2, 6), P(("x", "y"))),
    ((2, 20, 6, 3), P("x", None, "y")),
    ((3, 18, 4, 2, 3), P("x", "y")),
    ((2, 18, 3, 3), P(None, ("x", "y"))),
):
    check(NamedSharding(mesh, place), *drawn(*sizes), with_ids=True, ways=WAYS)
""",
    # Query heads stay where they are, and a device takes the key heads that its own have.
    "more devices than key heads": """
def function(of, *x):
    def squares(*x):
        return (of(*x[:4], sinks=x[4], is_causal=True, logits_soft_cap=2.0) ** 2).sum()
    return jax.grad(squares, (0, 1, 2, 3, 4))(*x)

for kind, kv_heads in ((AxisType.Auto, 2), (AxisType.Explicit, 4)):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(kind,))
    x, _ = drawn(2, 20, 8, kv_heads)
    places = P(None, None, "x"), P(), P(), P(None, "x"), P("x")
    with jax.set_mesh(mesh):
        held = [jax.device_put(y, NamedSharding(mesh, place)) for y, place in zip(x, places)]
        compiled = jax.jit(partial(function, chunked)).lower(*held).compile()
        assert not GATHERS.findall(compiled.as_text()), kind
        found = jax.tree.map(np.asarray, compiled(*held))
    formula.check(found, function, *x)
""",
}


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("fewer key heads than devices", "(gradients,)"),
        ("more devices than key heads", "()"),
        *thorough(
            *((name, "(forward, gradients, tangent, second)") for name in list(PROGRAMS)[:3])
        ),
    ],
)
def test_the_values_are_those_of_one_device(name: str, ways: str) -> None:
    run(f"{PRELUDE}\nWAYS = {ways}\n{PROGRAMS[name]}", timeout=900)


@pytest.mark.gpu
@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("heads", [False, True], ids=["batch of 3", "whole keys"])
def test_uneven_shards_on_two_gpus_are_as_exact(heads: bool) -> None:
    """Three rows of a batch, or query heads over both and keys whole, by the GPU kernels."""
    if jax.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    rng = np.random.default_rng(0)
    shapes = ((3, 256, n, 64) for n in (8, 4, 4))
    q, k, v = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    lie = NamedSharding(mesh, P(None, None, "x") if heads else P("x"))
    keys = NamedSharding(mesh, P()) if heads else lie

    def gradients(attention: Any, q: Any, k: Any, v: Any) -> Any:
        def loss(q: Any, k: Any, v: Any) -> Any:
            if attention is not jattn.eager_attention:
                q, *kv = map(jax.lax.with_sharding_constraint, (q, k, v), (lie, keys, keys))
                return (attention(q, *kv, is_causal=True) ** 2).sum()
            return (attention(q, k, v, is_causal=True) ** 2).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    held = [jax.device_put(x, NamedSharding(mesh, P())) for x in (q, k, v)]
    compiled = jax.jit(partial(gradients, jattn.flash_attention)).lower(*held).compile()
    assert "mosaic_gpu" in compiled.as_text() or "triton" in compiled.as_text()
    one = jax.devices()[0]
    found = jax.tree.map(lambda x: jax.device_put(x, one), compiled(*held))
    formula.check(found, gradients, *(jax.device_put(x, one) for x in (q, k, v)))
