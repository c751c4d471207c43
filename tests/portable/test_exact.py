"""The portable kernels against float64: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.portable import limits
from tests import tolerance
from tests.backends import EAGER, Backend, Results, call, quick_jit
from tests.cases import CASES, EVERYTHING, Case, chosen, first, operands
from tests.portable.calls import INTERPRETED, LARGE, SMALL
from tests.portable.exact import BOTH, CHUNKED, FLASH, ampere, check, compute, spec_of
from tests.test_padding import planted
from tests.test_semantics import check_found

__all__ = ["ampere"]

# All arguments at once are tried under vmap, in test_transforms.py.
FLASH_ORDINARY = "packed one_query_offsets wide_float32"

on_a_gpu = [pytest.mark.gpu, pytest.mark.usefixtures("ampere")]


def test_the_kernels_take_the_whole_table() -> None:
    for case in CASES + SMALL:
        assert limits.refusals(spec_of(case)) == [], case


@pytest.mark.parametrize("case", chosen(INTERPRETED + SMALL, FLASH_ORDINARY), ids=str)
def test_flash_interpreted_is_as_exact_as_the_formula(case: Case, seed: int) -> None:
    check(FLASH, case, seed)


@pytest.mark.thorough
@pytest.mark.parametrize("case", INTERPRETED + SMALL, ids=str)
def test_chunked_interpreted_is_as_exact_as_the_formula(case: Case, seed: int) -> None:
    check(CHUNKED, case, seed)


def test_chunked_forward_is_as_exact_with_all_arguments(seed: int) -> None:
    """Its backward is that of the flash kernels."""
    drawn = operands(EVERYTHING, seed)
    arrays = {name: jnp.asarray(x) for name, x in planted(EVERYTHING, seed, np.nan).items()}
    out, lse = quick_jit(lambda x: call(CHUNKED, drawn, x, return_residual=True))(arrays)
    check_found({"out": out, "lse": lse}, CHUNKED, EVERYTHING, seed)


@pytest.mark.parametrize("backend", first(1, BOTH), ids=str)
def test_what_lies_past_a_length_changes_no_bit(backend: Backend, seed: int) -> None:
    lengths = {"query_lengths": (13, 24), "key_lengths": (21, 0)}
    case = Case("padded", **lengths, bias="BNTS", dtype="bfloat16")
    clean, dirty = (compute(backend, case, seed, poison) for poison in (0.0, np.nan))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@pytest.mark.parametrize("backend", BOTH, ids=str)
def test_nan_that_is_seen_stays(backend: Backend) -> None:
    case = Case("visible_nan", queries=24, keys=24, causal=True, key_lengths=(20, 20))
    arrays = {name: np.array(x) for name, x in operands(case, 0).differentiable.items()}
    arrays["v"][0, 12] = np.nan
    out = np.asarray(quick_jit(lambda x: call(backend, operands(case, 0), x))(arrays))
    assert np.isnan(out[0, 12:]).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("backend", first(1, BOTH), ids=str)
def test_rows_hidden_by_an_infinite_bias_are_zero(backend: Backend) -> None:
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 20, 2, 4)), jnp.float32) for _ in range(3))
    bias = np.zeros((1, 1, 20, 20), np.float32)
    bias[..., 5:9, :] = -np.inf
    bias[..., 12, 3:] = -np.inf

    def loss(q: jax.Array, bias: jax.Array) -> Any:
        out, lse = backend(q, k, v, bias, return_residual=True)
        return out.sum() + jnp.where(lse > -jnp.inf, lse, 0).sum(), (out, lse)

    gradients, (out, lse) = quick_jit(jax.grad(loss, (0, 1), has_aux=True))(q, jnp.asarray(bias))
    assert (np.asarray(out)[:, 5:9] == 0).all()
    assert (np.asarray(lse)[:, 5:9] == -np.inf).all()
    assert (np.asarray(gradients[0])[:, 5:9] == 0).all()
    assert (np.asarray(gradients[1])[np.isneginf(bias)] == 0).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients)


class TestOnAGpu:
    pytestmark = on_a_gpu

    @pytest.mark.parametrize("backend", BOTH, ids=str)
    @pytest.mark.parametrize("case", SMALL + LARGE, ids=str)
    def test_as_exact_as_the_formula(self, backend: Backend, case: Case, seed: int) -> None:
        check(backend, case, seed)

    @pytest.mark.parametrize("backend", BOTH, ids=str)
    @pytest.mark.parametrize("case", dict.fromkeys([*LARGE[::5], LARGE[-1]]), ids=str)
    def test_gradients_are_bitwise_repeatable(
        self, backend: Backend, case: Case, seed: int
    ) -> None:
        drawn = operands(case, seed)

        @jax.jit
        def everything(arrays: Results) -> Any:
            out, vjp = jax.vjp(lambda arrays: call(backend, drawn, arrays), arrays)
            return out, vjp(jnp.asarray(drawn["dout"]))[0]

        arrays = jax.device_put(drawn.differentiable)
        first = jax.tree.map(np.asarray, everything(arrays))
        for _ in range(50):
            again = jax.tree.map(np.asarray, everything(arrays))
            jax.tree.map(np.testing.assert_array_equal, again, first)

    @pytest.mark.parametrize("backend", BOTH, ids=str)
    def test_float32_is_full_precision_unless_tf32_is_asked_for(self, backend: Backend) -> None:
        case = Case("precision", 1, 200, 300, 2, 2, 64)
        drawn = operands(case, 0)
        exact = drawn.exact(None).out

        def error(backend: Backend) -> float:
            return tolerance.error(jax.jit(lambda x: call(backend, drawn, x))(arrays), exact)

        arrays = drawn.differentiable
        full = error(backend)
        assert full <= 2 * error(EAGER) + 2e-6
        with jax.default_matmul_precision("tensorfloat32"):
            rounded, allowed = error(backend), 2 * error(EAGER)
        assert 10 * full < rounded <= allowed
