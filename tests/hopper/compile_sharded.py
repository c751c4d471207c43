"""Compiles sharded calls for four absent H200s and prints what is gathered, as JSON lines."""

from __future__ import annotations

import json
import pathlib
import re
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.hopper.absent import h200s  # isort: skip

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from tests.hopper.calls import Half
from tests.hopper.compile_tiles import call

GATHER = re.compile(r"= (.*?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(")
CASE = Half(
    "sharded", 4, 520, 520, 8, 4, 128, causal=True, key_lengths=(9,) * 4, segments="sorted",
    sinks=True,
)  # fmt: skip


def main() -> None:
    """Results, then gradients, of arrays sharded over rows and heads."""
    attend, (floats, rest) = call(CASE)

    def loss(floats: Any, rest: Any) -> Any:
        return sum(x.astype(jnp.float32).sum() for x in attend(floats, rest))

    with h200s(2, 2) as mesh:

        def place(name: str, x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            axes = ("y",) if name == "sinks" else ("x", None, "y")[: x.ndim]
            sharding = NamedSharding(mesh, PartitionSpec(*axes))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        placed = [{name: place(name, x) for name, x in part.items()} for part in (floats, rest)]
        for name, function in {"results": attend, "gradients": jax.grad(loss)}.items():
            text = jax.jit(function).lower(*placed).compile().as_text()
            found = {"jax": jax.__version__, "call": name, "gathers": GATHER.findall(text)}
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
