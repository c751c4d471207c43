"""The portable kernel of the output's tangent: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.portable.limits import tangent_refusals
from tests.backends import quick_jit
from tests.cases import CASES, EVERYTHING, Case, operands
from tests.portable.calls import LARGE, SMALL
from tests.portable.exact import ampere, spec_of
from tests.portable.tangents import TINY, arrays_of, check_tangent, directions, pushed_by_kernel

__all__ = ["ampere"]

HALF = [
    replace(case, name=f"{case.name}-half", dtype="bfloat16")
    for case in CASES
    if case.name in ("sinks_soft_cap_window", "segments_packed_causal", "groups_of_three")
]
Half = partial(Case, batch=1, heads=2, kv_heads=1, head_dim=16, dtype="bfloat16")
SETS = ["q", "k", "v", "bias", "sinks", "v sinks", "q k", "q v bias"]


# tests/test_second_order.py tries some by these kernels always.
@pytest.mark.thorough
@pytest.mark.parametrize("case", [*CASES, *HALF], ids=str)
def test_it_is_as_exact_as_the_formula(case: Case, seed: int) -> None:
    check_tangent(case, seed)


@pytest.mark.thorough
@pytest.mark.parametrize("names", SETS)
def test_what_has_no_tangent_adds_nothing(names: str, seed: int) -> None:
    check_tangent(replace(EVERYTHING, dtype="bfloat16"), seed, names)


@pytest.mark.thorough
@pytest.mark.parametrize("names", ["scale", "q k v scale"])
def test_an_array_as_scale_has_a_tangent(names: str, seed: int) -> None:
    check_tangent(replace(EVERYTHING, bias=None, scale=None), seed, names, scale=True)


def test_what_all_keys_of_a_row_have_in_common_cancels(seed: int) -> None:
    """Keys of a large mean, as models have: rounded, P tS V and mu O would differ by much."""
    case = Half("common_keys", queries=40, keys=70, causal=True, alignment="bottom_right")
    arrays = {name: np.array(x) for name, x in operands(case, seed).differentiable.items()}
    moving = {name: np.array(x) for name, x in directions(case, seed, "q").items()}
    arrays["k"] += np.asarray(30, arrays["k"].dtype)
    arrays["q"] /= np.asarray(8, arrays["q"].dtype)
    check_tangent(case, seed, arrays=arrays, moving=moving)


def test_a_tangent_of_one_key_is_not_taken_off_all(seed: int) -> None:
    """A row that sees one key of its tile's first block: what that moves by is far from mu."""
    case = Half("one_key", queries=40, keys=70, causal=True, alignment="bottom_right", window=49)
    arrays = {name: np.array(x) for name, x in operands(case, seed).differentiable.items()}
    moving = {name: np.array(x) for name, x in directions(case, seed, "k").items()}
    arrays["q"] /= np.asarray(8, arrays["q"].dtype)
    arrays["v"] += np.asarray(3, arrays["v"].dtype)
    moving["k"][:, 15] *= np.asarray(40, moving["k"].dtype)
    check_tangent(case, seed, arrays=arrays, moving=moving)


@pytest.mark.thorough
def test_what_lies_past_a_length_changes_no_bit(seed: int) -> None:
    lengths = {"query_lengths": (13, 24), "key_lengths": (21, 0)}
    case = Case("padded", **lengths, bias="BNTS", dtype="bfloat16")
    run = quick_jit(partial(pushed_by_kernel, case=case, seed=seed, tiles=TINY))
    clean, dirty = (
        run(past_lengths(case, arrays_of(case, seed), poison),
            past_lengths(case, directions(case, seed), poison))
        for poison in (0.0, np.nan)
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in clean.values())


def past_lengths(case: Case, arrays: Any, poison: float) -> Any:
    """The same with poison in what lies past the lengths."""
    found = {name: np.array(x) for name, x in arrays.items()}
    for b in range(case.batch):
        queries, keys = case.query_lengths[b], case.key_lengths[b]  # type: ignore[index]
        found["q"][b, queries:] = poison
        found["k"][b, keys:] = found["v"][b, keys:] = poison
        found["bias"][b, :, queries:] = poison
        found["bias"][b, :, :, keys:] = poison
    return found


@pytest.mark.thorough
def test_hidden_values_may_be_as_large_as_their_dtype(seed: int) -> None:
    """Their products are infinite, with tangents too; what sees them not is as without them."""
    case = Case("hidden", 1, 20, 40, 1, 1, 8, causal=True)
    run = quick_jit(partial(pushed_by_kernel, case=case, seed=seed, tiles=TINY))
    arrays, moving = arrays_of(case, seed), directions(case, seed)
    expected = run(arrays, moving)
    large = [{name: np.array(x) for name, x in found.items()} for found in (arrays, moving)]
    for found in large:
        for name in ("k", "v"):
            found[name][:, 20:] = np.finfo(np.float32).max
    for name, x in run(*large).items():
        np.testing.assert_array_equal(x, expected[name], err_msg=name)


@pytest.mark.thorough
def test_a_row_that_sees_no_key_has_none() -> None:
    case = Case("dead", 1, 20, 20, 1, 1, 8, bias="11TS", sinks=True)
    arrays, moving = arrays_of(case, 0), directions(case, 0)
    bias = np.array(arrays["bias"])
    bias[..., 5:9, :] = -np.inf
    run = quick_jit(partial(pushed_by_kernel, case=case, seed=0, tiles=TINY))
    found = run({**arrays, "bias": bias}, moving)
    for name in ("t_out", "t_lse"):
        assert np.isfinite(np.asarray(found[name])).all()
        assert (np.asarray(found[name])[:, 5:9] == 0).all()
        assert (np.asarray(found[name])[:, :5] != 0).all()


on_a_gpu = [pytest.mark.gpu, pytest.mark.usefixtures("ampere")]


class TestOnAGpu:
    pytestmark = on_a_gpu

    @pytest.mark.parametrize("case", SMALL + LARGE, ids=str)
    def test_it_is_as_exact_as_the_formula(self, case: Case, seed: int) -> None:
        if reasons := tangent_refusals(spec_of(case)):
            pytest.skip("; ".join(reasons))
        check_tangent(case, seed, tiles=None)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_it_is_as_exact_in_tiny_tiles(self, case: Case, seed: int) -> None:
        check_tangent(case, seed)

    def test_it_is_bitwise_repeatable(self, seed: int) -> None:
        case = Case("repeated", 2, 520, 520, 4, 2, 64, dtype="bfloat16", causal=True)
        run = jax.jit(partial(pushed_by_kernel, case=case, seed=seed, tiles=None))
        arrays, moving = jax.device_put((arrays_of(case, seed), directions(case, seed)))
        first = jax.tree.map(np.asarray, run(arrays, moving))
        for _ in range(50):
            again = jax.tree.map(np.asarray, run(arrays, moving))
            jax.tree.map(np.testing.assert_array_equal, again, first)
            assert jnp.isfinite(again["t_lse"]).all()
