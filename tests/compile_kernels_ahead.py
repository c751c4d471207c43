"""Compiles two programs of the same kernels for an absent H200, these ahead; prints a JSON line.

A program of its own: see tests/hopper/compile_tiles.py.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from tests.hopper.absent import h200s, standard_output  # isort: skip

import jax
import jax.numpy as jnp
from jax._src.pallas.mosaic_gpu import pallas_call_registration
from jax.sharding import NamedSharding, PartitionSpec

import jattn
from training import kernel_text
from training.kernels_ahead import Kernels

RULE = "mpmd_map_mgpu_lowering_rule"
KERNEL = r'kernel_hash = "((?:[^"\\]|\\.)*)"'
COMPILED = "Compile time"  # ptxas says so of each kernel


def loss(x: jax.Array, scale: float) -> jax.Array:
    return scale * jnp.asarray(jattn.flash_attention(x, x, x)).astype(jnp.float32).sum()


def main() -> None:
    """Counts of kernels: in a program, lowered, compiled ahead, and with the programs."""
    kernel_text.leave_out_counts()
    rule, lowered = getattr(pallas_call_registration, RULE), []

    def counted(*args: Any, **params: Any) -> Any:
        lowered.append(params)
        return rule(*args, **params)

    with h200s(1) as mesh:
        place = NamedSharding(mesh, PartitionSpec())
        x = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16, sharding=place)
        kernels = Kernels(counted, None, place)
        setattr(pallas_call_registration, RULE, kernels.lower)
        with standard_output() as ahead:
            gradient = jax.jit(jax.grad(loss), static_argnums=1)
            programs = [gradient.lower(x, scale) for scale in (1.0, 2.0)]
            for future in kernels.compiled.values():
                future.result()
        with standard_output() as again:
            for program in programs:
                program.compile()
    texts = [re.findall(KERNEL, program.as_text()) for program in programs]
    found = {
        "kernels": len(set(texts[0])),
        "same_texts": texts[0] == texts[1],
        "lowered": len(lowered),
        "compiled_ahead": ahead().count(COMPILED),
        "compiled_again": again().count(COMPILED),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
