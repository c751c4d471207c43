"""What `explain` says of the gradient's memory, beside what compiled programs took on a GPU."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jattn
from jattn.call.arguments import attention_call
from pallas_kernels.hopper.backward_cut import BackwardTiles
from pallas_kernels.hopper.backward_tiles import choose_backward_tiles

RESULTS = pathlib.Path(__file__).parents[1] / "benchmarks" / "results"
MEASURED = "nvidia-h200-all-2026-11-28.json"
PEERS = {"jattn/flash": "flash", "jax.nn/cudnn": "cudnn"}


def explained(cell: dict[str, Any]) -> tuple[jattn.Explanation, int, BackwardTiles]:
    """What is said of a cell, bytes of its operands and gradients, and Hopper's tiles."""
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
    found: list[Any] = []
    call = {"query": arrays[0], "key": arrays[1], "value": arrays[2]}
    shaped = {x: options.pop(x) for x in list(options) if x.endswith("ids") or x == "bias"}
    jax.eval_shape(lambda x: found.append(attention_call(**x, **options).spec), call | shaped)
    tiles = choose_backward_tiles(found[0], deterministic=False)
    return jattn.explain(*arrays, device="H200", **options, **shaped), 2 * operands, tiles


@pytest.mark.parametrize("peer", PEERS)
def test_bytes_are_those_that_were_measured(peer: str) -> None:
    compared = 0
    for cell in json.loads((RESULTS / MEASURED).read_text())["cells"]:
        found, operands, tiles = explained(cell)
        (said,) = (x.gradient_bytes for x in found.reports if x.name == PEERS[peer])
        for x in cell["measurements"]:
            if (x["peer"], x["which"]) == (peer, "gradient") and "temp_bytes" in x and said:
                more = said - x["temp_bytes"]
                if cell["bias"] and cell["head_dim"] >= 64 and peer == "jattn/flash":
                    # Hopper's sums of dQ, where the bias's gradient will be.
                    more -= 4 * cell["batch"] * cell["queries"] * cell["heads"] * cell["head_dim"]
                if tiles.adds and peer == "jattn/flash":
                    # Sums of dK and dV, where dQ will be if they are no larger.
                    all_keys = cell["batch"] * cell["kv_heads"] * cell["keys"]
                    sums = 2 * (tiles.places * tiles.keys or all_keys) * cell["head_dim"]
                    rows = cell["batch"] * cell["heads"] * cell["queries"]
                    if 2 * sums <= rows * cell["head_dim"]:
                        more -= 4 * sums
                # What is held where the program leaves no room for it in its results.
                assert -0.01 <= more / (operands + x["temp_bytes"]) <= 0.08, cell["name"]
                compared += 1
    assert compared > 30


# Shapes of query and key, options by shape, and MiB that the gradient took compiled for an absent
# H200 (jax 0.11.2), causal and in bfloat16.
COMPILED: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, tuple[int, ...]], float]] = {
    "shared out": (
        (4, 1024, 32, 128),
        (4, 1024, 1, 128),
        {
            "query_seq_lengths": (4,),
            "query_segment_ids": (4, 1024),
            "key_value_segment_ids": (4, 1024),
        },
        129.505,
    ),
    "narrow heads": ((1, 8192, 16, 16), (1, 8192, 16, 16), {}, 33.501),
    "lengths": (
        (4, 2048, 8, 128),
        (4, 2048, 8, 128),
        {"query_seq_lengths": (4,), "key_value_seq_lengths": (4,)},
        81.003,
    ),
    "scale": ((1, 4096, 8, 128), (1, 4096, 8, 128), {"scale": ()}, 32.001),
}


@pytest.mark.parametrize("name", COMPILED)
def test_bytes_are_those_that_were_compiled(name: str) -> None:
    query, key, more, mib = COMPILED[name]
    x, y = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (query, key))
    options: Any = {
        option: jax.ShapeDtypeStruct(shape, jnp.int32 if shape else jnp.float32)
        for option, shape in more.items()
    }
    found = jattn.explain(x, y, y, is_causal=True, device="H200", **options)
    (said,) = (report.gradient_bytes for report in found.reports if report.name == "flash")
    assert said is not None
    assert 0.99 <= said / (mib * 2**20) <= 1.05


# Query, key and MiB that forward took of few queries, compiled for an absent H200 and A100 (jax
# 0.11.2), and in how many parts each cut the keys: what the gradient, which has less, holds too.
PARTS = [
    ((1, 4, 16, 128), (1, 65536, 1, 128), {"H200": (132, 4.190), "A100": (256, 8.126)}),
    ((1, 128, 8, 128), (1, 16384, 8, 128), {"H200": (8, 4.071), "A100": (32, 16.258)}),
    ((1, 128, 8, 80), (1, 16384, 8, 80), {"H200": (8, 2.571), "A100": (32, 10.258)}),
]


@pytest.mark.parametrize(("query", "key", "took"), PARTS)
def test_parts_of_split_keys_are_said_and_counted(
    query: tuple[int, ...], key: tuple[int, ...], took: dict[str, tuple[int, float]]
) -> None:
    x, y = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (query, key))
    for device, (parts, mib) in took.items():
        found = jattn.explain(x, y, y, implementation="flash", device=device)
        (report,) = (report for report in found.reports if report.name == "flash")
        assert str(report.kernel).endswith(f", keys in {parts} parts, joined by a kernel")
        assert report.gradient_bytes is not None
        assert 0.98 <= report.gradient_bytes / (mib * 2**20) <= 1.01


def test_parts_of_even_shares_are_said_as_the_most_of_a_row() -> None:
    x, y = (jax.ShapeDtypeStruct((6, *rest, 128), jnp.bfloat16) for rest in ((1, 32), (32768, 8)))
    found = jattn.explain(x, y, y, implementation="flash", device="H200")
    assert str(found.kernel).endswith(", keys in up to 4 parts, joined by a kernel")
