"""Compiles gradients of biases for an absent H200 and prints the bytes held beside them, as JSON.

One call, then two in a row with a bias each, whose sums of dQ may lie where gradients will be.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.absent import gpus  # isort: skip

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import jattn

LENGTH, HEADS = 2048, 16


def main() -> None:
    with gpus("h200", 1) as mesh:
        place = NamedSharding(mesh, PartitionSpec())
        x = jax.ShapeDtypeStruct((2, LENGTH, HEADS, 128), jnp.bfloat16, sharding=place)
        bias = jax.ShapeDtypeStruct((1, HEADS, LENGTH, LENGTH), jnp.bfloat16, sharding=place)
        (own,) = (
            report
            for report in jattn.explain(x, x, x, bias=bias, device="H200").reports
            if report.name == "flash"
        )
        for calls in (1, 2):

            def loss(q: Any, k: Any, v: Any, biases: Any) -> Any:
                for one in biases:
                    q = jattn.flash_attention(q, k, v, bias=one)
                return (q.astype(jnp.float32) ** 2).sum()

            gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
            made = gradients.lower(x, x, x, [bias] * calls).compile()
            held = made.memory_analysis().temp_size_in_bytes
            found = {"jax": jax.__version__, "calls": calls, "temporary": held}
            print(json.dumps(found | {"explained": own.gradient_bytes}), flush=True)


if __name__ == "__main__":
    main()
