"""A sequence over two processes of one machine, by `jax.distributed` and the mesh alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from tests.four_devices import REPOSITORY, STRICTLY

PROGRAM = """
import sys
import jax
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import jattn
from tests.tolerance import of_sums

assert len(jax.devices()) == 4 and len(jax.local_devices()) == 2
mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
place = NamedSharding(mesh, P(None, "x"))
rng = np.random.default_rng(0)
held = rng.standard_normal((3, 1, 32, 2, 8), np.float32)

options = dict(is_causal=True, dropout_rate=0.2, dropout_rng=jax.random.key(1))

def gradients(attention, *x):
    return jax.grad(lambda *x: (attention(*x, **options) ** 2).sum(), (0, 1, 2))(*x)

expected = gradients(jattn.eager_attention, *map(jnp.asarray, held))
arrays = [jax.make_array_from_callback(x.shape, place, lambda i, x=x: x[i]) for x in held]
found = jax.jit(lambda *x: gradients(jattn.dot_product_attention, *x))(*arrays)
for x, whole in zip(found, expected):
    allowed = of_sums(32 + 8, float(abs(whole).max()))
    assert len(x.addressable_shards) == 2
    for shard in x.addressable_shards:
        np.testing.assert_allclose(shard.data, whole[shard.index], rtol=0, atol=allowed)
print("as one")
"""


@pytest.mark.thorough
def test_two_processes_are_as_one() -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", STRICTLY + PROGRAM, address, str(i)],
            cwd=REPOSITORY,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in both:
        out, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
        assert "as one" in out
