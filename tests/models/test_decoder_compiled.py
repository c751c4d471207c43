"""For an absent H200: a decoder's prefill runs Hopper's kernels, and holds what one block needs.

It runs as tests/hopper/test_compile.py does.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from tests.hopper.test_compile import VERSIONS, environment

pytestmark = pytest.mark.compile

LENGTH, INNER = 32768, 8192  # of compile_decoder.py


def test_a_prefill_holds_one_block_and_copies_no_weight() -> None:
    run = subprocess.run(
        [sys.executable, pathlib.Path(__file__).parent / "compile_decoder.py"],
        env=environment(VERSIONS[0]),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    two, six, padded = (json.loads(line) for line in run.stdout.splitlines() if line[0] == "{")
    # The feed-forward layer's gate, up and their product in bfloat16, and as much again.
    assert two["held"] < 2 * 3 * LENGTH * INNER * 2
    assert six["held"] < 1.05 * two["held"]
    assert padded["held"] < 1.05 * two["held"]
    for found, layers in ((two, 2), (six, 6), (padded, 2)):
        assert found["kernels"] == layers
        assert found["copies"] == 0
        assert found["most_read"] < 12  # the stream is not summed anew from all blocks' outputs
