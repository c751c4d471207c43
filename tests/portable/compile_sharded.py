"""Compiles sharded calls for four absent H200s and prints what is gathered, as JSON lines."""

from __future__ import annotations

import json
import pathlib
import re
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.portable.absent import gpus  # isort: skip

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from tests.portable.compile_calls import ALGORITHMS, Long
from tests.shapes import arguments

GATHER = re.compile(r"= (.*?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(")
CASE = Long(
    "sharded", batch=4, queries=520, keys=520, heads=8, kv_heads=4, bias="1NTS", mask="B1TS",
    dropout=0.1, sinks=True, causal=True,
)  # fmt: skip
PLACES = {
    "bias": PartitionSpec(None, "y"),
    "mask": PartitionSpec("x"),
    "sinks": PartitionSpec("y"),
    "dropout_rng": PartitionSpec(),
}
ROWS_AND_HEADS = PartitionSpec("x", None, "y")


def main() -> None:
    """Gradients of arrays sharded over rows and heads, by the partitioner and by `shard_map`."""
    floats, rest, static = arguments(CASE)
    with gpus("h200", 2, 2) as mesh:
        specs = [
            {name: PLACES.get(name, ROWS_AND_HEADS) for name in part} for part in (floats, rest)
        ]
        shapes = [
            {
                name: jax.ShapeDtypeStruct(
                    x.shape, x.dtype, sharding=NamedSharding(mesh, places[name])
                )
                for name, x in part.items()
            }
            for part, places in zip((floats, rest), specs, strict=True)
        ]
        for name, attention in ALGORITHMS.items():

            def attend(floats: Any, rest: Any, attention: Any = attention) -> Any:
                # Only portable kernels take a bias.
                return attention(**floats, **rest, **static)

            manual = jax.shard_map(attend, in_specs=tuple(specs), out_specs=ROWS_AND_HEADS)
            for how, function in {"partitioner": attend, "shard_map": manual}.items():

                def loss(floats: Any, rest: Any, function: Any = function) -> Any:
                    return function(floats, rest).astype(jnp.float32).sum()

                text = jax.jit(jax.grad(loss)).lower(*shapes).compile().as_text()
                found = {"jax": jax.__version__, "algorithm": name, "by": how}
                found |= {"kernels": text.count("xla.gpu.triton"), "gathers": GATHER.findall(text)}
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
