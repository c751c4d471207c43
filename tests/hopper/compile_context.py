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
# A kernel that reads slices of what came is a fusion of both.
STEP = re.compile(rf" ((?:{KINDS})(?:-start|-done)?|custom-call)\(|kind=(kCustom)")
LINE = PartitionSpec(None, "x")
HEADS, DIM = 16, 128


def steps(text: str) -> list[str]:
    """Those of a compiled program."""
    entry = text[text.index("ENTRY") :].splitlines()
    runs = [line for line in entry if "AllocateBuffer" not in line]
    return [found[1] or "custom-call" for line in runs if (found := STEP.search(line))]


def main(tokens: int = 65_536) -> None:
    """Results, causal, in a gather; results and gradients of heads, beside half of it alone."""
    print(json.dumps({"jax": jax.__version__} | gather(tokens)), flush=True)
    for which in ("results", "gradients"):
        found = {"jax": jax.__version__, "call": which} | heads(tokens, which)
        print(json.dumps(found), flush=True)


def gather(tokens: int) -> dict[str, Any]:
    """What is sent, and beside what."""
    text = compiled(tokens, "gather", "results").as_text()
    return {"call": "gather", "steps": steps(text)}


def heads(tokens: int, which: str) -> dict[str, Any]:
    """The same, and temporary memory of a device, of half the sequence on one, and of a hop."""
    program = compiled(tokens, "heads", which)
    alone = compiled(tokens // 2, None, which)
    keys = 2 * tokens // 2 * HEADS * DIM
    # In backward the sums of their gradients, in float32, go round with keys and values.
    hop = keys * (2 if which == "results" else 2 + 4)
    temp = {
        name: x.memory_analysis().temp_size_in_bytes
        for name, x in (("temp", program), ("alone", alone))
    }
    return {"steps": steps(program.as_text()), "hop": hop} | temp


def compiled(tokens: int, schedule: Any, which: str) -> Any:
    """A causal call over two devices by a schedule, or None: on one."""
    shape = (1, tokens, HEADS, DIM)

    def call(*arrays: Any) -> Any:
        return jattn.flash_attention(*arrays, is_causal=True)

    def own(*arrays: Any) -> Any:
        with jattn.context_parallel("x", schedule=schedule):
            return call(*arrays)

    with h200s(1 if schedule is None else 2) as mesh:
        place = NamedSharding(mesh, LINE)
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)] * 3
        attend = call
        if schedule is not None:
            attend = jax.shard_map(own, in_specs=(LINE,) * 3, out_specs=LINE)

        def gradients(*arrays: Any) -> Any:
            out, backward = jax.vjp(attend, *arrays)
            return out, backward(jnp.ones_like(out))

        function = attend if which == "results" else gradients
        return jax.jit(function).lower(*arrays).compile()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
