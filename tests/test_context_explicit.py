"""Explicit meshes: a causal gather, whose queries are dealt out, can be traced."""

from __future__ import annotations

import pytest

from tests.four_devices import run

PROGRAM = """
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jattn

# One key head on each of two devices that share the sequence: not to be dealt out by heads.
mesh = jax.make_mesh((2, 2), ("h", "s"), axis_types=(AxisType.Explicit,) * 2)
place = NamedSharding(mesh, P(None, "s", "h"))
q, k = (jax.ShapeDtypeStruct((2, 16, n, 8), jnp.float32, sharding=place) for n in (8, 2))

def loss(q, k, v):
    return (jattn.memory_efficient_attention(q, k, v, is_causal=True) ** 2).sum()

with jax.set_mesh(mesh):
    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k)
assert "all_gather" in str(traced.jaxpr)
"""


@pytest.mark.thorough
def test_queries_dealt_out_take_no_constants() -> None:
    run(PROGRAM)
