"""What `explain` says of the gradient's memory, beside what compiled programs took on a GPU."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jattn

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
MEASURED = "nvidia-h100-80gb-hbm3-all-2026-11-26.json"
PEERS = {"jattn/flash": "flash", "jax.nn/cudnn": "cudnn"}


def explained(cell: dict[str, Any]) -> tuple[jattn.Explanation, int]:
    """What is said of a cell of the results, and the bytes of its operands and gradients."""
    b, t, s, n, k = (cell[name] for name in ("batch", "queries", "keys", "heads", "kv_heads"))
    h, dtype = cell["head_dim"], jnp.dtype(cell["dtype"])
    d = cell["value_dim"] or h
    mask, _, size = cell["mask"].partition(":")
    options: dict[str, Any] = {"is_causal": mask != "full"}
    if mask == "window":
        options["local_window_size"] = (int(size), 0)
    if mask == "packed":
        options["query_segment_ids"] = jax.ShapeDtypeStruct((b, t), jnp.int32)
        options["key_value_segment_ids"] = jax.ShapeDtypeStruct((b, s), jnp.int32)
    if cell["bias"]:
        options["bias"] = jax.ShapeDtypeStruct((1, n, t, s), dtype)
    arrays = [jax.ShapeDtypeStruct(x, dtype) for x in ((b, t, n, h), (b, s, k, h), (b, s, k, d))]
    operands = b * (t * n + s * k) * (h + d) * dtype.itemsize
    return jattn.explain(*arrays, device="H100", **options), 2 * operands


@pytest.mark.parametrize("peer", PEERS)
def test_bytes_are_those_that_were_measured(peer: str) -> None:
    compared = 0
    for cell in json.loads((RESULTS / MEASURED).read_text())["cells"]:
        found, operands = explained(cell)
        (said,) = (x.gradient_bytes for x in found.reports if x.name == PEERS[peer])
        for x in cell["measurements"]:
            if (x["peer"], x["which"]) == (peer, "gradient") and "temp_bytes" in x and said:
                more = said - x["temp_bytes"]
                # What is held where the program leaves no room for it in its results.
                assert -0.01 <= more / (operands + x["temp_bytes"]) <= 0.08, cell["name"]
                compared += 1
    assert compared > 30
