"""For absent H200s: what cuDNN is called for, forward and backward, mapped, kept and sharded."""

from __future__ import annotations

import pathlib

import pytest

from tests.programs import VERSIONS, printed

pytestmark = pytest.mark.compile

# Forward and backward runs of cuDNN.
RUNS = {
    "forward": (1, 0),
    "gradient": (1, 1),
    "mapped": (1, 1),
    "again": (2, 1),
    "kept": (1, 1),
    "by the partitioner": (1, 1),
    "by shard_map, True": (1, 1),
    "by shard_map, False": (1, 1),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_cudnn_is_called_once_each_way_and_nothing_is_gathered(version: str) -> None:
    found = printed(version, pathlib.Path(__file__).parent / "compile_cudnn.py")
    assert {x["call"]: (x["forward"], x["backward"]) for x in found} == RUNS
    assert not any(x["moves"] for x in found)
