"""Compiles a kernel that needs more registers than there are, and prints what it spills."""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.portable.absent import gpus, standard_error  # isort: skip

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.portable import triton
from pallas_kernels.portable.launch import launch
from pallas_kernels.portable.tiles import Tiles
from tests.portable.compile_calls import spills


def main() -> None:
    """A tile of 128 x 128 sums for one warp's 32 threads: 512 registers."""

    def kernel(refs: Any, results: Any) -> None:
        rows, columns = jnp.arange(128)[:, None], jnp.arange(128)[None]
        tile = triton.load(refs.x, (rows, columns))
        product = triton.product((tile,), (tile.T,))
        triton.store(results["y"], (rows, columns), tile + product.sum(axis=1, keepdims=True))

    def call(x: Any) -> Any:
        tiles = Tiles(queries=128, keys=128, warps=1, stages=1)
        shape = {"y": jax.ShapeDtypeStruct(x.shape, x.dtype)}
        return launch(
            kernel, {"x": x}, shape, grid=(1,), tiles=tiles, name="spills", interpret=False
        )

    with gpus("a100", 1) as mesh, standard_error() as said:
        everywhere = NamedSharding(mesh, PartitionSpec())
        shape = jax.ShapeDtypeStruct((128, 128), jnp.bfloat16, sharding=everywhere)
        jax.jit(call).lower(shape).compile()
    print(json.dumps({"jax": jax.__version__, "spilled": spills(said())}))


if __name__ == "__main__":
    main()
