"""vmap, jit, grad, checkpoint, scan and forward mode, alone and composed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests import tolerance
from tests.backends import BACKENDS, CHUNKED, DEFAULT, EAGER, Backend, quick_jit
from tests.cases import first, thorough

EXAMPLES = 3
B, T, S, N, K, H = 2, 18, 22, 4, 2, 4


def normal(name: str, *shape: int) -> jax.Array:
    rng = np.random.default_rng(list(name.encode()))
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def one_of(name: str, size: int) -> Any:
    """The argument `name`, `size` examples of it stacked."""
    rng = np.random.default_rng(list(name.encode()))
    match name:
        case "query":
            return normal(name, size, B, T, N, H)
        case "key" | "value":
            return normal(name, size, B, S, K, H)
        case "bias":
            return normal(name, size, 1, N, T, S)
        case "mask":
            return jnp.asarray(rng.random((size, B, 1, T, S)) < 0.8)
        case "query_seq_lengths":
            return jnp.asarray(rng.integers(0, T + 1, (size, B)), jnp.int32)
        case "key_value_seq_lengths":
            return jnp.asarray(rng.integers(0, S + 1, (size, B)), jnp.int32)
        case "query_segment_ids":
            return jnp.asarray(np.sort(rng.integers(0, 3, (size, B, T))), jnp.int32)
        case "key_value_segment_ids":
            return jnp.asarray(np.sort(rng.integers(0, 3, (size, B, S))), jnp.int32)
        case "sinks":
            return normal(name, size, N)
        case "dropout_rng":
            return jax.random.split(jax.random.key(1), size)
    raise KeyError(name)


ARGUMENTS = (
    "query",
    "key",
    "value",
    "bias",
    "mask",
    "query_seq_lengths",
    "key_value_seq_lengths",
    "query_segment_ids",
    "key_value_segment_ids",
    "sinks",
    "dropout_rng",
)
FLOATING = ("query", "key", "value", "bias", "sinks")
SUBSETS = [
    *((name,) for name in ARGUMENTS),
    ("query", "key", "value"),
    ("key", "bias", "sinks"),
    ("mask", "key_value_seq_lengths", "dropout_rng"),
    ("query_segment_ids", "key_value_segment_ids"),
    ARGUMENTS,
]


ORDINARY = [("query",), ("mask", "key_value_seq_lengths", "dropout_rng"), ARGUMENTS]


def attend(backend: Backend, arguments: dict[str, Any]) -> Any:
    return backend(
        **arguments,
        is_causal=True,
        causal_alignment="bottom_right",
        dropout_rate=0.2,
        return_residual=True,
    )


def loss_and_results(backend: Backend, floats: dict[str, Any], rest: dict[str, Any]) -> Any:
    out, lse = attend(backend, floats | rest)
    return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum(), (out, lse)


def loss(backend: Backend, floats: dict[str, Any], rest: dict[str, Any]) -> jax.Array:
    return loss_and_results(backend, floats, rest)[0]


def gradients(backend: Backend) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    """The gradients of `loss`, and the results."""
    return jax.grad(partial(loss_and_results, backend), has_aux=True)


def split(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    floats = {name: x for name, x in arguments.items() if name in FLOATING}
    return floats, {name: x for name, x in arguments.items() if name not in FLOATING}


def assert_close(found: Any, expected: Any) -> None:
    """Equal up to the order of float32 sums."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(np.where(np.isfinite(b), b, 0.0)).max(initial=0.0)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance.of_sums(S + H, 1 + scale))


@pytest.fixture(scope="module")
def per_example() -> Callable[[Backend, tuple[str, ...]], Any]:
    """Results and gradients of each example of a vmapped call, one compilation for all."""
    compiled: dict[Backend, Any] = {}

    def run(backend: Backend, mapped: tuple[str, ...]) -> Any:
        if backend not in compiled:
            compiled[backend] = quick_jit(gradients(backend))
        examples = [
            compiled[backend](
                *split(
                    {name: one_of(name, EXAMPLES)[i if name in mapped else 0] for name in ARGUMENTS}
                )
            )
            for i in range(EXAMPLES)
        ]
        return jax.tree.map(lambda *x: jnp.stack(x), *examples)

    return run


