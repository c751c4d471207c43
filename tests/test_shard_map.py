"""Gradients through `jax.shard_map` of a call, of every operand that has one."""

from __future__ import annotations

import pytest

from tests.cases import first
from tests.four_devices import run

PRELUDE = """
from functools import partial
import jax, jax.numpy as jnp, numpy as np
import jattn
from tests import formula
from jattn.backends.kernels import only
from jax.sharding import AxisType, PartitionSpec as P

mesh = jax.make_mesh((2, 2), ("dp", "tp"), axis_types=(AxisType.Auto,) * 2)
B, T, N, H = 2, 12, 2, 8
keys = jax.random.split(jax.random.key(0), 6)
arrays = {
    "query": jax.random.normal(keys[0], (B, T, N, H)),
    "key": jax.random.normal(keys[1], (B, T, N, H)),
    "value": jax.random.normal(keys[2], (B, T, N, H)),
    "bias": jax.random.normal(keys[3], (1, N, T, T)),
    "sinks": jax.random.normal(keys[4], (N,)),
}
rows = P("dp", None, "tp")
specs = {"query": rows, "key": rows, "value": rows, "bias": P(None, "tp"), "sinks": P("tp")}
weights = jax.random.normal(keys[5], (B, T, N, H))

def attend(attention, arrays):
    out, lse = attention(**arrays, is_causal=True, return_residual=True)
    return out + 0.1 * lse[..., None]

def loss(attention, arrays):
    out = attend(attention, arrays)
    return (out * weights.astype(out.dtype)).sum()

def outside(attention, check, held):
    call = jax.shard_map(
        partial(attend, attention), mesh=mesh, in_specs=(held,), out_specs=rows, check_vma=check
    )
    return jax.grad(lambda arrays: (call(arrays) * weights).sum())

def inside(attention, check, held):
    # Of what a device holds; an array that is the same on several gets its gradient from all.
    def own(arrays, weights):
        found = jax.grad(lambda x: (attend(attention, x) * weights).sum())(arrays)
        if not check:
            over = {"bias": ("dp",), "sinks": ("dp",)}
            found = {n: jax.lax.psum(x, over[n]) if n in over else x for n, x in found.items()}
        return found
    call = jax.shard_map(
        own, mesh=mesh, in_specs=(held, rows), out_specs=held, check_vma=check
    )
    return lambda arrays: call(arrays, weights)

def gradients(attention, arrays):
    return jax.grad(partial(loss, attention))(arrays)

def check(attention, *, ways, jitted, checks=(True, False), names=tuple(arrays)):
    own = {name: arrays[name] for name in names}
    expected = formula.expected(gradients, own)
    held = {name: specs[name] for name in names}
    for way in ways:
        for vma in checks:
            function = way(attention, vma, held)
            for each in ([jax.jit(function)] if jitted else [function]):
                formula.compare(each(own), expected)

chunked = partial(jattn.memory_efficient_attention, query_chunk_size=8, key_chunk_size=8)
"""

PROGRAMS = {
    "jitted": """
def rematerialised(*, is_causal, return_residual, **arrays):
    call = partial(chunked, is_causal=is_causal, return_residual=return_residual)
    return jax.checkpoint(call)(**arrays)

check(jattn.eager_attention, ways=(outside,), jitted=True)
check(chunked, ways=(outside, inside), jitted=True)
check(rematerialised, ways=(outside,), jitted=True)
""",
    "as_it_runs": """
check(chunked, ways=(outside, inside), jitted=False)
""",
    # Checked types are beyond Pallas' interpreter; tests/portable/compile_sharded.py has them.
    "flash": """
with only("portable", interpret=True):
    check(jattn.flash_attention, ways=(outside,), jitted=False, checks=(False,))
""",
    "flash_inside": """
with only("portable", interpret=True):
    check(jattn.flash_attention, ways=(inside,), jitted=True, checks=(False,))
""",
}


@pytest.mark.parametrize("name", first(1, ["flash", *(n for n in PROGRAMS if n != "flash")]))
def test_gradients_are_those_of_the_whole(name: str) -> None:
    run(PRELUDE + PROGRAMS[name])
