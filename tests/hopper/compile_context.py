"""Compiles a sequence over two absent H200s; prints what is sent, and beside what, as JSON.

python tests/hopper/compile_context.py [TOKENS]
"""

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

import jattn

KINDS = "all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
# In the order in which they run: transfers that begin, or are waited for, and the kernels.
STEP = re.compile(rf" ((?:{KINDS})(?:-start|-done)?|custom-call)\(")
LINE = PartitionSpec(None, "x")


def steps(text: str) -> list[str]:
    """Those of a compiled program."""
    entry = text[text.index("ENTRY") :].splitlines()
    return [found[1] for line in entry if (found := STEP.search(line))]


def main(tokens: int = 65_536) -> None:
    """Results, causal, in a gather."""
    shape = (1, tokens, 16, 128)
    with h200s(2) as mesh:
        place = NamedSharding(mesh, LINE)
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)] * 3

        def own(*arrays: Any) -> Any:
            with jattn.context_parallel("x", schedule="gather"):
                return jattn.flash_attention(*arrays, is_causal=True)

        mapped = jax.shard_map(own, in_specs=(LINE,) * 3, out_specs=LINE)
        text = jax.jit(mapped).lower(*arrays).compile().as_text()
        print(json.dumps({"jax": jax.__version__, "steps": steps(text)}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
