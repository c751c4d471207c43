"""Random calls of the Hopper kernels, all features mixed; a failure prints the call.

`--fuzz N` says how many run on a GPU, `--seed` which.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pallas_kernels.hopper import limits
from tests.cases import Case
from tests.hopper.calls import spec_of
from tests.hopper.exact import FLASH, INTERPRETED, check, hopper

__all__ = ["hopper"]

INTERPRETED_NUMBERS = range(4)


def random_case(seed: int, number: int, most: int = 700) -> Case:
    """A call with up to `most` queries and keys."""
    rng = np.random.default_rng([seed, number])

    def chance(one_in: int) -> bool:
        return rng.integers(one_in) == 0

    def size(most: int) -> int:
        """Small, of any size, or at the edge of a tile."""
        edges = [x + off for x in (64, 128, 192, 256, 384, 640) for off in (-1, 0, 1)]
        draws = [rng.integers(1, 9), *rng.integers(1, most + 1, 3), rng.choice(edges)]
        return int(min(rng.choice(draws), most))

    def lengths(size: int) -> tuple[int, ...]:
        draws = [0, 1, size, size + 3, *rng.integers(0, size + 1, 4)]
        return tuple(map(int, rng.choice(draws, batch)))

    def window() -> Any:
        left, right = (int(rng.integers(0, max(queries, keys))) for _ in range(2))
        return [left, (left, right), (left, 0), (left // 8, right // 8)][rng.integers(4)]

    def offset() -> Any:
        each = rng.integers(-queries, keys + 1, batch)
        return [int(each[0]), tuple(map(int, each))][rng.integers(2)]

    batch, kv_heads = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    queries, keys = size(most), size(most)
    keys = queries if chance(3) else keys
    case = Case(
        f"fuzz-{seed}-{number}",
        batch=batch,
        queries=queries,
        keys=keys,
        heads=kv_heads * int(rng.choice([1, 1, 2, 3, 4, 8])),
        kv_heads=kv_heads,
        head_dim=8 * int(rng.choice([8, 16, *rng.integers(1, 33, 4)])),
        value_dim=8 * int(rng.integers(1, 33)) if chance(3) else None,
        dtype=str(rng.choice(["bfloat16", "float16"])),
        causal=chance(2),
        alignment=str(rng.choice(["top_left", "bottom_right"])),
        window=window() if chance(3) else None,
        query_lengths=lengths(queries) if chance(4) else None,
        key_lengths=lengths(keys) if chance(3) else None,
        segments=str(rng.choice(["sorted", "unsorted"])) if chance(4) else None,
        soft_cap=float(rng.choice([0.5, 3.0, 30.0])) if chance(4) else None,
        sinks=chance(4),
        scale=float(rng.choice([0.01, -0.3, 0.5])) if chance(4) else None,
    )
    return replace(case, offset=offset()) if case.alignment == "top_left" and chance(2) else case


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "number" in metafunc.fixturenames:
        metafunc.parametrize("number", range(metafunc.config.getoption("fuzz")))


def test_the_kernels_do_every_random_call_and_every_feature_is_drawn() -> None:
    cases = [random_case(0, number) for number in range(60)]
    assert all(limits.refusals(spec_of(case)) == [] for case in cases)
    for feature in (
        "causal",
        "window",
        "query_lengths",
        "key_lengths",
        "segments",
        "soft_cap",
        "offset",
    ):
        assert 5 < sum(bool(getattr(case, feature)) for case in cases) < 55, feature
    assert {case.alignment for case in cases} == {"top_left", "bottom_right"}
    assert any(case.value_dim not in (None, case.head_dim) for case in cases)


@pytest.mark.thorough
@pytest.mark.parametrize("fixed", INTERPRETED_NUMBERS)
def test_interpreted_random_calls_are_as_exact(fixed: int, seed: int) -> None:
    case = random_case(seed, fixed, most=150)
    print(case)
    check(INTERPRETED, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_random_calls_are_as_exact(number: int, seed: int) -> None:
    case = random_case(seed, number)
    print(case)
    check(FLASH, case, seed)
