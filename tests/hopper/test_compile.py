"""For an absent H200: every shape of tiles compiles, spills what is known, lets no product wait.

`tests/programs.py` says what it needs.
"""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from tests.programs import VERSIONS, printed

pytestmark = pytest.mark.compile

HERE = pathlib.Path(__file__).parent
PARTS = 4
# Bytes that a direction's kernels spill all the same, the more of both versions' ptxas.
KNOWN_SPILLS = {
    # At head dim 64, S and dP of a block of 128 queries take what dK and dV leave of a thread's 240
    # registers; at 256, dQ leaves little. Where there is a mask it is the loop of masked visits,
    # and what is between the loops: the loop of clear visits has none.
    "backward": {
        "narrow": 8,
        "narrow_full": 28,
        "window_64": 32,
        "wide_window_64": 32,
        "offsets_64": 32,
        "segments_64": 32,
        "segments_256": 8,
        "one_query_64": 36,
        "segments_ragged": 12,
        "short_documents": 16,
        "documents_64": 64,
        "segments_128": 4,
        "vision": 32,
        "vision_72": 28,
        "dropout_64": 148,
        "dropout_causal_64": 116,
        "dropout_128": 8,
        **dict.fromkeys(("dropout_causal_128", "dropout_ragged_128"), 12),
        "joined_dropout_64": 36,
        "joined_dropout_full_64": 52,
        "joined_dropout_128": 4,
        "array_scale_full_64": 8,
        # Lists whose loading warpgroup, which has 24 registers, claims blocks of dQ.
        "lists_full": 24,
        "lists_causal": 8,
        "lists_window": 32,
        # Where a tile's thread blocks add what they have at its end.
        "shared_128": 20,
        "shared_by_seven": 4,
        "grouped_window": 24,
        "bias_shared_segments_64": 32,
        "bias_shared_segments_128": 128,
        "bias_shared_float32_packed_128": 24,
        "bias_shared_lengths_64": 8,
    },
    # Gradients beside a bias that has none.
    "still": {"bias_short_128": 8, "bias_columns_128": 8},
    "deterministic": {},
    "forward": {
        "bias_window_64": 4,
        "bias_narrow_512_float32_64": 28,
        **dict.fromkeys(("counted_full_odd_64", "counted_latent_full"), 4),
    },
    "tangent": {"window_64": 16},
    "query_tangent": {"offsets_128": 16},
}
# One query is padded to eight in backward. Dense masks are padded to whole words of bits, and their
# words to tiles of 192 queries. The gradient of a scale needs dQ unscaled, which is copied once.
PADDED = {
    "forward": ("mask_ragged_64", "mask_dropout_64"),
    "tangent": (),
    "query_tangent": (),
    "key_tangents": (),
    "still": (),
    "backward": (
        "mask_ragged_64",
        *(f"one_query_{x}" for x in ("64", "128", "256", "offsets", "long")),  # one row, to eight
        "dropout_one_query",
        *(f"array_scale_{x}" for x in ("64", "128", "full_64", "full_128")),
    ),
    "deterministic": (),
}


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("version", VERSIONS)
def test_nothing_more_spills_or_waits_or_is_moved(version: str, part: int) -> None:
    found = printed(version, HERE / "compile_tiles.py", part, PARTS)
    assert len(found) >= 30
    bad = [call for call in found if not is_good(call)]
    assert not bad, "\n".join(map(str, bad))


def known_spills(call: dict[str, Any]) -> int:
    return KNOWN_SPILLS.get(call["direction"], {}).get(call["call"], 0)


def is_good(call: dict[str, Any]) -> bool:
    if "error" in call or not call["kernels"]:
        return False
    # The kernels' own arrays are a few times their operands; scores would be tens of times.
    is_linear = call["temporary"] <= 4 * call["operands"]
    spilled = call["spilled"] - known_spills(call)
    moved = call["moves"] and call["call"] not in PADDED[call["direction"]]
    return is_linear and not (spilled > 0 or call["notes"] or moved)


@pytest.mark.parametrize("version", VERSIONS)
def test_sharded_over_rows_and_heads_nothing_is_gathered(version: str) -> None:
    found = printed(version, HERE / "compile_sharded.py")
    assert [call["call"] for call in found] == ["results", "gradients"]
    assert not any(call["gathers"] for call in found), found


@pytest.mark.parametrize("version", VERSIONS)
def test_keys_and_values_of_the_next_heads_come_while_a_kernel_runs(version: str) -> None:
    gather, *heads = printed(version, HERE / "compile_context.py")
    steps = gather["steps"]
    started = [at for at, step in enumerate(steps) if step == "all-gather-start"]
    spans = [steps[at : steps.index("all-gather-done", at)] for at in started]
    # Of eight pieces; nothing could run beside the first one's.
    assert sum("custom-call" in span for span in spans) == 2 * 7, steps
    for call in heads:
        # Of eight pieces the first comes before any kernel and the last goes home after all.
        steps, passes = call["steps"], 1 if call["call"] == "results" else 2
        kernels = [at for at, step in enumerate(steps) if step == "custom-call"]
        # Backward's, and what rounds the gradient of queries that it adds up.
        assert len(kernels) == 8 * (1 if passes == 1 else 3)
        exchanges = [x for x in steps if x.startswith("collective-permute") and "done" not in x]
        assert len(exchanges) == 10 * passes
        beside = [steps[at - 1] == "collective-permute-start" for at in kernels]
        assert sum(beside) == 8 * passes, steps
        assert call["temp"] <= 1.1 * call["alone"] + call["hop"], call
    # The zeros that a piece's gradient of queries is added to are not held before it.
    assert call["temp"] <= call["alone"] + call["hop"] / 4, call


@pytest.mark.parametrize("version", VERSIONS)
def test_a_step_of_generation_writes_its_cache_where_it_is(version: str) -> None:
    (step,) = printed(version, HERE / "compile_decode.py")
    assert step["alias"] >= step["cache"]
    assert step["temp"] < step["cache"] / 100
    assert step["copies"] == []
    assert any("mosaic_gpu" in name for name in step["kernels"])


@pytest.mark.parametrize("version", VERSIONS)
def test_sums_of_a_query_gradient_lie_where_a_bias_gradient_will_be(version: str) -> None:
    one, two = printed(version, HERE / "compile_lent.py")
    # Little but the output's cotangent, which is half of the sums.
    assert one["temporary"] < 0.6 * one["explained"], one
    # XLA may put one call's elsewhere, which is what is explained.
    assert two["temporary"] <= 2 * two["explained"], two
