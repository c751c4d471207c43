"""Sharded over rows and heads the kernels give the same, and gather nothing."""

from __future__ import annotations

import pytest

from tests.cases import first
from tests.four_devices import run


@pytest.mark.parametrize(
    "call", first(1, [*(f"jit({n})" for n in range(4)), "explicit()", "shard_map()"])
)
def test_interpreted_on_four_devices(call: str) -> None:
    run(f"from tests.portable import sharded\nsharded.{call}")
