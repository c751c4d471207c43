"""Training steps over two GPUs, as they were measured: the losses of one, and what README says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import jax.numpy as jnp

ROOT = Path(__file__).resolve().parents[1]
FILE = "training/results/h200/steps-of-two.jsonl"


def test_two_gpus_lose_what_one_does_and_the_readme_says_how_long_they_take() -> None:
    rows = [json.loads(line) for line in (ROOT / FILE).read_text().splitlines()]
    found = {(row["devices"], row["tokens"], row["step"]): row for row in rows}
    for step in (1, 2):
        one, two, long = (found[x, t, step] for x, t in ((1, 2**17), (2, 2**17), (2, 2**20)))
        # Each token's loss is rounded on its own.
        rounding = float(jnp.finfo(jnp.bfloat16).eps) / math.sqrt(one["tokens"])
        assert abs(two["loss"] - one["loss"]) <= rounding * one["loss"]
        assert abs(long["loss"] - one["loss"]) <= rounding * one["loss"]  # random bytes, too
    readme = (ROOT / "README.md").read_text()
    assert f"[{found[2, 2**20, 2]['seconds']:.0f} seconds a step]({FILE})" in readme
