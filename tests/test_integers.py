"""No integer that a call takes wraps: bounds, offsets and lengths of any size and dtype."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jattn
from jattn.call import positions
from jattn.call.arguments import AttentionCall, attention_call
from jattn.call.band import Band
from jattn.call.masking import KeyIntervals, visible
from pallas_kernels import blocks
from tests import reference

BATCH = 3
FAR = (2**24, 2**29, 2**30, 2**31 - 2, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**64)
INT32 = np.iinfo(np.int32)


def call(queries: int, keys: int, **options: Any) -> AttentionCall:
    """A call with arrays that hold nothing."""
    q, k = (jnp.zeros((BATCH, n, 1, 1)) for n in (queries, keys))
    return attention_call(q, k, k, **options)


def sides(near: int, far: int) -> st.SearchStrategy[int | None]:
    return st.one_of(
        st.none(), st.integers(0, near), st.integers(-15, 15).map(lambda d: max(far + d, 0))
    )


def offsets(near: int, far: int) -> st.SearchStrategy[int]:
    """Also those at which a window as far hides some keys."""
    edges = (st.integers(-15, 15).map(lambda d, sign=sign: sign * far + d) for sign in (-1, 1))
    return st.one_of(st.integers(-near, near), *edges)


@settings(max_examples=80)
@given(data=st.data())
def test_any_window_and_any_offset_hide_what_they_should(data: st.DataObject) -> None:
    queries, keys = data.draw(st.sampled_from([(5, 7), (9, 4), (1, 8)]))
    far = data.draw(st.sampled_from(FAR))
    window = data.draw(sides(12, far)), data.draw(sides(12, far))
    causal = data.draw(st.booleans())
    drawn = data.draw(st.tuples(*[offsets(25, far)] * BATCH))
    as_int32 = tuple(int(np.clip(n, INT32.min, INT32.max)) for n in drawn)
    for offset, own in ((drawn[0], drawn[0]), (jnp.array(as_int32, jnp.int32), as_int32)):
        made = call(queries, keys, is_causal=causal, local_window_size=window, query_offset=offset)
        seen = reference.visible(BATCH, queries, keys, causal=causal, window=window, offset=own)
        found = np.broadcast_to(visible(made.spec, made.operands), seen.shape)
        np.testing.assert_array_equal(found, seen)


BLOCKS = {
    blocks.key_blocks: "queries",
    blocks.unmasked_key_blocks: "queries",
    blocks.query_blocks: "keys",
    blocks.unmasked_query_blocks: "keys",
}


def members(found: blocks.Range) -> tuple[int, int] | None:
    first, stop = (int(x) for x in found)
    return (first, stop) if stop > first else None


@settings(max_examples=60)
@given(data=st.data())
def test_blocks_of_long_sequences_are_those_of_endless_integers(data: st.DataObject) -> None:
    """In int32 as in Python's integers, which do not wrap."""
    sizes = {
        name: data.draw(st.sampled_from([2**24, 2**28 - 128, 2**28]))
        for name in ("queries", "keys")
    }
    far = data.draw(st.sampled_from(FAR))
    window = data.draw(sides(2**28, far)), data.draw(sides(2**28, far))
    offset = int(np.clip(data.draw(offsets(2**28, far)), INT32.min, INT32.max))
    endless = KeyIntervals(
        Band.of(is_causal=False, window=window, diagonal=offset), sizes["queries"], sizes["keys"]
    )
    start = {
        name: data.draw(st.sampled_from([0, size // 3, size - 128])) for name, size in sizes.items()
    }
    for one in (offset, jnp.array(offset, jnp.int32)):
        band, array = positions.band_and_offset(is_causal=False, window=window, offset=one, **sizes)
        intervals = replace(endless, band=band, offset=0 if array is None else array)
        for function, of in BLOCKS.items():
            places = start[of], start[of] + 128
            found = function(intervals, *(jnp.int32(x) for x in places), 128)
            assert members(found) == members(function(endless, *places, 128)), function


def test_a_window_wider_than_any_int_is_none() -> None:
    assert call(5, 9, local_window_size=(sys.maxsize, 2**80)).spec == call(5, 9).spec
    assert call(5, 9, local_window_size=(None, 2**31 - 1)).spec == call(5, 9).spec


@pytest.mark.parametrize("name", ["query_seq_lengths", "key_value_seq_lengths"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64", "uint64"])
def test_lengths_of_any_dtype_are_cut_to_the_arrays(name: str, dtype: str) -> None:
    most = np.iinfo(dtype).max
    made = call(300, 300, **{name: np.array([0, 7, most], dtype)})
    found = made.operands.query_lengths if "query" in name else made.operands.key_lengths
    np.testing.assert_array_equal(found, [0, 7, min(most, 300)])


@pytest.mark.parametrize("name", ["query_seq_lengths", "key_value_seq_lengths"])
def test_negative_lengths_are_refused_where_they_are_known_else_zero(name: str) -> None:
    x = jnp.ones((2, 5, 1, 4))
    for lengths in ([5, -3], np.array([5, -3]), jnp.array([5, -3])):
        with pytest.raises(ValueError, match=rf"{name} must not be negative, got -3 in \[5, -3\]"):
            jattn.eager_attention(x, x, x, **{name: lengths})
    attend = jax.jit(lambda n: jattn.memory_efficient_attention(x, x, x, **{name: n}))
    np.testing.assert_array_equal(attend(jnp.array([5, -3])), attend(jnp.array([5, 0])))
    np.testing.assert_array_equal(attend(jnp.array([5, INT32.min])), attend(jnp.array([5, 0])))


def test_under_x64_no_length_offset_or_id_wraps() -> None:
    with jax.enable_x64(True):
        lengths = jnp.array([2**32 + 3, 2**40, 3])
        made = call(4, 6, key_value_seq_lengths=lengths)
        np.testing.assert_array_equal(made.operands.key_lengths, [6, 6, 3])
        made = call(4, 6, is_causal=True, query_offset=jnp.array([2**32, -(2**33), 1]))
        rows = np.asarray(visible(made.spec, made.operands))[:, 0].sum(axis=-1)
        np.testing.assert_array_equal(rows, [[6] * 4, [0] * 4, [2, 3, 4, 5]])
        assert made.operands.query_offset.dtype == jnp.int32


def test_segment_ids_of_more_than_32_bits_are_refused() -> None:
    ids = np.zeros((BATCH, 4), np.int64)
    wide = ids + 2**32  # equal to `ids` in 32 bits
    with pytest.raises(ValueError, match=r"key_value_segment_ids .* 32 bits, got 4294967296"):
        call(4, 4, query_segment_ids=ids, key_value_segment_ids=wide)
    high = np.full((BATCH, 4), 2**32 - 1, np.uint32)
    made = call(4, 4, query_segment_ids=high, key_value_segment_ids=high - 1)
    assert not np.asarray(visible(made.spec, made.operands)).any()


def test_lengths_whose_sum_leaves_the_positions_are_refused() -> None:
    q, k = (jax.ShapeDtypeStruct((1, n, 1, 8), jnp.float32) for n in (2**30, 2**30))
    with pytest.raises(ValueError, match=r"\(1073741824 \+ 1073741824\) must be at most"):
        jattn.explain(q, k, k, is_causal=True)
    assert jattn.explain(q, k, k).chosen is not None
