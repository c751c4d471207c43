"""A sequence over two processes of one machine, by `jax.distributed` and the mesh alone."""

from __future__ import annotations

import pytest

from tests import two_processes

PROGRAM = """
import jax
jax.distributed.initialize(ADDRESS, num_processes=2, process_id=NUMBER)
import jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jattn
from jattn.transforms.context import plan
from tests.tolerance import of_sums

plan.LEAST_ROWS = 1
assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
place = NamedSharding(mesh, P(None, "x"))
rng = np.random.default_rng(0)
held = rng.standard_normal((3, 1, 32, 4, 8), np.float32)

options = dict(is_causal=True, dropout_rate=0.2, dropout_rng=jax.random.key(1))

def gradients(attention, *x):
    return jax.grad(lambda *x: (attention(*x, **options) ** 2).sum(), (0, 1, 2))(*x)

def through(schedule):
    def own(*x):
        with jattn.context_parallel("x", schedule=schedule):
            return jattn.dot_product_attention(*x, **options)
    mapped = jax.shard_map(own, mesh=mesh, in_specs=place.spec, out_specs=place.spec)
    return lambda *x, **_: mapped(*x)

expected = gradients(jattn.eager_attention, *map(jnp.asarray, held))
arrays = [jax.make_array_from_callback(x.shape, place, lambda i, x=x: x[i]) for x in held]
for attention in (jattn.dot_product_attention, *map(through, ("ring", "gather", "heads"))):
    found = jax.jit(lambda *x: gradients(attention, *x))(*arrays)
    for x, whole in zip(found, expected):
        allowed = of_sums(32 + 8, float(abs(whole).max()))
        assert len(x.addressable_shards) == 2
        for shard in x.addressable_shards:
            np.testing.assert_allclose(shard.data, whole[shard.index], rtol=0, atol=allowed)
"""


@pytest.mark.thorough
def test_two_processes_are_as_one() -> None:
    two_processes.run(PROGRAM)
