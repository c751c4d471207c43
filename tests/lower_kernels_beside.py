"""Lowers a layer for an absent H100, its kernels in this process and beside it; prints a JSON line.

A program of its own: see tests/hopper/compile_tiles.py.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from jax._src.pallas.mosaic_gpu import pallas_call_registration
from jax.sharding import AbstractDevice, AbstractMesh

import jattn
from training import environment, kernel_text, kernels_ahead, kernels_beside  # noqa: F401

QUERY, KEY = (1, 128, 2, 64), (1, 128, 1, 64)
H100 = "NVIDIA H100 80GB HBM3"


def loss(query: jax.Array, key: jax.Array) -> jax.Array:
    return jnp.asarray(jattn.flash_attention(query, key, key, is_causal=True)).sum()


def text() -> str:
    shapes = (jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in (QUERY, KEY))
    device = AbstractDevice(device_kind=H100, num_cores=None, platform="cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(jax.grad(loss, (0, 1))).trace(*shapes)
    return str(traced.lower(lowering_platforms=("cuda",)).as_text())


def main() -> None:
    """How many kernels this process lowered, first alone; and whether the program is the same."""
    beside = kernels_beside.Beside()
    kernel_text.leave_out_counts()
    rule, lowered = getattr(pallas_call_registration, kernels_ahead.RULE), []

    def counted(*args: Any, **params: Any) -> Any:
        lowered.append(params)
        return rule(*args, **params)

    setattr(pallas_call_registration, kernels_ahead.RULE, counted)
    texts, counts, compiled = [text()], [len(lowered)], []
    jax.clear_caches()
    kernels_ahead._Kernel.compile = lambda *_: compiled.append("a kernel")  # type: ignore[assignment, method-assign]
    kernels_ahead.begin(
        None, beside, kernels_beside.Layer(H100, QUERY, KEY, "bfloat16", False, "flash")
    )
    texts, counts = [*texts, text()], [*counts, len(lowered)]
    found = {"same": texts[0] == texts[1], "lowered": counts, "compiled": len(compiled)}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
