"""The dropout mask: a fixed function of key, batch row, head, query and key position."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests.backends import BACKENDS, DEFAULT, Backend, keep_mask, quick_jit
from tests.cases import first
from tests.reference import Bools

SHAPE = dict(batch=3, heads=3, queries=64, keys=96)


def mask_of(function: Any, rng: Any, *, rate: float = 0.5, groups: int = 1) -> Bools:
    """The mask (B, N, T, S) = (2, 4, 12, 20) that a call uses, recovered from its output."""
    q, k = jnp.zeros((2, 12, 4, 1)), jnp.zeros((2, 20, 4 // groups, 1))
    v = jnp.broadcast_to(jnp.eye(20)[None, :, None, :], (2, 20, 4 // groups, 20))
    out = quick_jit(partial(function, q, k, v, dropout_rate=rate))(dropout_rng=rng)
    return np.asarray(out).transpose(0, 2, 1, 3) > 0


@pytest.mark.parametrize("backend", [*BACKENDS, DEFAULT], ids=str)
@pytest.mark.parametrize("groups", first(1, [2, 1, 4]))
def test_the_mask_is_the_same_on_every_backend(backend: Backend, groups: int) -> None:
    found = mask_of(backend, jax.random.key(7), groups=groups)
    np.testing.assert_array_equal(found, keep_mask(0.5, 2, 4, 12, 20))


def test_the_mask_of_a_position_does_not_depend_on_the_sizes() -> None:
    large = keep_mask(0.4, 3, 4, 33, 50)
    np.testing.assert_array_equal(keep_mask(0.4, 2, 2, 16, 24), large[:2, :2, :16, :24])


def test_a_shared_mask_is_one_for_all_batch_rows_and_heads() -> None:
    shared = keep_mask(0.4, 2, 3, 16, 24, shared=True)
    assert 0.5 < shared[0, 0].mean() < 0.7
    assert (shared == shared[0, 0]).all()
    np.testing.assert_array_equal(shared[:1, :1], keep_mask(0.4, 1, 1, 16, 24, shared=True))


def test_masks_and_lengths_do_not_move_the_mask() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 24, 1, 24)), jnp.float32) for _ in range(3))
    v = jnp.eye(24)[None, :, None, :]
    options = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(7), "is_causal": True}
    out = np.asarray(quick_jit(partial(jattn.eager_attention, **options))(q, k, v))[0, :, 0]
    expected = keep_mask(0.5, 1, 1, 24, 24)[0, 0] & np.tri(24, dtype=bool)
    np.testing.assert_array_equal(out > 0, expected)


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_kept_fraction_is_as_asked(rate: float) -> None:
    mask = keep_mask(rate, **SHAPE)
    deviation = np.sqrt(rate * (1 - rate) / mask.size)
    assert abs(mask.mean() - (1 - rate)) < 4.5 * deviation
    for axis, name in enumerate("bnts"):
        rest = tuple(i for i in range(4) if i != axis)
        spread = np.sqrt(rate * (1 - rate) * mask.shape[axis] / mask.size)
        assert np.abs(mask.mean(axis=rest) - (1 - rate)).max() < 5 * spread, name


@pytest.mark.parametrize("axis", range(4), ids=["batch", "heads", "queries", "keys"])
@pytest.mark.parametrize("step", [1, 2])
def test_neighbours_are_independent(axis: int, step: int) -> None:
    mask = keep_mask(0.5, **SHAPE).astype(np.float64) - 0.5
    left = np.take(mask, np.arange(mask.shape[axis] - step), axis)
    right = np.take(mask, np.arange(step, mask.shape[axis]), axis)
    correlation = 4 * (left * right).mean()
    assert abs(correlation) < 5 / np.sqrt(left.size)


@pytest.mark.parametrize("rate", [0.5, 0.1])
def test_pairs_of_keys_are_dropped_together_as_often_as_by_chance(rate: float) -> None:
    kept = keep_mask(rate, 2, 4, 256, 64).reshape(-1, 64)
    dropped = (~kept).astype(np.float64) - rate
    correlation = dropped.T @ dropped / (len(dropped) * rate * (1 - rate))
    np.fill_diagonal(correlation, 0.0)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(dropped))
    assert 0.9 < correlation[np.triu_indices(64, 1)].std() * np.sqrt(len(dropped)) < 1.1


def test_no_two_rows_and_no_two_columns_are_equal() -> None:
    mask = keep_mask(0.5, **SHAPE)
    rows = mask.reshape(-1, mask.shape[-1])
    columns = mask.transpose(0, 1, 3, 2).reshape(-1, mask.shape[-2])
    for vectors in (rows, columns):
        assert len(np.unique(vectors, axis=0)) == len(vectors)


def test_pairs_of_rows_agree_half_the_time() -> None:
    mask = keep_mask(0.5, 2, 4, 64, 256).reshape(-1, 256).astype(np.float64) - 0.5
    correlation = 4 * (mask @ mask.T) / 256
    np.fill_diagonal(correlation, 0.0)
    assert np.abs(correlation).max() < 6.5 / np.sqrt(256)
    assert correlation.std() < 1.1 / np.sqrt(256)


def test_different_keys_give_different_masks() -> None:
    masks = [keep_mask(0.5, **SHAPE, seed=seed) for seed in (0, 1, 2, 2**31 - 1)]
    for a, b in pairwise(masks):
        assert abs((a == b).mean() - 0.5) < 5 * 0.5 / np.sqrt(a.size)
    np.testing.assert_array_equal(masks[0], keep_mask.__wrapped__(0.5, **SHAPE, seed=0))


def test_typed_and_raw_keys_are_the_same() -> None:
    raw, typed = jax.random.PRNGKey(3), jax.random.key(3)
    typed_mask = mask_of(jattn.eager_attention, typed)
    np.testing.assert_array_equal(mask_of(jattn.eager_attention, raw), typed_mask)
    np.testing.assert_array_equal(mask_of(jattn.eager_attention, np.asarray(raw)), typed_mask)


def test_other_key_implementations_work() -> None:
    mask = mask_of(jattn.eager_attention, jax.random.key(3, impl="rbg"))
    assert 0.3 < mask.mean() < 0.7


@pytest.mark.parametrize("backend", first(1, BACKENDS[::-1]), ids=str)
def test_rate_zero_needs_no_key_and_ignores_one(backend: Backend) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 12, 2, 4)), jnp.float32)
    plain = backend(x, x, x)
    np.testing.assert_array_equal(backend(x, x, x, dropout_rate=0.0), plain)
    np.testing.assert_array_equal(backend(x, x, x, dropout_rng=jax.random.key(0)), plain)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_the_log_sum_exp_is_without_dropout(backend: Backend) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 12, 2, 4)), jnp.float32)
    options = {"dropout_rate": 0.5, "dropout_rng": jax.random.key(0), "return_residual": True}
    _, lse = backend(x, x, x, **options)
    _, plain = backend(x, x, x, return_residual=True)
    np.testing.assert_array_equal(lse, plain)


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_the_mean_over_keys_is_the_output_without_dropout(backend: Backend) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 2, 4)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), 2000)

    def draw(key: jax.Array) -> jax.Array:
        return backend(x, x, x, dropout_rate=0.3, dropout_rng=key)

    draws = np.asarray(jax.jit(jax.vmap(draw))(keys))
    error = np.abs(draws.mean(axis=0) - np.asarray(backend(x, x, x)))
    assert (error < 5 * draws.std(axis=0) / np.sqrt(len(keys))).all()