@pytest.mark.parametrize(
    ("backend", "mapped"),
    [
        *((CHUNKED, mapped) for mapped in ORDINARY),
        (EAGER, ARGUMENTS),
        *thorough(*((CHUNKED, mapped) for mapped in SUBSETS if mapped not in ORDINARY)),
        *thorough(*((EAGER, mapped) for mapped in SUBSETS[-5:-1])),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, tuple) else str(x),
)
def test_vmap_over_any_subset_is_a_loop(
    backend: Backend, mapped: tuple[str, ...], per_example: Callable
) -> None:
    arguments = {
        name: one_of(name, EXAMPLES) if name in mapped else one_of(name, EXAMPLES)[0]
        for name in ARGUMENTS
    }
    axes = {name: 0 if name in mapped else None for name in ARGUMENTS}
    floats, rest = split(arguments)
    float_axes, rest_axes = split(axes)
    run = quick_jit(jax.vmap(gradients(backend), (float_axes, rest_axes)))
    assert_close(run(floats, rest), per_example(backend, mapped))


@pytest.mark.parametrize(
    ("backend", "mapped"),
    [
        (CHUNKED, ("bias",)),
        (EAGER, ARGUMENTS),
        *thorough((CHUNKED, ARGUMENTS), (EAGER, ("bias",))),
        *thorough(*((backend, ("query", "key", "value")) for backend in BACKENDS)),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, tuple) else str(x),
)
def test_gradient_of_vmap_sums_what_is_shared(
    backend: Backend, mapped: tuple[str, ...], per_example: Callable
) -> None:
    floats, rest = split(
        {
            name: one_of(name, EXAMPLES) if name in mapped else one_of(name, EXAMPLES)[0]
            for name in ARGUMENTS
        }
    )
    float_axes, rest_axes = split({name: 0 if name in mapped else None for name in ARGUMENTS})

    @quick_jit
    @jax.grad
    def gradient(floats: dict[str, Any], rest: dict[str, Any]) -> jax.Array:
        return jax.vmap(partial(loss, backend), (float_axes, rest_axes))(floats, rest).sum()

    each, _ = per_example(backend, mapped)
    expected = {name: x if name in mapped else x.sum(axis=0) for name, x in each.items()}
    assert_close(gradient(floats, rest), expected)


@pytest.mark.parametrize("backend", first(1, [CHUNKED, EAGER]), ids=str)
def test_vmap_over_other_axes_and_twice(backend: Backend) -> None:
    q, k, v = normal("q", B, T, 2, 3, N, H), normal("k", B, S, 3, K, H), normal("v", B, S, 2, K, H)
    one = quick_jit(partial(backend, is_causal=True))
    inner = jax.vmap(partial(backend, is_causal=True), (2, 2, None), 1)
    both = quick_jit(jax.vmap(inner, (2, None, 2), 0))(q, k, v)
    assert both.shape == (2, B, 3, T, N, H)
    for i in range(2):
        for j in range(3):
            alone = one(q[:, :, i, j], k[:, :, j], v[:, :, i])
            assert_close(both[i, :, j], alone)


@pytest.mark.parametrize("backend", first(1, [CHUNKED, DEFAULT]), ids=str)
def test_without_jit_it_is_the_same(backend: Backend) -> None:
    q, k, v = (one_of(name, 1)[0] for name in ("query", "key", "value"))

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        out, vjp = jax.vjp(partial(backend, is_causal=True), q, k, v)
        return out, vjp(out)

    assert_close(run(q, k, v), jax.jit(run)(q, k, v))


