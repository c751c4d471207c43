"""`jax.export` with a batch and lengths left free: one artifact for every size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

import jattn
from tests import formula, reference, tolerance
from tests.cases import thorough

N, K, H = 4, 2, 8
CHUNKED = partial(jattn.memory_efficient_attention, query_chunk_size=16, key_chunk_size=24)
BACKENDS: dict[str, Callable[..., Any]] = {
    "chunks": CHUNKED,
    "memory_efficient": jattn.memory_efficient_attention,
    "eager": jattn.eager_attention,
}
# Smaller than a chunk, some chunks and a part of one; T the same as S and not.
SIZES = [(1, 5, 5), (3, 50, 50), (2, 33, 61)]
CAUSAL = {"is_causal": True}
BAND = {"local_window_size": (9, 3), "causal_alignment": "bottom_right"}


def results(attention: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Output and gradients, as a function of the floating arrays and the rest."""

    def function(floats: Any, rest: Any) -> Any:
        def attend(floats: Any) -> Any:
            q, k, v, *bias = floats
            return attention(q, k, v, *bias, **rest, **options)

        out, vjp = jax.vjp(attend, floats)
        return out, vjp(jnp.cos(out))[0]

    return function


@cache
def exported(backend: str, dims: str, options: tuple[tuple[str, Any], ...], full: bool) -> Any:
    """Output and gradients of (q, k, v, bias, lengths, segments) with these dims, "b, t, s"."""
    b, t, s = export.symbolic_shape(dims)

    function = results(BACKENDS[backend], dict(options))
    floats, rest = operands(b, t, s, full, lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype))
    return export.export(jax.jit(function), platforms=("cpu",))(floats, rest)


def operands(
    b: int, t: int, s: int, full: bool, make: Callable[[tuple[int, ...], Any], Any]
) -> Any:
    shapes = [(b, t, N, H), (b, s, K, H), (b, s, K, H)] + ([(1, N, t, s)] if full else [])
    floats = [make(shape, jnp.float32) for shape in shapes]
    integers = {
        "key_value_seq_lengths": (b,),
        "query_segment_ids": (b, t),
        "key_value_segment_ids": (b, s),
    }
    return floats, {name: make(x, jnp.int32) for name, x in integers.items()} if full else {}


def check(backend: str, dims: str, sizes: tuple[int, int, int], options: Any, full: bool) -> None:
    rng = np.random.default_rng(sizes)

    def make(shape: tuple[int, ...], dtype: Any) -> Any:
        if dtype == jnp.float32:
            return rng.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            return rng.integers(1, sizes[2] + 1, shape, dtype=np.int32)
        return np.sort(rng.integers(0, 3, shape, dtype=np.int32), axis=1)

    floats, rest = operands(*sizes, full, make)
    artifact = exported(backend, dims, tuple(options.items()), full)
    seen = reference.visible(
        *sizes,
        causal=options.get("is_causal", False),
        window=options.get("local_window_size"),
        alignment=options.get("causal_alignment", "top_left") if not full else "top_left",
        key_lengths=rest.get("key_value_seq_lengths"),
        query_segments=rest.get("query_segment_ids"),
        key_segments=rest.get("key_value_segment_ids"),
    )
    exact = reference.attention(*floats[:3], seen=seen, bias=floats[3] if full else None)
    want = exact.gradients(np.cos(exact.out), np.zeros_like(exact.lse))
    names = ("q", "k", "v", "bias")[: len(floats)]

    def named(found: Any) -> dict[str, Any]:
        out, gradients = found
        return {"out": out, **dict(zip(names, gradients, strict=True))}

    right = formula.expected(
        lambda of, *x: named(results(of, options)(*x)),
        *(floats, rest),
        exact={"out": exact.out, **{name: want[name] for name in names}},
    )
    formula.compare(named(artifact.call(floats, rest)), right)


@pytest.mark.parametrize("sizes", [SIZES[2], *thorough((SIZES[0],), (SIZES[1],))], ids=str)
def test_free_batch_and_lengths(sizes: tuple[int, int, int]) -> None:
    check("chunks", "b, t, s", sizes, CAUSAL, True)


@pytest.mark.thorough
def test_free_batch_and_lengths_with_a_band_along_the_end() -> None:
    check("chunks", "b, t, s", SIZES[2], BAND, False)


@pytest.mark.thorough
def test_chunks_of_the_usual_sizes() -> None:
    check("memory_efficient", "b, t, s", SIZES[1], CAUSAL, False)


@pytest.mark.parametrize("batch", [4, *thorough((1,))])
def test_free_batch_alone(batch: int) -> None:
    check("memory_efficient", "b, 30, 30", (batch, 30, 30), CAUSAL, True)


def test_eager_too() -> None:
    check("eager", "b, t, s", SIZES[2], CAUSAL, True)


def test_a_written_artifact_is_read_and_called() -> None:
    floats, rest = operands(2, 20, 20, True, lambda shape, dtype: np.ones(shape, dtype))
    written = exported("chunks", "b, t, s", tuple(CAUSAL.items()), True).serialize()
    out, _ = export.deserialize(written).call(floats, rest)
    mean = tolerance.of_sums(20, 1.0)  # of 20 ones, and of their weights
    np.testing.assert_allclose(out, np.ones((2, 20, N, H)), rtol=0, atol=mean)


@pytest.mark.parametrize("kind", [None, "NVIDIA H200", "NVIDIA A100"])
def test_what_runs_is_told_by_shapes_that_are_free(kind: str | None) -> None:
    b, t = export.symbolic_shape("b, t")
    q = jax.ShapeDtypeStruct((b, t, N, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((b, t, K, 64), jnp.bfloat16)
    device = kind and AbstractDevice(device_kind=kind, num_cores=None, platform="cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        told = jattn.explain(q, k, k, is_causal=True)
        with pytest.raises(jattn.UnsupportedAttentionError, match="free" if kind else "needs"):
            jax.eval_shape(partial(jattn.flash_attention, is_causal=True), q, k, k)
    assert told.chosen == "memory_efficient"
    assert told.kernel.startswith("XLA")
    if kind:
        assert "sizes left free (B b, T t, S t)" in str(told)
