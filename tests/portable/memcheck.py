"""Runs portable kernels for the memory checker that this program is started under.

memcheck.py calls       forward and gradient of a few odd calls, by both algorithms
memcheck.py overrun     a kernel that writes where it must not
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from pallas_kernels.portable import triton
from pallas_kernels.portable.launch import launch
from pallas_kernels.portable.tiles import Tiles
from tests.cases import Case
from tests.portable.calls import Bottom, Half
from tests.portable.exact import BOTH, compute

CASES = [
    Half("one", 1, 1, 1, 1, 1, 8),
    Half("odd", 1, 203, 205, 2, 1, 40, 72, sinks=True, bias="1NTS"),
    Half("lengths", 2, 150, 301, 2, 2, 64, query_lengths=(150, 7), key_lengths=(0, 290)),
    Bottom("window", 1, 77, 333, 2, 1, 128, window=(40, 0), dropout=0.3),
    Case("packed", 1, 130, 130, 2, 1, 96, segments="sorted", mask="11TS", causal=True),
    Half("split_keys", 1, 1, 1500, 8, 2, 128, key_lengths=(1433,), bias="B11S"),
]


def calls() -> None:
    """Each of the cases, with its gradients."""
    for case in CASES:
        for backend in BOTH:
            jax.block_until_ready(compute(backend, case, 0))


def overrun() -> None:
    """Writes 256 MiB past the end of an array of 512 bytes."""

    def kernel(refs: Any, results: Any) -> None:
        index = jnp.arange(128, dtype=jnp.int32)
        place = index + (triton.place_in((2,))[0] << 26)
        triton.store(results["out"], (place,), index.astype(jnp.float32))

    result = {"out": jax.ShapeDtypeStruct((128,), jnp.float32)}
    tiles = Tiles(queries=128, keys=1, warps=4, stages=1)
    write = jax.jit(
        lambda: launch(kernel, {}, result, grid=(2,), tiles=tiles, name="overrun", interpret=False)
    )
    jax.block_until_ready(write())


if __name__ == "__main__":
    {"calls": calls, "overrun": overrun}[sys.argv[1]]()