@pytest.mark.parametrize("backend", first(1, [CHUNKED, EAGER]), ids=str)
def test_checkpoint_changes_nothing(backend: Backend) -> None:
    names = ("query", "key", "value", "bias", "key_value_seq_lengths", "dropout_rng")
    floats, rest = split({name: one_of(name, 1)[0] for name in names})

    def layer(floats: dict[str, Any]) -> jax.Array:
        return loss(backend, floats, rest)

    expected = quick_jit(jax.grad(layer))(floats)
    for policy in (None, jax.checkpoint_policies.dots_saveable):
        found = quick_jit(jax.grad(jax.checkpoint(layer, policy=policy)))(floats)
        assert_close(found, expected)


@pytest.mark.parametrize("backend", first(1, [CHUNKED, EAGER]), ids=str)
def test_scan_over_layers_is_a_loop(backend: Backend) -> None:
    x = normal("x", 1, T, 2, H)
    weights = normal("w", 3, H, H)

    def layer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = x + backend(x @ w, x, x, is_causal=True)
        return y, y.sum()

    def scanned(weights: jax.Array) -> jax.Array:
        return jax.lax.scan(jax.checkpoint(layer), x, weights)[1].sum()

    def looped(weights: jax.Array) -> jax.Array:
        y, total = x, jnp.zeros(())
        for w in weights:
            y, part = layer(y, w)
            total += part
        return total

    assert_close(
        quick_jit(jax.value_and_grad(scanned))(weights),
        quick_jit(jax.value_and_grad(looped))(weights),
    )


@pytest.mark.parametrize("backend", first(1, [CHUNKED, EAGER]), ids=str)
def test_lengths_may_be_computed_under_jit(backend: Backend) -> None:
    q, k = normal("q", B, T, N, H), normal("k", B, S, K, H)

    @quick_jit
    def run(lengths: jax.Array) -> jax.Array:
        return backend(q, k, k, key_value_seq_lengths=lengths + 1)

    for lengths in ([0, 3], [S, 7]):
        known = jnp.array(lengths, jnp.int32) + 1
        expected = quick_jit(partial(backend, key_value_seq_lengths=known))(q, k, k)
        assert_close(run(jnp.array(lengths, jnp.int32)), expected)


def test_it_is_transposed_by_value_alone_in_which_it_is_linear() -> None:
    q, k, v, d_out = (normal(x, B, T, K, H) for x in ("q", "k", "v", "d"))

    @quick_jit
    def transposed(d_out: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda v: DEFAULT(q, k, v, is_causal=True), v)(d_out)[0]

    _, vjp = jax.vjp(lambda v: EAGER(q, k, v, is_causal=True), v)
    assert_close(transposed(d_out), vjp(d_out)[0])
    with pytest.raises(NotImplementedError, match=r"by value alone.* not by query"):
        jax.linear_transpose(lambda q: DEFAULT(q, k, v), q)(d_out)


@pytest.mark.parametrize("backend", first(1, [CHUNKED, EAGER, DEFAULT]), ids=str)
def test_two_runs_give_the_same_bits(backend: Backend) -> None:
    arguments = {name: one_of(name, 1)[0] for name in ARGUMENTS}
    run = jax.jit(gradients(backend))
    first = run(*split(arguments))
    for _ in range(3):
        again = run(*split(arguments))
        for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", first(1, [CHUNKED, EAGER]), ids=str)
