"""Runs kernels for the memory checker that this program is started under.

memcheck.py calls       forward and gradient of a few odd calls
memcheck.py overrun     a kernel that writes where it must not
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.cases import Case
from tests.hopper.calls import Bottom, Half
from tests.hopper.exact import FLASH, compute

CASES = [
    Half("one", 1, 1, 1, 1, 1, 8),
    Half("odd", 1, 203, 205, 2, 1, 40, 72, sinks=True),
    Half("lengths", 2, 150, 301, 2, 2, 64, query_lengths=(150, 7), key_lengths=(0, 290)),
    Bottom("window", 1, 77, 333, 2, 1, 128, window=(40, 0)),
    Case("packed", 1, 300, 300, 2, 1, 256, dtype="float16", segments="sorted", causal=True),
    Half("split_keys", 1, 1, 1500, 8, 2, 128, key_lengths=(1433,)),
]


def calls() -> None:
    """Each of the cases, with its gradients."""
    for case in CASES:
        jax.block_until_ready(compute(FLASH, case, 0))


def overrun() -> None:
    """Writes 256 MiB past the end of an array of 512 bytes."""

    def kernel(out: Any) -> None:
        start = lax.axis_index("block") << 26
        out[pl.ds(start, 128)] = jnp.full((128,), 1.0, jnp.float32)

    write = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((128,), jnp.float32),
        grid=(2,),
        grid_names=("block",),
    )
    jax.block_until_ready(jax.jit(write)())


if __name__ == "__main__":
    {"calls": calls, "overrun": overrun}[sys.argv[1]]()
