"""The key/value cache: what queries find in it is attention over all tokens so far, in any chunks.

Against the formula in float64; eager's error in the same dtype is the measure.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from models.cache import KVCache
from models.decoder.attention import AttentionCall
from tests.backends import quick_jit
from tests.cases import thorough

B, T, N, K, H = 3, 21, 4, 2, 8
WINDOWS = (None, 1, 5, 8, 40)
PADDING = np.array([0, 4, 13])  # to the left of each row
CONFIG: Any = SimpleNamespace(
    layers=[SimpleNamespace(window=window) for window in WINDOWS], num_key_value_heads=K, head_dim=H
)
CAP = 3.0
CALLS = [AttentionCall(window, 0.4, CAP, "eager") for window in WINDOWS]
_rng = np.random.default_rng(0)
Q, KEY, VALUE = (
    jnp.asarray(_rng.standard_normal((len(WINDOWS), B, T, heads, H)), jnp.float32)
    for heads in (N, K, K)
)
MASK = np.arange(T)[None] >= PADDING[:, None]


def formula(dtype: Any, window: int | None, layer: int, capacity: int = T + 1) -> np.ndarray:
    """(B, T, N, H), each row of its own tokens alone; 0 where there is padding."""
    out = np.zeros((B, T, N, H), dtype)
    for row, start in enumerate(PADDING):
        q, k, v = (np.asarray(x[layer, row, start:], dtype) for x in (Q, KEY, VALUE))
        k, v = (np.repeat(x, N // K, axis=1) for x in (k, v))
        i, j = np.mgrid[: len(q), : len(q)]
        seen = (j <= i) & (j > i - (window or T))
        logits = np.einsum("qnh,knh->nqk", q, k) * dtype(0.4)
        logits = np.where(seen[None], dtype(CAP) * np.tanh(logits / dtype(CAP)), -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out[row, start:] = np.einsum("nqk,knh->qnh", weights, v)
    return out


def step(cache: KVCache, q: Any, k: Any, v: Any, mask: Any) -> Any:
    """All layers of one call."""
    step = cache.begin(q.shape[2], mask)
    outs = []
    for layer, call in enumerate(CALLS):
        out, step = step.attend(layer, q[layer], k[layer], v[layer], call)
        outs.append(out)
    return jnp.stack(outs), step.positions, step.end()


compiled = quick_jit(step)


def in_chunks(sizes: list[int], capacity: int = T + 1) -> tuple[np.ndarray, np.ndarray, KVCache]:
    cache = KVCache.empty(CONFIG, batch=B, capacity=capacity)
    outs, positions, start = [], [], 0
    for size in sizes:
        of = slice(start, start + size)
        # What stands in the padding must be no matter.
        k, v = (x[:, :, of] + 1e4 * ~MASK[None, :, of, None, None] for x in (KEY, VALUE))
        out, position, cache = compiled(cache, Q[:, :, of], k, v, jnp.asarray(MASK[:, of]))
        outs.append(out)
        positions.append(position)
        start += size
    return np.concatenate(outs, 2), np.concatenate(positions, 1), cache


@pytest.mark.parametrize("size", [1, 7, *thorough((3,), (T,))])
def test_chunks_of_any_size_find_what_the_formula_does(size: int) -> None:
    check([size] * (T // size))


def check(sizes: list[int]) -> None:
    out, positions, cache = in_chunks(sizes)
    np.testing.assert_array_equal(cache.lengths, T - PADDING)
    np.testing.assert_array_equal(positions, np.maximum(np.arange(T)[None] - PADDING[:, None], 0))
    for layer, window in enumerate(WINDOWS):
        assert_exact(out[layer], layer, window, MASK)


def assert_exact(out: np.ndarray, layer: int, window: int | None, real: np.ndarray) -> None:
    exact, eager = (formula(dtype, window, layer) for dtype in (np.float64, np.float32))
    bound = 2 * np.abs(eager - exact).max() + 4 * np.finfo(np.float32).eps
    assert np.abs(out - exact)[real].max() <= bound, window


def test_prefill_then_single_tokens_go_on_where_it_ended() -> None:
    check([7, 7, 1, 1, 1, 1, 1, 1, 1])


def test_layers_with_windows_keep_no_more_than_they_see() -> None:
    cache = KVCache.empty(CONFIG, batch=B, capacity=T, dtype=jnp.bfloat16)
    slots = [T if window is None else min(window, T) for window in WINDOWS]
    assert [layer.keys.shape for layer in cache.layers] == [(B, n, K, H) for n in slots]
    assert {x.dtype for layer in cache.layers for x in layer} == {jnp.dtype(jnp.bfloat16)}


def test_a_query_past_the_capacity_is_nan_and_those_before_are_not() -> None:
    out, _, _ = in_chunks([7, 7, 7], capacity=9)
    position = np.arange(T)[None] - PADDING[:, None]
    for layer, window in enumerate(WINDOWS):
        full = window is None or window >= 9
        fits = MASK & (position < 9)
        assert np.isnan(out[layer][MASK & (position >= 9)]).all() == full
        assert_exact(out[layer], layer, window, fits)


def test_what_does_not_fit_the_cache_is_said() -> None:
    cache = KVCache.empty(CONFIG, batch=2, capacity=9)
    with pytest.raises(ValueError, match=r"keys of \(batch, heads, head dim\) \(2, 2, 8\)"):
        step(cache, Q, KEY, VALUE, None)
    with pytest.raises(ValueError, match="at least 1"):
        KVCache.empty(CONFIG, batch=2, capacity=0)


@pytest.mark.parametrize("window", [None, 4096])
def test_a_decoding_step_takes_the_kernel_that_splits_keys(window: int | None) -> None:
    """On an H100, of 32 query heads over 8 of 64: one row of 32,768 tokens fills it."""
    layers = [SimpleNamespace(window=window)]
    config: Any = SimpleNamespace(layers=layers, num_key_value_heads=8, head_dim=64)
    empty = jax.eval_shape(
        lambda: KVCache.empty(config, batch=1, capacity=32768, dtype=jnp.bfloat16)
    )
    calls: list[dict[str, Any]] = []

    def record(query: Any, key: Any, value: Any, **options: Any) -> Any:
        calls.append(dict(options, query=query, key=key, value=value))
        return query

    def one_token(cache: KVCache, q: Any, k: Any) -> Any:
        return cache.begin(1).attend(0, q, k, k, AttentionCall(window, 0.125, None, None))[0]

    q, k = (jax.ShapeDtypeStruct((1, 1, heads, 64), jnp.bfloat16) for heads in (32, 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("models.cache.dot_product_attention", record)
        jax.eval_shape(one_token, empty, q, k)
    (call,) = calls
    shapes = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype) if hasattr(x, "shape") else x
        for name, x in call.items()
    }
    assert shapes["key"].shape == (1, window or 32768, 8, 64)
    for device, kernel in (("H100", "Pallas Mosaic GPU, Hopper"), ("A100", "Pallas, portable")):
        found = jattn.explain(**shapes, device=device)
        assert found.chosen == "flash"
        assert re.fullmatch(kernel + r", keys in \d+ parts, joined by a kernel", str(found.kernel))