def test_gradients_in_float64_are_finite_differences(backend: Backend) -> None:
    with jax.enable_x64(True):
        floats, rest = split({name: one_of(name, 1)[0] for name in ARGUMENTS})
        floats = {name: x.astype(jnp.float64) for name, x in floats.items()}

        @jax.jit
        def results(floats: dict[str, Any]) -> Any:
            out, lse = attend(backend, floats | rest)
            return out, jnp.where(jnp.isfinite(lse), lse, 0.0)

        assert {x.dtype for x in jax.tree.leaves(results(floats))} == {np.dtype("float64")}
        check_grads(results, (floats,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("soft_cap", first(1, [2.0, None]))
def test_float64_is_as_exact_as_float64(soft_cap: float | None) -> None:
    with jax.enable_x64(True):
        q, k = (normal(n, 2, 20, 2, 4).astype(jnp.float64) for n in "qk")
        run = {
            backend: jax.jit(
                jax.value_and_grad(
                    lambda q, k, backend=backend: (
                        backend(q, k, k, logits_soft_cap=soft_cap) ** 2
                    ).sum(),
                    (0, 1),
                )
            )(q, k)
            for backend in BACKENDS
        }
        for a, b in zip(jax.tree.leaves(run[EAGER]), jax.tree.leaves(run[CHUNKED]), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


QKV = tuple(normal(name, 1, 5, 2, 3) for name in "qkv")
TANGENTS = tuple(normal(name, 1, 5, 2, 3) for name in ("dq", "dk", "dv"))


class TestForwardMode:
    """That of `eager`, which JAX makes of the formula: what all others are held to."""

    q, k, v = QKV
    tangents = TANGENTS

    def scalar(self, backend: Backend, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        lengths = jnp.array([4], jnp.int32)
        out, lse = backend(
            q, k, v, is_causal=True, key_value_seq_lengths=lengths, return_residual=True
        )
        return (out**3).sum() + (lse**2).sum()

    def test_eager_has_jvp(self) -> None:
        with jax.enable_x64(True):
            q, k, v, *tangents = (
                x.astype(jnp.float64) for x in (self.q, self.k, self.v, *self.tangents)
            )
            f = jax.jit(partial(self.scalar, EAGER))
            _, found = jax.jvp(f, (q, k, v), tuple(tangents))
            step = 1e-6
            ends = [
                f(*(x + sign * step * dx for x, dx in zip((q, k, v), tangents, strict=True)))
                for sign in (1, -1)
            ]
            np.testing.assert_allclose(found, (ends[0] - ends[1]) / (2 * step), rtol=1e-7)

    def test_eager_has_second_derivatives(self) -> None:
        with jax.enable_x64(True):
            arrays = tuple(x.astype(jnp.float64) for x in (self.q, self.k, self.v))
            f = partial(self.scalar, EAGER)
            modes = [(jax.jacfwd, jax.jacrev), (jax.jacrev, jax.jacfwd), (jax.jacrev, jax.jacrev)]
            found = [quick_jit(outer(inner(f)))(*arrays) for outer, inner in modes]
            assert np.abs(found[0]).max() > 0.1
            for other in found[1:]:
                np.testing.assert_allclose(other, found[0], rtol=0, atol=1e-12)

    def test_eager_hessian_is_finite_differences_of_the_gradient(self) -> None:
        with jax.enable_x64(True):
            q, k, v = (x.astype(jnp.float64) for x in (self.q, self.k, self.v))
            gradient = jax.jit(jax.grad(partial(self.scalar, EAGER)))
            hessian = jax.jit(jax.hessian(partial(self.scalar, EAGER)))(q, k, v)
            step = 1e-6
            for index in [(0, 0, 0, 0), (0, 2, 1, 2), (0, 4, 0, 1)]:
                moved = gradient(q.at[index].add(step), k, v) - gradient(
                    q.at[index].add(-step), k, v
                )
                column = hessian[(..., *index)]
                np.testing.assert_allclose(column, moved / (2 * step), rtol=0, atol=1e-6)

    def test_eager_derivatives_of_hidden_rows_are_zero(self) -> None:
        lengths = jnp.array([0], jnp.int32)
        f = partial(EAGER, key_value_seq_lengths=lengths)
        out, tangent = quick_jit(partial(jax.jvp, f))((self.q, self.k, self.v), self.tangents)
        assert (np.asarray(out) == 0).all()
        assert (np.asarray(tangent) == 0).all()

    def test_linear_transposition_through_a_scan_still_works(self) -> None:
        def f(q: jax.Array) -> jax.Array:
            step = lambda x, _: (CHUNKED(x, self.k, self.v), None)  # noqa: E731
            return jax.lax.scan(step, q, length=2)[0].sum()

        def g(q: jax.Array) -> jax.Array:
            return CHUNKED(CHUNKED(q, self.k, self.v), self.k, self.v).sum()

        assert_close(jax.grad(f)(self.q), jax.grad(g)(self.q))
