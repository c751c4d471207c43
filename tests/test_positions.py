"""Queries that come one at a time or in chunks see what they would in one pass, on every backend.

The kernels' halves are in tests/portable/test_positions.py and tests/hopper/test_positions.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jattn
from jattn.call.arguments import attention_call
from jattn.call.band import Band
from tests import formula, tolerance
from tests.backends import CHUNKED, EAGER, Backend, Results, quick_jit
from tests.cases import Case, operands
from tests.test_semantics import check_found

ONE_PASS = [
    Case("pass_causal", queries=24, keys=24, causal=True, sinks=True),
    Case("pass_window_segments", queries=24, keys=24, window=(7, 2), segments="sorted"),
    Case("pass_window_lengths", 2, 24, 24, 4, 1, causal=True, window=9, key_lengths=(24, 15)),
]
BOTH = [EAGER, CHUNKED]


def of_rows(case: Case, seed: int) -> tuple[Results, dict[str, Any]]:
    """What a pass has for each query, and the other arguments of its call."""
    drawn = operands(case, seed)
    options, rows = dict(drawn.options), {"query": jnp.asarray(drawn["q"])}
    if case.segments:
        rows["query_segment_ids"] = options.pop("query_segment_ids")
    if case.sinks:
        options["sinks"] = jnp.asarray(drawn["sinks"])
    options |= {"is_causal": case.causal, "return_residual": True}
    del options["query_offset"]
    return rows, options


def in_chunks(x: jax.Array, size: int) -> jax.Array:
    """(B, T, ...) as (chunks, B, size, ...)."""
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def joined(x: jax.Array) -> jax.Array:
    """And back."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def decoded(backend: Backend, case: Case, seed: int, size: int) -> Results:
    """Output and log-sum-exp of `size` queries at a time, by a scan that fills a cache."""
    drawn = operands(case, seed)
    rows, options = of_rows(case, seed)
    ahead = case.window is not None and not case.causal  # keys that come later are seen

    def step(cache: Any, now: Any) -> Any:
        offset, rows, new = now
        cache = [
            lax.dynamic_update_slice_in_dim(old, x, offset, 1)
            for old, x in zip(cache, new, strict=True)
        ]
        return cache, backend(**rows, key=cache[0], value=cache[1], query_offset=offset, **options)

    @quick_jit
    def run(rows: Any, keys: Any) -> Any:
        cache = keys if ahead else jax.tree.map(jnp.zeros_like, keys)
        chunks = partial(in_chunks, size=size)
        offsets = jnp.arange(0, case.queries, size)
        xs = (offsets, jax.tree.map(chunks, rows), jax.tree.map(chunks, keys))
        return jax.tree.map(joined, lax.scan(step, cache, xs)[1])

    out, lse = run(rows, [jnp.asarray(drawn[name]) for name in "kv"])
    return {"out": out, "lse": lse}


def mapped(backend: Backend, case: Case, seed: int, size: int) -> Results:
    """Output, log-sum-exp and gradients, by a vmap over chunks of queries and their offsets."""
    drawn = operands(case, seed)
    rows, options = of_rows(case, seed)
    del rows["query"]

    @quick_jit
    def run(arrays: Results, cotangents: Any) -> Results:
        def attend(arrays: Results) -> Any:
            own = jax.tree.map(partial(in_chunks, size=size), rows | {"query": arrays["q"]})
            call = partial(backend, key=arrays["k"], value=arrays["v"], **options)
            if case.sinks:
                call = partial(call, sinks=arrays["sinks"])
            each = jax.vmap(lambda own, offset: call(**own, query_offset=offset))
            return jax.tree.map(joined, each(own, jnp.arange(0, case.queries, size)))

        (out, lse), vjp = jax.vjp(attend, arrays)
        return {"out": out, "lse": lse, **vjp(cotangents)[0]}

    return run(drawn.differentiable, (jnp.asarray(drawn["dout"]), jnp.asarray(drawn["dlse"])))


@pytest.mark.parametrize("backend", BOTH, ids=str)
@pytest.mark.parametrize("case", ONE_PASS, ids=str)
def test_one_query_at_a_time_is_one_pass(backend: Backend, case: Case, seed: int) -> None:
    check_found(decoded(backend, case, seed, 1), backend, case, seed)


@pytest.mark.parametrize("backend", BOTH, ids=str)
def test_chunks_mapped_with_their_offsets_have_the_gradients_of_one_pass(
    backend: Backend, seed: int
) -> None:
    check_found(mapped(backend, ONE_PASS[0], seed, 6), backend, ONE_PASS[0], seed)


def test_chunks_share_one_compiled_function() -> None:
    case = Case("prefill", queries=24, keys=24, causal=True)
    q, k, v = (jnp.asarray(operands(case, 0)[name]) for name in "qkv")
    traced = []

    @jax.jit
    def attend(chunk: jax.Array, offset: jax.Array) -> Any:
        traced.append(offset)
        return CHUNKED(chunk, k, v, is_causal=True, query_offset=offset)

    chunks = [attend(q[:, i : i + 8], i) for i in (0, 8, 16)]
    assert len(traced) == 1
    found = {"out": jnp.concatenate(chunks, axis=1)}
    formula.check(found, lambda of, *qkv: {"out": of(*qkv, is_causal=True)}, q, k, v)


