"""Every backend on the table of cases, against float64: output, log-sum-exp and every gradient."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import long_reference, reference, tolerance
from tests.backends import (
    BACKENDS,
    CHUNKED,
    DEFAULT,
    EAGER,
    TALL_CHUNKS,
    Backend,
    Results,
    call,
    kept,
    quick_jit,
    results,
)
from tests.cases import (
    CASES,
    EVERYTHING,
    ORDINARY,
    Case,
    Operands,
    chosen,
    first,
    operands,
    thorough,
)
from tests.reference import Floats

Values = dict[str, Floats]


@cache
def exact(case: Case, seed: int) -> tuple[Values, Values, float]:
    """Float64 results, their magnitudes, and 1 + the largest logit."""
    compute = long_reference.exact if long_reference.is_long(case) else in_numpy
    values, magnitudes = compute(operands(case, seed), kept(case))
    return values, magnitudes, float(magnitudes["lse"].max())


def in_numpy(drawn: Operands, keep: reference.Bools | None) -> tuple[Values, Values]:
    attention = drawn.exact(keep)
    cotangents = drawn["dout"], drawn["dlse"]
    values = {"out": attention.out, "lse": attention.lse, **attention.gradients(*cotangents)}
    return values, attention.magnitudes(*cotangents)


def check_errors(backend: Backend, case: Case, seed: int) -> None:
    """Eager against its a-priori bound, the others against eager."""
    check_found(results(backend, case, seed), backend, case, seed)


def check_found(found: Results, backend: Backend, case: Case, seed: int) -> None:
    """All results of a call, or some."""
    values, magnitudes, condition = exact(case, seed)
    for name, got in found.items():
        dtype = max(case.dtype, got.dtype, key=tolerance.epsilon)
        if backend is EAGER:
            tolerance.check_a_priori(name, got, values[name], magnitudes[name], dtype, condition)
        else:
            peer = partial(_of_eager, name, case, seed)
            tolerance.check_against_peer(name, got, peer, values[name], magnitudes[name], dtype)


def _of_eager(name: str, case: Case, seed: int) -> Any:
    return results(EAGER, case, seed)[name]


def check_dtypes_and_shapes(backend: Backend, case: Case, seed: int) -> None:
    check_kinds(results(backend, case, seed), case, seed)


def check_kinds(found: Results, case: Case, seed: int) -> None:
    value_dim = case.head_dim if case.value_dim is None else case.value_dim
    rows = (case.batch, case.queries, case.heads)
    expected: dict[str, tuple[tuple[int, ...], Any]] = {
        name: (array.shape, array.dtype)
        for name, array in operands(case, seed).differentiable.items()
    }
    expected |= {"out": ((*rows, value_dim), case.dtype), "lse": (rows, jnp.float32)}
    for name, array in found.items():
        assert (array.shape, array.dtype) == expected[name], name


def check_what_sees_nothing_is_zero(backend: Backend, case: Case, seed: int) -> None:
    check_zeros(results(backend, case, seed), case, seed)


def check_zeros(found: Results, case: Case, seed: int) -> None:
    """Exactly: a query without a key, and the gradients of a key without a query."""
    seen = operands(case, seed).seen  # whose heads may be one for all
    rows = np.broadcast_to(seen.any(axis=3), case.shape_of("BNT"))
    keys = np.broadcast_to(seen.any(axis=2), case.shape_of("BNS"))
    dead_rows = ~rows.transpose(0, 2, 1)
    by_key_head = keys.reshape(case.batch, case.kv_heads, -1, case.keys)
    dead_keys = ~by_key_head.any(axis=2).transpose(0, 2, 1)
    dead = {"out": dead_rows, "lse": dead_rows, "q": dead_rows, "k": dead_keys, "v": dead_keys}
    if case.bias == "BNTS":
        dead["bias"] = ~np.broadcast_to(seen, case.shape_of("BNTS"))
    for name in dead.keys() & found.keys():
        nothing = -np.inf if name == "lse" else 0
        assert (np.asarray(found[name])[dead[name]] == nothing).all(), name


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("case", chosen(CASES, ORDINARY), ids=str)
def test_results_are_exact_within_rounding(backend: Backend, case: Case, seed: int) -> None:
    check_dtypes_and_shapes(backend, case, seed)
    check_errors(backend, case, seed)
    check_what_sees_nothing_is_zero(backend, case, seed)


def test_long_calls_have_the_reference_in_parts(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_reference, "AT_ONCE", 3 * 64 * 64)  # of the eight heads
    found = long_reference.exact(operands(EVERYTHING, seed), kept(EVERYTHING))
    wanted = in_numpy(operands(EVERYTHING, seed), kept(EVERYTHING))
    for got, right in zip(found, wanted, strict=True):
        assert got.keys() == right.keys()
        for name, x in got.items():
            np.testing.assert_allclose(x, right[name], rtol=1e-9, atol=1e-11, err_msg=name)


def test_the_table_covers_hidden_rows_and_visible_ones() -> None:
    hidden = [case for case in CASES if not operands(case, 0).seen.any(axis=-1).all()]
    assert len(hidden) > 15
    assert all(operands(case, 0).seen.any() for case in CASES if case.mask_density > 0)


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        (TALL_CHUNKS, EVERYTHING),
        *thorough((DEFAULT, EVERYTHING)),
        (
            DEFAULT,
            Case("many_rows_to_a_step", batch=6, query_lengths=(1, 24, 0, 9, 24, 17), causal=True),
        ),
        (
            DEFAULT,
            Case(
                "long",
                batch=1,
                queries=700,
                keys=1100,
                heads=2,
                causal=True,
                alignment="bottom_right",
            ),
        ),
        (
            DEFAULT,
            Case(
                "long_window",
                batch=1,
                queries=1300,
                keys=1300,
                heads=2,
                window=(100, 20),
                bias="1N1S",
            ),
        ),
        (
            DEFAULT,
            Case(
                "long_segments",
                batch=1,
                queries=900,
                keys=900,
                heads=2,
                segments="sorted",
                sinks=True,
            ),
        ),
    ],
    ids=str,
)
def test_other_chunk_sizes_are_as_exact(backend: Backend, case: Case, seed: int) -> None:
    check_errors(backend, case, seed)


@pytest.mark.parametrize("backend", first(1, [CHUNKED, EAGER]), ids=str)
@pytest.mark.parametrize(
    "case",
    first(
        1,
        [
            EVERYTHING,
            Case("causal_half", queries=40, keys=40, causal=True, dtype="bfloat16"),
            Case("plain"),
            Case("bias_lengths", bias="1N1S", key_lengths=(0, 21)),
        ],
    ),
    ids=str,
)
def test_without_residual_and_without_gradient_it_is_the_same(
    backend: Backend, case: Case, seed: int
) -> None:
    drawn = operands(case, seed)
    arrays = drawn.differentiable

    @quick_jit
    def run() -> tuple[jax.Array, jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
        def alone(arrays: dict[str, jax.Array]) -> jax.Array:
            return call(backend, drawn, arrays)

        def first(arrays: dict[str, jax.Array]) -> jax.Array:
            return call(backend, drawn, arrays, return_residual=True)[0]

        dout = drawn["dout"]
        return (
            alone(arrays),
            first(arrays),
            jax.vjp(alone, arrays)[1](dout)[0],
            jax.vjp(first, arrays)[1](dout)[0],
        )

    plain, residual, plain_gradients, residual_gradients = run()
    values, magnitudes, _ = exact(case, seed)
    for output in (plain, residual):
        tolerance.check_against_peer(
            "out",
            output,
            results(EAGER, case, seed)["out"],
            values["out"],
            magnitudes["out"],
            case.dtype,
        )
    gradients = drawn.exact(kept(case)).gradients(drawn["dout"], np.zeros_like(drawn["dlse"]))
    for name, value in gradients.items():
        tolerance.check_against_peer(
            name,
            plain_gradients[name],
            residual_gradients[name],
            value,
            magnitudes[name],
            case.dtype,
        )


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_hidden_by_an_infinite_bias_are_zero(backend: Backend, sinks: bool) -> None:
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 20, 2, 4)), jnp.float32) for _ in range(3))
    bias = np.zeros((1, 1, 20, 20), np.float32)
    bias[..., 5:9, :] = -np.inf
    bias[..., 12, 3:] = -np.inf
    sink = jnp.ones(2) if sinks else None

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array) -> tuple:
        out, lse = backend(q, k, v, bias, sinks=sink, return_residual=True)
        return out.sum() + jnp.where(lse > -jnp.inf, lse, 0).sum(), (out, lse)

    gradients, (out, lse) = quick_jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(
        q, k, v, jnp.asarray(bias)
    )
    assert (np.asarray(out)[:, 5:9] == 0).all()
    assert (np.asarray(lse)[:, 5:9] == -np.inf).all()
    assert (np.asarray(gradients[0])[:, 5:9] == 0).all()
    assert (np.asarray(gradients[3])[np.isneginf(bias)] == 0).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    assert np.isfinite(np.asarray(lse)[:, 12]).all()


@pytest.mark.parametrize("backend", first(1, [CHUNKED, EAGER]), ids=str)
@pytest.mark.parametrize("logit", first(2, [-200.0, 3e4, 200.0]))
def test_large_logits_neither_overflow_nor_vanish(backend: Backend, logit: float) -> None:
    q = jnp.full((1, 20, 1, 1), logit)
    k = jnp.linspace(0.5, 1.0, 24).reshape(1, 24, 1, 1)
    v = jnp.arange(24.0).reshape(1, 24, 1, 1)

    @quick_jit
    def run(*arrays: jax.Array) -> tuple[Any, Any]:
        results, vjp = jax.vjp(lambda *x: backend(*x, scale=1.0, return_residual=True), *arrays)
        out, lse = results
        return results, vjp((jnp.ones_like(out), jnp.zeros_like(lse)))

    (out, lse), gradients = run(q, k, v)
    logits = np.float64(q[0, 0, 0, 0]) * np.float64(k[0, :, 0, 0])
    exact = reference.attention(
        *map(np.float64, (q, k, v)), seen=np.ones((1, 1, 20, 24), bool), scale=1.0
    )
    # What a logit's rounding makes of exp, of which the mean of numbers up to 23 is made.
    rounding = 2 * tolerance.epsilon(jnp.float32) * np.abs(logits).max()
    assert np.abs(np.asarray(out) - exact.out).max() <= 23 * rounding
    assert np.abs(np.asarray(lse) - exact.lse).max() <= rounding
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("window", [(3, None), (None, 2), (None, None)])
def test_a_side_of_the_window_may_be_open(window: tuple[int | None, int | None]) -> None:
    q, k = (jnp.asarray(operands(Case("plain"), 0)[name]) for name in "qk")
    left, right = (1000 if side is None else side for side in window)
    found = CHUNKED(q, k, k, local_window_size=window)
    np.testing.assert_array_equal(found, CHUNKED(q, k, k, local_window_size=(left, right)))
