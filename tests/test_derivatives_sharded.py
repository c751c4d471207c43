"""Tangents and second derivatives on sharded arrays: each device makes those of what it holds."""

from __future__ import annotations

import pytest

from tests.cases import thorough
from tests.four_devices import run

PRELUDE = """
import re
from functools import partial
import jax, jax.numpy as jnp, numpy as np
import jattn
from tests import formula
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

B, T, N, H = 4, 40, 4, 8
keys = jax.random.split(jax.random.key(0), 10)
x = tuple(jax.random.normal(key, (B, T, N, H)) for key in keys[:3])
x += (jax.random.normal(keys[3], (1, N, T, T)), jax.random.normal(keys[4], (N,)))
t = tuple(jax.random.normal(key, y.shape) for key, y in zip(keys[5:], x))
SHARDED = (P("x", None, "y"),) * 3 + (P(None, "y"), P("y"))
chunked = partial(jattn.memory_efficient_attention, query_chunk_size=16, key_chunk_size=16)
GATHERS = re.compile("all-gather|all-to-all|collective-permute")

def attend(attention, q, k, v, bias, sinks):
    return attention(q, k, v, bias, sinks=sinks, is_causal=True, logits_soft_cap=3.0)

def loss(attention, *x):
    return (attend(attention, *x) ** 2).sum()

def forward_reverse(attention, x, t):
    return jax.jvp(jax.grad(partial(loss, attention), (0, 1, 2, 3, 4)), x, t)[1]

def reverse_forward(attention, x, t):
    along = lambda x, t: (jax.jvp(partial(attend, attention), x, t)[1] ** 2).sum()
    return jax.grad(along, (0, 1))(x, t)

def forward_forward(attention, x, t):
    inner = lambda *x: jax.jvp(partial(attend, attention), x, t)[1]
    return jax.jvp(inner, x, t)[1]

def third(attention, x, t):
    squared = lambda *x: (forward_reverse(attention, x, t)[0] ** 2).sum()
    return jax.grad(squared)(*x)

def compare(found, way):
    formula.check(found, way, x, t)
"""

PROGRAMS = {
    "auto": """
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
places = [NamedSharding(mesh, place) for place in SHARDED]
held = [tuple(map(jax.device_put, of, places)) for of in (x, t)]
for way in (forward_reverse, reverse_forward):
    compiled = jax.jit(partial(way, chunked)).lower(*held).compile()
    assert not GATHERS.findall(compiled.as_text()), way
    compare(compiled(*held), way)
for way in WAYS:
    compare(jax.jit(partial(way, chunked))(*held), way)
""",
    "explicit": """
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
places = [NamedSharding(mesh, place) for place in SHARDED]
found = []
with jax.set_mesh(mesh):
    held = [tuple(map(jax.device_put, of, places)) for of in (x, t)]
    for way in (forward_reverse, *WAYS):
        found.append((jax.tree.map(np.asarray, jax.jit(partial(way, chunked))(*held)), way))
for each in found:
    compare(*each)
""",
    "shard_map": """
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)

def mapped(q, k, v, bias, sinks, **options):
    on_each = lambda q, k, v, bias, sinks: chunked(q, k, v, bias, sinks=sinks, **options)
    placed = jax.shard_map(on_each, mesh=mesh, in_specs=SHARDED, out_specs=SHARDED[0])
    return placed(q, k, v, bias, sinks)

for way in (forward_reverse, *WAYS):
    compare(jax.jit(partial(way, mapped))(x, t), way)
""",
    "sequence": """
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
CUT = (P("x", "y"),) * 3 + (P(None, None, "y"), P())
places = [NamedSharding(mesh, place) for place in CUT]
held = [tuple(map(jax.device_put, of, places)) for of in (x, t)]
for way in (forward_reverse, *WAYS):
    compare(jax.jit(partial(way, chunked))(*held), way)
""",
    "context": """
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
CUT = (P("x", "y"),) * 3 + (P(None, None, "y"), P())

def mapped(q, k, v, bias, sinks, **options):
    def on_each(q, k, v, bias, sinks):
        with jattn.context_parallel("y"):
            return chunked(q, k, v, bias, sinks=sinks, **options)
    placed = jax.shard_map(on_each, mesh=mesh, in_specs=CUT, out_specs=CUT[0])
    return placed(q, k, v, bias, sinks)

for way in (forward_reverse, *WAYS):
    compare(jax.jit(partial(way, mapped))(x, t), way)
""",
}


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("auto", "()"),
        *thorough(*((name, "(reverse_forward, forward_forward, third)") for name in PROGRAMS)),
    ],
)
def test_on_four_devices_they_are_as_exact(name: str, ways: str) -> None:
    run(f"{PRELUDE}\nWAYS = {ways}\n{PROGRAMS[name]}")