def counted(keys: int) -> jax.Array:
    """Values that name their key."""
    return jnp.eye(keys)[None, :, None, :]


@pytest.mark.parametrize("backend", BOTH, ids=str)
def test_bottom_right_counts_from_the_end_of_the_lengths(backend: Backend) -> None:
    q, k = jnp.zeros((2, 3, 1, 4)), jnp.zeros((2, 16, 1, 4))
    out = backend(
        q,
        k,
        jnp.tile(counted(16), (2, 1, 1, 1)),
        is_causal=True,
        causal_alignment="bottom_right",
        query_seq_lengths=jnp.array([3, 2]),
        key_value_seq_lengths=jnp.array([8, 99]),
    )
    seen = (np.asarray(out) > 0).sum(axis=(2, 3))
    np.testing.assert_array_equal(seen, [[6, 7, 8], [15, 16, 0]])


@pytest.mark.parametrize("backend", BOTH, ids=str)
def test_a_query_before_the_first_key_sees_none(backend: Backend) -> None:
    q, k = jnp.ones((1, 5, 1, 4)), jnp.ones((1, 6, 1, 4))
    for offset in (-3, jnp.array(-3), jnp.array([-3])):
        out, lse = backend(
            q, k, counted(6), is_causal=True, query_offset=offset, return_residual=True
        )
        np.testing.assert_array_equal((np.asarray(out) > 0).sum(axis=-1)[0, :, 0], [0, 0, 0, 1, 2])
        assert (np.asarray(lse)[0, :3] == -np.inf).all()


def test_an_offset_known_when_traced_costs_nothing() -> None:
    q, k = jnp.zeros((1, 8, 2, 4)), jnp.zeros((1, 24, 2, 4))
    of = partial(attention_call, q, k, k, is_causal=True)
    aligned = of(causal_alignment="bottom_right")
    for known in (16, np.int64(16), np.array(16)):
        call = of(query_offset=known)
        assert call.spec == aligned.spec
        assert call.operands.query_offset is None
    assert of(query_offset=23).spec.band == Band()
    assert attention_call(q, k, k, query_offset=jnp.array(3)).operands.query_offset is None


def test_the_offset_of_a_row_is_its_own() -> None:
    q, k = jnp.zeros((3, 1, 1, 4)), jnp.zeros((3, 9, 1, 4))
    offsets = jnp.array([0, 4, 8])
    for dtype in ("int8", "uint32", "int32"):
        own = offsets.astype(dtype)
        _, lse = CHUNKED(q, k, k, is_causal=True, query_offset=own, return_residual=True)
        np.testing.assert_allclose(np.exp(lse)[:, 0, 0], [1, 5, 9], rtol=tolerance.of_sums(9, 1.0))


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (1.5, TypeError, "query_offset must be integers, got float"),
        (True, TypeError, "query_offset must be integers, got bool"),
        (jnp.zeros(3, jnp.int32), ValueError, r"shape \(\) or \(B,\) = \(2,\), got \(3,\)"),
        (jnp.zeros((2, 1), jnp.int32), ValueError, r"got \(2, 1\)"),
    ],
)
def test_what_is_no_offset_is_refused(given: Any, error: type[Exception], words: str) -> None:
    x = jnp.zeros((2, 4, 1, 4))
    with pytest.raises(error, match=words):
        jattn.eager_attention(x, x, x, is_causal=True, query_offset=given)


def test_two_ways_to_say_where_queries_stand_are_refused() -> None:
    x = jnp.zeros((2, 4, 1, 4))
    with pytest.raises(ValueError, match=r"give one of them.*got query_offset 3"):
        jattn.eager_attention(x, x, x, query_offset=3, causal_alignment="bottom_right")


@pytest.mark.parametrize(
    ("options", "warns"),
    [
        ({"is_causal": True}, True),
        ({"local_window_size": (3, 0)}, True),
        ({}, False),
        ({"is_causal": True, "causal_alignment": "bottom_right"}, False),
        ({"is_causal": True, "query_offset": 0}, False),
        ({"is_causal": True, "query_offset": jax.ShapeDtypeStruct((), jnp.int32)}, False),
    ],
)
def test_explain_warns_where_queries_may_stand_elsewhere(options: Any, warns: bool) -> None:
    q, k = (jax.ShapeDtypeStruct((1, n, 2, 8), jnp.float32) for n in (4, 64))
    found = jattn.explain(q, k, k, **options)
    assert any("query_offset" in hint and "T 4 and S 64" in hint for hint in found.hints) == warns
    assert not any("query_offset" in hint for hint in jattn.explain(k, k, k, **options).hints)
