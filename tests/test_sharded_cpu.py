"""memory_efficient in XLA on sharded arrays: each device its own rows and heads, and no more."""

from __future__ import annotations

import pytest

from tests.cases import first
from tests.four_devices import run

PRELUDE = """
import re
from functools import partial
import jax, jax.numpy as jnp, numpy as np
import jattn
from tests import formula
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

B, T, N, H = 8, 320, 8, 16  # two chunks of queries, and on one device two of rows
keys = jax.random.split(jax.random.key(0), 6)
q, k, v, weights = (jax.random.normal(key, (B, T, N, H)) for key in keys[:4])
bias, sinks = jax.random.normal(keys[4], (1, N, T, T)), jax.random.normal(keys[5], (N,))
lengths = jnp.arange(T, T - B, -1)
attend = partial(jattn.memory_efficient_attention, is_causal=True)
COLLECTIVE = re.compile(
    r"= (\\S+) (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)(?:-start)?\\("
)
PLACES = {
    "rows": (4, 1, (P("x"),) * 3 + (P(), P(), P("x"))),
    "both": (2, 2, (P("x", None, "y"),) * 3 + (P(), P(), P("x"))),
}

def loss_of(attention, q, k, v, bias, sinks, lengths):
    out = attention(
        q, k, v, bias, sinks=sinks, key_value_seq_lengths=lengths, is_causal=True
    )
    return (out * weights.astype(out.dtype)).sum()

loss = partial(loss_of, jattn.memory_efficient_attention)

def collectives(compiled):
    return COLLECTIVE.findall(compiled.as_text())

arrays = (q, k, v, bias, sinks, lengths)
ALL, HELD = (0, 1, 2, 3, 4), (0, 1, 2)

expected = formula.expected(
    lambda of, *arrays: jax.grad(partial(loss_of, of), ALL)(*arrays), *arrays
)
"""

PROGRAMS = {
    "auto": """
for name, (rows, heads, specs) in PLACES.items():
    mesh = jax.make_mesh((rows, heads), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    places = tuple(NamedSharding(mesh, spec) for spec in specs)
    held = tuple(jax.device_put(x, place) for x, place in zip(arrays, places))
    if name == "both":
        forward = jax.jit(attend).lower(*held[:4]).compile()
        assert collectives(forward) == [], collectives(forward)
        part = jax.jit(jax.grad(loss, HELD)).lower(*held).compile()
        assert collectives(part) == [], collectives(part)
    whole = jax.jit(jax.grad(loss, ALL)).lower(*held).compile()
    found = collectives(whole)
    assert {kind for _, kind in found} <= {"all-reduce"}, (name, found)
    # Over the rows alone are a bias and sinks summed, each once.
    over = [shape for shape, _ in found]
    assert len(over) <= (2 if rows > 1 else 0), (name, found)
    results = whole(*held)
    formula.compare(results, expected)
    for x, place in zip(results[:3], places):
        assert x.sharding.is_equivalent_to(place, x.ndim), (name, x.sharding)
""",
    "explicit": """
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
with jax.set_mesh(mesh):
    places = [NamedSharding(mesh, spec) for spec in PLACES["both"][2]]
    places[3:5] = NamedSharding(mesh, P(None, "y")), NamedSharding(mesh, P("y"))
    held = tuple(jax.device_put(x, place) for x, place in zip(arrays, places))
    whole = jax.jit(jax.grad(loss, ALL)).lower(*held).compile()
    assert {kind for _, kind in collectives(whole)} <= {"all-reduce"}, collectives(whole)
    results = whole(*held)
formula.compare(results, expected)
""",
    "mapped": """
# Triangle attention: vmap over rows that are sharded, one bias for all, and one for every two.
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
shared, pairs = bias, jax.random.normal(keys[4], (4, 1, N, T, T))
rows, everywhere = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())

def mapped(attention, q, k, v, shared, pairs):
    one = lambda q, k, v: attention(q[None], k[None], v[None], shared)[0]
    two = jax.vmap(lambda q, b: attention(q[None], q[None], q[None], b)[0], (0, None))
    split = lambda x: x.reshape(4, 2, *x.shape[1:])
    out = jax.vmap(one)(q, k, v) + jax.vmap(two)(split(q), pairs).reshape(q.shape)
    return (out * weights.astype(out.dtype)).sum()

operands = q, k, v, shared, pairs
places = (rows, rows, rows, everywhere, rows)
held = tuple(jax.device_put(x, place) for x, place in zip(operands, places))
function = jax.jit(jax.grad(partial(mapped, jattn.memory_efficient_attention), ALL))
compiled = function.lower(*held).compile()
found = collectives(compiled)
assert len(found) == 1 and found[0][1] == "all-reduce", found  # the bias of all
formula.check(
    compiled(*held), lambda of, *arrays: jax.grad(partial(mapped, of), ALL)(*arrays), *operands
)
""",
}


@pytest.mark.parametrize("name", first(1, PROGRAMS))
def test_each_device_computes_its_own_part(name: str) -> None:
    run(PRELUDE + PROGRAMS[name])
