"""A bias in the Hopper kernels: every form that broadcasts, and numbers of any size."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.backends.flash import interpreted
from tests import extremes, reference
from tests.backends import Backend, Results
from tests.cases import Case, chosen, first
from tests.hopper.calls import Half
from tests.hopper.exact import FLASH, INTERPRETED, check, hopper
from tests.test_large_logits import CASES, check_sums

__all__ = ["hopper"]

ON_GPU = pytest.mark.gpu

FORMS = ["".join(form) for form in product("B1", "N1", "T1", "S1")]
Small = partial(Half, batch=2, queries=72, keys=144, heads=2, kv_heads=1, head_dim=64)
SMALL = [
    *(Small(f"bias_{form}", bias=form) for form in FORMS),
    Small("bias_float32", bias="1NTS", bias_dtype="float32", causal=True),
    Small("bias_float16", bias="11TS", dtype="float16", window=(40, 30)),
    Small("bias_ragged", queries=67, keys=131, bias="1NTS", key_lengths=(90, 0)),
    Small("bias_segments", keys=72, bias="BNTS", segments="sorted", causal=True),
    Small("bias_soft_cap_sinks", bias="1NTS", soft_cap=3.0, sinks=True),
    Small("bias_columns_soft_cap", bias="1N1S", soft_cap=3.0, scale=-0.2),
    Small("bias_one_query", queries=1, bias="1N1S"),
    Small("bias_few_queries", heads=4, queries=3, bias="1N1S", bias_dtype="float32"),
    Small("bias_few_queries_whole", heads=4, kv_heads=2, queries=3, bias="BNTS"),
    Small("bias_few_queries_rows", heads=4, kv_heads=2, queries=3, bias="1NT1"),
    Small("bias_one_key", keys=1, bias="1NT1"),
    Small("bias_32", head_dim=32, bias="1NTS", queries=130, keys=144),
    Small("bias_40_ragged", head_dim=40, bias="BNTS", queries=67, keys=131, causal=True),
    Small("bias_24_96", head_dim=24, value_dim=96, bias="11TS", bias_dtype="float32", sinks=True),
    Small("bias_32_lengths", head_dim=32, bias="1NTS", key_lengths=(90, 144)),
]  # fmt: skip
Large = partial(Half, batch=2, queries=520, keys=784, heads=4, kv_heads=2)
LARGE = [
    *(
        Large(f"bias_{form}_{h}_{dtype}", head_dim=h, bias=form, bias_dtype=dtype, causal=causal)
        for h in (64, 128, 256)
        for form, dtype, causal in (
            ("1NTS", "bfloat16", False),
            ("BNTS", "float32", True),
            ("1N1S", "float32", True),
            ("BN1S", "bfloat16", False),
            ("BNT1", "float32", False),
        )
    ),
    Large(
        "bias_32_rows", batch=40, queries=384, keys=384, heads=4, kv_heads=4, head_dim=32,
        bias="1NTS",
    ),
    Large(
        "bias_32_many", batch=60, queries=256, keys=256, heads=4, kv_heads=4, head_dim=32,
        bias="1NTS",
    ),
    Large("bias_96", head_dim=96, bias="B1TS", window=(200, 70)),
    Large("bias_80", head_dim=80, bias="11TS"),
    Large("bias_latent", head_dim=192, value_dim=128, bias="11TS", causal=True),
    Large("bias_packed", keys=520, head_dim=128, bias="1NTS", segments="sorted", causal=True),
    Large("bias_lengths", head_dim=128, bias="1NTS", key_lengths=(17, 784), query_lengths=(520, 9)),
    Large("bias_offsets", head_dim=64, bias="1NTS", causal=True, offset=(200, -100)),
    Large("bias_cap", head_dim=64, bias="1NTS", causal=True, soft_cap=5.0, sinks=True),
    Large("bias_many_tiles", batch=4, heads=8, kv_heads=8, head_dim=64, bias="1NTS", causal=True),
    Large("bias_many_columns", batch=8, heads=8, kv_heads=8, head_dim=128, bias="1N1S"),
    Large("bias_decode", batch=4, queries=1, heads=32, kv_heads=8, head_dim=128, bias="1N1S"),
]  # fmt: skip


@pytest.mark.parametrize("case", chosen(SMALL, "bias_BN1S"), ids=str)
def test_interpreted_as_exact_as_the_formula(case: Case, seed: int) -> None:
    check(INTERPRETED, case, seed)


@ON_GPU
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", [*SMALL, *LARGE], ids=str)
def test_as_exact_as_the_formula(case: Case, seed: int) -> None:
    check(FLASH, case, seed)


NUMBERS = ["finfo.min", "-1e9", "3e38"]


def hidden_by_a_number(name: str, **more: Any) -> Results:
    """Arrays of `tests.test_large_logits`, at a head dim that the kernels take with a bias."""
    arrays = CASES[name](**more)
    return {n: x if n == "bias" else np.tile(x, (1, 1, 1, 4)) for n, x in arrays.items()}


@pytest.mark.parametrize("name", first(1, NUMBERS[:2]))
def test_a_row_hidden_by_a_finite_number_is_even_when_interpreted(name: str) -> None:
    extremes.check(INTERPRETED, hidden_by_a_number(name, queries=8, dtype=jnp.bfloat16))


@ON_GPU
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("queries", "keys"), [(8, 64), (128, 1000), (1, 600)])
def test_a_row_hidden_by_a_finite_number_is_even(dtype: str, queries: int, keys: int) -> None:
    for name in NUMBERS:  # by one program
        print(name)
        arrays = hidden_by_a_number(name, queries=queries, keys=keys, dtype=jnp.dtype(dtype))
        extremes.check(FLASH, arrays)
        if queries > 64:  # the sums' values are as wide
            check_sums(FLASH, arrays)


def hidden_numbers(backend: Any, number: float) -> None:
    """What a causal mask hides of a bias changes nothing, whatever it is."""
    rng = np.random.default_rng(3)
    q, k, v, d_out = (
        jnp.asarray(rng.standard_normal((1, 72, 2, 64)), jnp.bfloat16) for _ in range(4)
    )
    bias = jnp.asarray(rng.standard_normal((1, 2, 72, 80))[..., :72], jnp.float32)
    hidden = jnp.where(jnp.triu(jnp.ones((72, 72), bool), 1)[None, None], number, bias)

    def run(bias: Any) -> Any:
        out, vjp = jax.vjp(partial(backend, is_causal=True), q, k, v, bias)
        return out, vjp(d_out)

    for found, wanted in zip(*map(jax.tree.leaves, (run(hidden), run(bias))), strict=True):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


@pytest.mark.thorough
def test_what_a_causal_mask_hides_of_a_bias_may_be_no_number() -> None:
    hidden_numbers(INTERPRETED, np.nan)


@ON_GPU
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_what_a_causal_mask_hides_of_a_bias_may_be_anything(number: float) -> None:
    hidden_numbers(FLASH, number)


def minus_infinity(backend: Any, form: str) -> None:
    """It hides elements, columns and whole rows, which then have a log-sum-exp of -inf."""
    shape = replace(SMALL[0]).shape_of(form)
    rng = np.random.default_rng(4)
    sizes = ((2, 72, 2, 64), (2, 144, 1, 64), (2, 144, 1, 64))
    q, k, v = (jnp.asarray(rng.standard_normal(x), jnp.bfloat16) for x in sizes)
    bias = rng.standard_normal(shape).astype(np.float32)
    bias = np.where(rng.random(shape) < 0.4, -np.inf, bias)
    if shape[2] > 1:
        bias[..., 3, :] = -np.inf
    out, lse = backend(q, k, v, bias=jnp.asarray(bias), return_residual=True)
    exact = reference.attention(q, k, v, bias=bias, seen=reference.visible(2, 72, 144))
    out, lse = (np.asarray(x, np.float64) for x in (out, lse))
    np.testing.assert_allclose(lse, exact.lse, atol=1e-5)
    np.testing.assert_allclose(out, exact.out, atol=2 * float(jnp.finfo(jnp.bfloat16).eps))


@pytest.mark.parametrize("form", ["1NTS"])
def test_minus_infinity_hides_when_interpreted(form: str) -> None:
    minus_infinity(INTERPRETED, form)


@ON_GPU
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("form", FORMS)
def test_minus_infinity_hides(form: str) -> None:
    minus_infinity(FLASH, form)


def test_rows_that_share_a_bias_are_one_call() -> None:
    """Two biases, each for three rows: six rows of a batch."""
    rng = np.random.default_rng(5)
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, 3, 1, 40, 2, 64)), jnp.bfloat16) for _ in range(3)
    )
    bias = jnp.asarray(rng.standard_normal((2, 1, 2, 40, 64))[..., :40], jnp.float32)

    def mapped(attend: Any) -> Any:
        return jax.vmap(jax.vmap(attend, (0, 0, 0, None)))

    with interpreted():
        found = mapped(jattn.flash_attention)(q, k, v, bias)
        traced = str(jax.make_jaxpr(mapped(jattn.flash_attention))(q, k, v, bias))
    assert "bf16[6,40,2,64]" in traced
    assert "f32[6,2,40,40]" not in traced
    wanted = mapped(jattn.eager_attention)(*(x.astype(jnp.float32) for x in (q, k, v)), bias)
    np.testing.assert_allclose(
        np.asarray(found, np.float32), wanted, atol=2 * float(jnp.finfo(jnp.bfloat16).eps)
    )


# Where float32 numbers are 2^-13, 1/4, 2, 32, 64 and 2^40 apart, log2 e times them and its end.
POWERS = [10, 21, 25, 28.9, 29.2, 64, 127.9]


def far_from_zero(backend: Backend, power: float, sign: int) -> None:
    """Logits next to each other, however far from zero, have the weights of their difference."""
    rng = np.random.default_rng(6)
    queries, keys = 64, 300
    rows = 2.0 ** np.linspace(power - 0.7, power, queries)
    rows = np.asarray(jnp.asarray(sign * rows, jnp.bfloat16), np.float32)
    q, k = np.zeros((queries, 128), np.float32), np.zeros((keys, 128), np.float32)
    q[:, 0], k[:, 0] = np.abs(np.spacing(rows)), -rng.integers(0, 4, keys)
    bias = np.where(rng.random(keys) < 0.3, -np.inf, rows[:, None])
    exact = bias.astype(np.float64) + q[:, :1].astype(np.float64) * k[:, 0]
    v = rng.standard_normal((keys, 128)).astype(np.float32)
    q, k, v = (jnp.asarray(x[None, :, None], jnp.bfloat16) for x in (q, k, v))
    bias = jnp.asarray(bias[None, None], jnp.bfloat16)
    out, lse = backend(q, k, v, bias=bias, scale=1.0, return_residual=True)
    highest = exact.max(axis=1, keepdims=True)
    weights = np.exp(exact - highest)
    wanted = weights / weights.sum(axis=1, keepdims=True) @ np.asarray(v[0, :, 0], np.float64)
    wanted_lse = highest[:, 0] + np.log(weights.sum(axis=1))
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(np.asarray(out[0, :, 0], np.float64), wanted, atol=2 * eps)
    np.testing.assert_allclose(np.asarray(lse[0, :, 0]), wanted_lse, rtol=2e-7, atol=1e-5)


@pytest.mark.parametrize("power", first(1, POWERS[4:] + POWERS[:4]))
def test_logits_far_from_zero_when_interpreted(power: float) -> None:
    far_from_zero(INTERPRETED, power, -1)


@ON_GPU
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("power", POWERS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_logits_far_from_zero(power: float, sign: int) -> None:
    far_from_zero(FLASH, power, sign)


# Up to the largest that comes with Q Kᵀ, and one that does not.
SIZES = [9000.0, 8192.0, 100.0]


def large_columns(backend: Backend, size: float) -> None:
    """Columns near a number of this size have the weights of their differences from it."""
    rng = np.random.default_rng(8)
    queries, keys, heads = 72, 200, 2
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, t, heads, 64)), jnp.bfloat16)
        for t in (queries, keys, keys)
    )
    bias = jnp.asarray(size - 4 * rng.random((1, heads, 1, keys)), jnp.float32)
    out, lse = backend(q, k, v, bias=bias, return_residual=True)
    exact = reference.attention(q, k, v, bias=bias, seen=reference.visible(2, queries, keys))
    found = np.asarray(lse, np.float64)
    np.testing.assert_allclose(found, exact.lse, atol=1e-5 + 4 * 2.0**-23 * size)
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    np.testing.assert_allclose(np.asarray(out, np.float64), exact.out, atol=2 * eps)


@pytest.mark.parametrize("size", first(1, SIZES))
def test_columns_of_any_size_when_interpreted(size: float) -> None:
    large_columns(INTERPRETED, size)


@ON_GPU
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("size", SIZES)
def test_columns_of_any_size(size: float) -> None:
    large_columns(FLASH, size)
