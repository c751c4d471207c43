"""Block ranges against brute force over the boolean mask: nothing visible is skipped."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jattn.call.band import Band
from jattn.call.masking import KeyIntervals
from pallas_kernels import blocks
from tests.reference import Bools

OFFSETS = st.one_of(st.none(), st.integers(-45, 45))


@st.composite
def calls(draw: st.DrawFn) -> tuple[KeyIntervals, Bools, int, int]:
    """Intervals, the mask they stand for, and the two block sizes."""
    queries, keys = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    band = Band(draw(OFFSETS), draw(OFFSETS))
    query_length = draw(st.one_of(st.just(queries), st.integers(-2, queries)))
    key_length = draw(st.one_of(st.just(keys), st.integers(-2, keys)))
    i, k = np.arange(queries)[:, None], np.arange(keys)[None, :]
    seen = (i < query_length) & (k < key_length)
    if band.lower is not None:
        seen = seen & (k >= i + band.lower)
    if band.upper is not None:
        seen = seen & (k <= i + band.upper)
    intervals = KeyIntervals(band, query_length, key_length)
    return intervals, seen, draw(st.integers(1, 12)), draw(st.integers(1, 12))


def span(indices: Bools) -> set[int]:
    """From the first to the last index set, as a set."""
    where = np.flatnonzero(indices)
    return set(range(where[0], where[-1] + 1)) if where.size else set()


def by_block(seen: Bools, block: int, reduce: Callable[[Bools], np.bool_]) -> Bools:
    """`reduce` over each block of columns; columns past the end are hidden."""
    count = -(-seen.shape[1] // block)
    padded = np.pad(seen, ((0, 0), (0, count * block - seen.shape[1])))
    return np.array([reduce(padded[:, j * block : (j + 1) * block]) for j in range(count)])


def members(found: blocks.Range) -> set[int]:
    first, stop = (int(x) for x in found)
    return set(range(first, stop))


@settings(max_examples=100)
@given(calls())
def test_a_query_block_visits_every_key_block_it_sees(call: tuple) -> None:
    intervals, seen, q_block, k_block = call
    for start in range(0, len(seen), q_block):
        stop = min(start + q_block, len(seen))
        visited = members(blocks.key_blocks(intervals, start, stop, k_block))
        needed = by_block(seen[start:stop], k_block, np.any)
        assert visited >= set(np.flatnonzero(needed))
        assert not visited or visited <= set(range(len(needed))), "a block past the last key"


@settings(max_examples=100)
@given(calls())
def test_a_key_block_visits_every_query_block_that_sees_it(call: tuple) -> None:
    intervals, seen, q_block, k_block = call
    for start in range(0, seen.shape[1], k_block):
        stop = min(start + k_block, seen.shape[1])
        visited = members(blocks.query_blocks(intervals, start, stop, q_block))
        needed = by_block(seen[:, start:stop].T, q_block, np.any)
        assert visited >= set(np.flatnonzero(needed))
        assert not visited or visited <= set(range(len(needed))), "a block past the last query"


@settings(max_examples=100)
@given(calls())
def test_blocks_without_element_mask_are_wholly_visible(call: tuple) -> None:
    intervals, seen, q_block, k_block = call
    for start in range(0, len(seen), q_block):
        stop = min(start + q_block, len(seen))
        found = members(blocks.unmasked_key_blocks(intervals, start, stop, k_block))
        assert found <= set(np.flatnonzero(by_block(seen[start:stop], k_block, np.all)))
    for start in range(0, seen.shape[1], k_block):
        stop = min(start + k_block, seen.shape[1])
        found = members(blocks.unmasked_query_blocks(intervals, start, stop, q_block))
        assert found <= set(np.flatnonzero(by_block(seen[:, start:stop].T, q_block, np.all)))


@settings(max_examples=100)
@given(calls())
def test_no_block_is_visited_or_masked_for_nothing(call: tuple) -> None:
    intervals, seen, q_block, k_block = call
    for start in range(0, len(seen), q_block):
        rows = seen[start : start + q_block]
        if not rows.any(axis=1).all():
            continue
        stop = start + len(rows)
        assert members(blocks.key_blocks(intervals, start, stop, k_block)) == span(
            by_block(rows, k_block, np.any)
        )
        assert members(blocks.unmasked_key_blocks(intervals, start, stop, k_block)) == span(
            by_block(rows, k_block, np.all)
        )
    for start in range(0, seen.shape[1], k_block):
        columns = seen[:, start : start + k_block].T
        if not columns.any(axis=1).all():
            continue
        stop = start + len(columns)
        assert members(blocks.query_blocks(intervals, start, stop, q_block)) == span(
            by_block(columns, q_block, np.any)
        )
        assert members(blocks.unmasked_query_blocks(intervals, start, stop, q_block)) == span(
            by_block(columns, q_block, np.all)
        )


def test_a_causal_triangle_visits_half_the_blocks() -> None:
    intervals = KeyIntervals(Band(upper=0), 64, 64)
    visited = [members(blocks.key_blocks(intervals, i, i + 8, 8)) for i in range(0, 64, 8)]
    unmasked = [
        members(blocks.unmasked_key_blocks(intervals, i, i + 8, 8)) for i in range(0, 64, 8)
    ]
    assert [len(x) for x in visited] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [len(x) for x in unmasked] == [0, 1, 2, 3, 4, 5, 6, 7]


@settings(max_examples=20)
@given(calls())
def test_traced_lengths_give_the_same_ranges(call: tuple) -> None:
    intervals, seen, q_block, k_block = call
    query_length, key_length = intervals.query_length, intervals.key_length
    arrays = KeyIntervals(
        intervals.band, jnp.array([query_length, 0]), jnp.array([key_length, seen.shape[1]])
    )
    for function, stop, block in (
        (blocks.key_blocks, len(seen), k_block),
        (blocks.unmasked_key_blocks, len(seen), k_block),
        (blocks.query_blocks, seen.shape[1], q_block),
        (blocks.unmasked_query_blocks, seen.shape[1], q_block),
    ):
        first, last = (np.broadcast_to(x, 2) for x in function(arrays, 0, stop, block))
        assert members((first[0], last[0])) == members(function(intervals, 0, stop, block))


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_first_run_ends_before_the_first_that_is_not_of_it(size: int) -> None:
    flags = np.array(list(itertools.product([False, True], repeat=size)))
    first, stop = blocks.first_run(jnp.asarray(flags)[None])
    for row, found in zip(flags, zip(first[0], stop[0], strict=True), strict=True):
        runs = [(a, b) for a in range(size) for b in range(a + 1, size + 1) if row[a:b].all()]
        earliest = min((a for a, _ in runs), default=0)
        assert found == (earliest, max((b for a, b in runs if a == earliest), default=0))
