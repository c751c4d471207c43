"""Compiles a backward apart from its forward for an absent H200; prints XLA's fusions, as JSON."""

from __future__ import annotations

import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.hopper.absent import h200s  # isort: skip

import jax
from jax.sharding import NamedSharding, PartitionSpec

from tests.hopper.compile_tiles import Long, call, of_direction

COMPUTATION = re.compile(r"^%(fused[\w.]*) .*?\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
OPERATION = re.compile(r" = \S+ ([\w-]+)\(")


def main() -> None:
    """The operations of each."""
    with h200s(1) as mesh:
        place = NamedSharding(mesh, PartitionSpec())
        case = Long("full", batch=4, queries=1024, keys=1024)
        function, shapes = of_direction("backward", *call(case))
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
        )
        text = jax.jit(function).lower(*placed).compile().as_text()
    fusions = {
        name: sorted(set(OPERATION.findall(body))) for name, body in COMPUTATION.findall(text)
    }
    print(json.dumps({"jax": jax.__version__, "fusions": fusions}), flush=True)


if __name__ == "__main__":
    main()
