"""For absent GPUs, H200, A100, L4, B200: every block of the table compiles, nothing more spills.

`tests/programs.py` says what it needs. What does not fit in shared memory does not compile.
"""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

from tests.programs import VERSIONS, printed

pytestmark = pytest.mark.compile

HERE = pathlib.Path(__file__).parent
# Bytes that a call spills all the same, by device, algorithm and direction.
KNOWN_SPILLS: dict[tuple[str, str, str], dict[str, int]] = {
    ("a100", "chunked", "forward"): {"causal_64": 24, "causal_192": 20},
    ("a100", "flash", "forward"): {"causal_192": 24, "bias_float32_64": 24},
    ("a100", "flash", "backward"): {"tf32_512": 512},
    ("a100", "flash", "backward_tangent"): {"causal_64": 12},
    ("b200", "flash", "backward_tangent"): {"causal_64": 8},
    ("b200", "chunked", "forward"): {"causal_256": 24},
    ("b200", "flash", "forward"): {"causal_256": 4, "float32_512": 576},
    ("b200", "flash", "backward"): {"float32_512": 22996, "tf32_512": 516},
    ("l4", "chunked", "forward"): {"causal_64": 24},
    ("l4", "flash", "forward"): {"causal_192": 20},
    ("l4", "flash", "backward"): {"causal_256": 12, "float32_64": 8},
    # Tiles that spill nothing were slower, of float32, of the gradients' tangents, and where 128 is
    # the query-chunked head dim.
    ("h200", "chunked", "forward"): {"causal_128": 328, "causal_512": 48, "packed": 304},
    ("h200", "flash", "forward"): {
        "float32_128": 412,
        "float32_256": 1724,
        "float32_512": 1072,
        "tf32_256": 992,
        "tf32_512": 32,
    },
    ("h200", "flash", "backward_tangent"): {
        "causal_64": 28,
        "causal_128": 8,
        "ragged": 64,
        "bias": 48,
        "bias_keys": 28,
        "mask_soft_cap_sinks": 104,
        "packed": 60,
        "window": 16,
        "offsets": 120,
    },
    ("h200", "flash", "backward"): {
        "causal_256": 212,
        "causal_512": 600,
        "float32_64": 316,
        "float32_128": 912,
        "float32_256": 1636,
        "float32_512": 4600,
        "tf32_128": 480,
        "tf32_256": 820,
        "tf32_512": 1724,
        "ragged": 24,
        "bias": 176,
        "mask_soft_cap_sinks": 112,
        "packed": 8,
        "one_query": 36,
        "offsets": 668,  # a band and a shared bias
        "bias_mask_dropout": 364,
        "far_mask": 128,
    },
}


def check(found: list[dict[str, Any]]) -> None:
    """Every call compiled, spills no more than is known, and holds no scores."""
    assert len(found) >= 20
    bad = [call for call in found if not is_good(call)]
    assert not bad, "\n".join(map(str, bad))


def check_tangents(found: list[dict[str, Any]]) -> None:
    """Every call compiled and holds no scores; the plain ones spill no more than is known."""
    assert len(found) >= 14
    bad = [call for call in found if not is_good(call | {"spilled": spilled_by_plain(call)})]
    assert not bad, "\n".join(map(str, bad))


def spilled_by_plain(call: dict[str, Any]) -> int:
    plain = ("causal_32", "causal_64", "causal_128")
    return int(call.get("spilled", 0)) if call["call"] in plain else 0


def is_good(call: dict[str, Any]) -> bool:
    if "error" in call or not call["kernels"]:
        return False
    known = KNOWN_SPILLS.get((call["device"], call["algorithm"], call["direction"]), {})
    # Parts of the output, where keys are split; scores would be tens of times the operands.
    is_linear = call["temporary"] <= 4 * call["operands"]
    return is_linear and call["spilled"] <= known.get(call["call"], 0)


@pytest.mark.parametrize("device", ["a100", "b200", "h200", "l4"])
def test_every_row_of_the_tables_compiles(device: str) -> None:
    check(printed(VERSIONS[0], HERE / "compile_calls.py", device, "widths"))


@pytest.mark.parametrize("device", ["a100", "b200", "h200", "l4"])
def test_every_row_of_the_tables_of_tangents_compiles(device: str) -> None:
    check_tangents(printed(VERSIONS[0], HERE / "compile_tangents.py", device, "widths"))


@pytest.mark.parametrize(("device", "version"), [("a100", VERSIONS[-1]), ("h200", VERSIONS[0])])
def test_every_feature_of_tangents_compiles(device: str, version: str) -> None:
    check_tangents(printed(version, HERE / "compile_tangents.py", device, "features"))


@pytest.mark.parametrize(("device", "version"), [("a100", VERSIONS[0]), ("h200", VERSIONS[-1])])
def test_every_feature_compiles(device: str, version: str) -> None:
    check(printed(version, HERE / "compile_calls.py", device, "features"))


def test_a_spill_would_be_seen() -> None:
    (found,) = printed(VERSIONS[0], HERE / "compile_spill.py")
    assert found["spilled"] > 100


@pytest.mark.parametrize("version", VERSIONS)
def test_sharded_over_rows_and_heads_nothing_is_gathered(version: str) -> None:
    found = printed(version, HERE / "compile_sharded.py")
    assert {(call["algorithm"], call["by"]) for call in found} == {
        (algorithm, by) for algorithm in ("flash", "chunked") for by in ("partitioner", "shard_map")
    }
    assert all(call["kernels"] and not call["gathers"] for call in found), found
