"""What lies past a length is never read into a result, whatever it holds."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.backends import BACKENDS, CHUNKED, DEFAULT, EAGER, Backend, Results, call, quick_jit
from tests.cases import EVERYTHING, Case, first, operands, thorough

LENGTHS: dict[str, Any] = {"query_lengths": (13, 24), "key_lengths": (21, 0)}
PADDED = [
    Case("keys_and_queries", **LENGTHS),
    Case("bias_soft_cap", bias="BNTS", soft_cap=3.0, **LENGTHS),
    Case(
        "window_sinks",
        queries=40,
        keys=40,
        window=(9, 2),
        sinks=True,
        query_lengths=(40, 11),
        key_lengths=(40, 11),
    ),
    Case(
        "bfloat16_causal",
        dtype="bfloat16",
        causal=True,
        alignment="bottom_right",
        key_lengths=(1, 33),
    ),
    EVERYTHING,
]


@cache
def compiled(backend: Backend, case: Case, seed: int) -> Any:
    drawn = operands(case, seed)

    @quick_jit
    def run(arrays: Results) -> Any:
        results, vjp = jax.vjp(lambda x: call(backend, drawn, x, return_residual=True), arrays)
        return results, call(backend, drawn, arrays), vjp((drawn["dout"], drawn["dlse"]))

    return run


def planted(case: Case, seed: int, poison: float) -> Results:
    """The operands of a case with everything past the lengths replaced."""
    arrays = {name: np.array(x) for name, x in operands(case, seed).differentiable.items()}
    lengths = {"q": case.query_lengths, "k": case.key_lengths, "v": case.key_lengths}
    for name, each in lengths.items():
        for b, length in enumerate(each or ()):
            arrays[name][b, max(length, 0) :] = poison
    if case.bias == "BNTS":
        for b, length in enumerate(case.key_lengths or ()):
            arrays["bias"][b, :, :, length:] = poison
        for b, length in enumerate(case.query_lengths or ()):
            arrays["bias"][b, :, length:] = poison
    return arrays


@pytest.mark.parametrize("poison", first(1, [np.nan, np.inf, 1e30]))
@pytest.mark.parametrize(
    ("backend", "case"),
    [
        *product(BACKENDS, PADDED[1:3]),
        *thorough(*product(BACKENDS, PADDED[:1] + PADDED[3:4])),
        *thorough(*((backend, EVERYTHING) for backend in (CHUNKED, EAGER, DEFAULT))),
    ],
    ids=str,
)
def test_padding_changes_no_bit(backend: Backend, case: Case, poison: float, seed: int) -> None:
    run = compiled(backend, case, seed)
    clean, dirty = run(planted(case, seed, 0.0)), run(planted(case, seed, poison))
    for expected, found in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        assert not np.isnan(np.asarray(expected, np.float32)).any()
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("operand", ["k", "v"])
def test_nan_in_a_visible_key_stays_visible(backend: Backend, operand: str) -> None:
    case = Case("visible_nan", queries=24, keys=24, causal=True, key_lengths=(20, 20))
    arrays = {name: np.array(x) for name, x in operands(case, 0).differentiable.items()}
    arrays[operand][0, 12] = np.nan
    (out, lse), plain, _ = compiled(backend, case, 0)(arrays)
    for result in (out, plain):
        assert np.isnan(np.asarray(result)[0, 12:]).all()
        assert np.isfinite(np.asarray(result)[1]).all()
    assert np.isnan(np.asarray(lse)[0, 12:]).all() == (operand == "k")


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_nan_in_a_visible_query_stays_visible(backend: Backend) -> None:
    case = Case("visible_nan", queries=24, keys=24, causal=True, key_lengths=(20, 20))
    arrays = {name: np.array(x) for name, x in operands(case, 0).differentiable.items()}
    arrays["q"][0, 7] = np.nan
    (out, lse), _, _ = compiled(backend, case, 0)(arrays)
    others = np.arange(24) != 7
    assert np.isnan(np.asarray(out)[0, 7]).all()
    assert np.isnan(np.asarray(lse)[0, 7]).all()
    assert np.isfinite(np.asarray(out)[0, others]).all()


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_lengths_may_be_numpy(backend: Backend) -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 2, 4)), jnp.float32)
    expected = backend(x, x, x, key_value_seq_lengths=jnp.array([5, 12], jnp.int32))
    found = backend(x, x, x, key_value_seq_lengths=np.array([5, 12], np.int32))
    np.testing.assert_array_equal(found, expected)
