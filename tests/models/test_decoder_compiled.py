"""For an absent H200: a decoder's prefill runs Hopper's kernels, and holds what one block needs;
its loss holds the logits of one chunk.

`tests/programs.py` says what it needs.
"""

from __future__ import annotations

import functools
import pathlib

import pytest

from tests.programs import VERSIONS, printed

pytestmark = pytest.mark.compile

LENGTH, INNER, WIDTH, VOCABULARY = 32768, 8192, 2048, 128256  # of compile_decoder.py
GIB = 1 << 30


@functools.cache
def lines() -> list[dict[str, int]]:
    """Those that it prints."""
    return printed(VERSIONS[0], pathlib.Path(__file__).parent / "compile_decoder.py")


def test_a_prefill_holds_one_block_and_copies_no_weight() -> None:
    two, six, padded, _ = lines()
    # The feed-forward layer's gate, up and their product in bfloat16, and as much again.
    assert two["held"] < 2 * 3 * LENGTH * INNER * 2
    assert six["held"] < 1.05 * two["held"]
    assert padded["held"] < 1.05 * two["held"]
    for found, layers in ((two, 2), (six, 6), (padded, 2)):
        assert found["kernels"] == layers
        assert found["copies"] == 0
        assert found["most_read"] < 12  # the stream is not summed anew from all blocks' outputs


def test_a_loss_holds_one_chunk_of_logits() -> None:
    """And the output layer's gradient in float32, to which the chunks add."""
    *_, loss = lines()
    assert loss["held"] < GIB + 4 * VOCABULARY * WIDTH + 4 * LENGTH * WIDTH
