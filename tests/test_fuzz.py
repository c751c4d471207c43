"""Random calls, all arguments mixed, against float64; a failure prints the call."""

from __future__ import annotations

import zlib
from dataclasses import replace
from itertools import product

import hypothesis
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from tests.backends import CHUNKED, DEFAULT, EAGER, TALL_CHUNKS, Backend
from tests.cases import Case
from tests.test_semantics import (
    check_dtypes_and_shapes,
    check_errors,
    check_what_sees_nothing_is_zero,
)

thorough = pytest.mark.thorough
SIZES = st.sampled_from([1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 40])
FORMS = st.sampled_from(["".join(axes) for axes in product("B1", "N1", "T1", "S1")])


def maybe(strategy: st.SearchStrategy, often: int = 3) -> st.SearchStrategy:
    """None, or one time in `often` something."""
    return st.integers(1, often).flatmap(lambda n: strategy if n == often else st.none())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    queries, keys = draw(SIZES), draw(SIZES)

    def lengths(size: int) -> tuple[int, ...] | None:
        one = st.one_of(st.sampled_from([0, 1, size, size + 3]), st.integers(0, size))
        return draw(maybe(st.tuples(*[one] * batch)))

    side = st.integers(0, max(queries, keys))
    case = Case(
        "fuzz",
        batch=batch,
        queries=queries,
        keys=keys,
        heads=kv_heads * draw(st.integers(1, 3)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([1, 4, 8, 9])),
        value_dim=draw(maybe(st.sampled_from([1, 5, 8]))),
        dtype=draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"])),
        causal=draw(st.booleans()),
        alignment=draw(st.sampled_from(["top_left", "bottom_right"])),
        window=draw(maybe(st.one_of(side, st.tuples(side, side)))),
        query_lengths=lengths(queries),
        key_lengths=lengths(keys),
        segments=draw(maybe(st.sampled_from(["sorted", "unsorted"]))),
        mask=draw(maybe(FORMS)),
        mask_density=draw(st.sampled_from([0.05, 0.5, 0.95])),
        bias=draw(maybe(FORMS, often=2)),
        bias_dtype=draw(maybe(st.sampled_from(["float32", "bfloat16"]))),
        soft_cap=draw(maybe(st.sampled_from([0.5, 3.0, 30.0]))),
        sinks=draw(maybe(st.just(True))) is True,
        dropout=draw(maybe(st.sampled_from([0.1, 0.5, 0.9]))) or 0.0,
        shared_dropout=draw(st.booleans()),
        scale=draw(maybe(st.sampled_from([0.01, -0.5, 1.0]))),
    )
    if case.alignment == "top_left":
        one = st.integers(-queries, keys)
        case = replace(case, offset=draw(st.one_of(st.none(), one, st.tuples(*[one] * batch))))
    return replace(case, name=f"fuzz-{zlib.crc32(repr(case).encode()):08x}")


@settings(max_examples=6)
@given(
    case=cases(),
    seed=st.integers(0, 2**16),
    backend=st.sampled_from([CHUNKED, TALL_CHUNKS, DEFAULT]),
)
def check(case: Case, seed: int, backend: Backend) -> None:
    note(f"{backend} {case!r} seed {seed}")
    for each in (EAGER, backend):
        check_dtypes_and_shapes(each, case, seed)
        check_errors(each, case, seed)
        check_what_sees_nothing_is_zero(each, case, seed)


@pytest.mark.parametrize("part", [0, *(pytest.param(n, marks=thorough) for n in range(1, 4))])
def test_random_calls_are_exact_within_rounding(part: int) -> None:
    fixed = settings.default is not None and settings.default.derandomize
    (hypothesis.seed(part)(check) if fixed else check)()
