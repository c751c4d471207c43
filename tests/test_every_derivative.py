"""Everything JAX makes of a function's derivative, of every backend: the formula's results."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import pytest

import jattn
from tests import formula, tolerance
from tests.backends import CHUNKED, EAGER, Backend, quick_jit
from tests.cases import thorough
from tests.hopper import exact as hopper
from tests.portable import exact as portable
from tests.test_transforms import assert_close, normal

B, T, S, N, K, H = 1, 7, 9, 2, 1, 4
SHAPES = (B, T, N, H), (B, S, K, H), (B, S, K, H)
QKV = tuple(normal(name, *shape) for name, shape in zip("qkv", SHAPES, strict=True))
ALONG = tuple(normal(f"t{name}", *shape) for name, shape in zip("qkv", SHAPES, strict=True))
TWO = tuple(jnp.stack([t, x]) for t, x in zip(ALONG, QKV, strict=True))
WANT = normal("want", B, T, N, H)

type Attend = Callable[..., jax.Array]
EVERY = (0, 1, 2)


def loss(attend: Attend, *x: jax.Array) -> jax.Array:
    return (attend(*x) ** 2).sum()


def gradients(attend: Attend, *x: jax.Array) -> Any:
    return jax.grad(partial(loss, attend), EVERY)(*x)


def hvp(f: Callable[..., jax.Array], x: Any, t: Any) -> Any:
    return jax.jvp(jax.grad(f, EVERY), x, t)[1]


def reverse_over_reverse(attend: Attend, *x: jax.Array) -> Any:
    def along(*x: jax.Array) -> jax.Array:
        return sum((g * t).sum() for g, t in zip(gradients(attend, *x), ALONG, strict=True))

    return jax.grad(along, EVERY)(*x)


def of_the_tangent(attend: Attend, *x: jax.Array) -> Any:
    def squared(x: Any, t: Any) -> jax.Array:
        return (jax.jvp(attend, x, t)[1] ** 2).sum()

    return jax.grad(squared, (0, 1))(x, ALONG)


def mean_flow(attend: Attend, *x: jax.Array) -> jax.Array:
    """The tangent is in the target, which is not differentiated (MeanFlow, 2025, algorithm 1)."""
    u, du = jax.jvp(attend, x, ALONG)
    return ((u - jax.lax.stop_gradient(WANT - du)) ** 2).sum()


def terminal_velocity(attend: Attend, *x: jax.Array) -> jax.Array:
    """The tangent is differentiated too."""
    u, du = jax.jvp(attend, x, ALONG)
    return ((u + du - WANT) ** 2).sum()


def penalty(attend: Attend, *x: jax.Array) -> jax.Array:
    return sum((g**2).sum() for g in gradients(attend, *x))


def stopped_hvp(attend: Attend, *x: jax.Array) -> jax.Array:
    along = hvp(partial(loss, attend), x, ALONG)
    return sum((a * jax.lax.stop_gradient(b)).sum() for a, b in zip(x, along, strict=True))


def scanned(attend: Attend, query: jax.Array, *rest: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda c, _: (attend(c, *rest), None), query, None, length=3)[0]


def in_shards(attend: Attend, *x: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.P("x")
    return jax.shard_map(attend, mesh=mesh, in_specs=(place,) * 3, out_specs=place)(*x)


def exported(attend: Attend, *x: jax.Array) -> Any:
    run = jax.jit(lambda *x: hvp(partial(loss, attend), x, ALONG))
    return jax.export.deserialize(jax.export.export(run)(*x).serialize()).call(*x)


WAYS: dict[str, Callable[..., Any]] = {
    "jvp": lambda f, *x: jax.jvp(f, x, ALONG),
    "one_moves": lambda f, q, *x: jax.jvp(lambda q: f(q, *x), (q,), ALONG[:1]),
    "grad": gradients,
    "forward_over_reverse": lambda f, *x: hvp(partial(loss, f), x, ALONG),
    "reverse_over_reverse": reverse_over_reverse,
    "reverse_over_forward": of_the_tangent,
    "forward_over_forward": lambda f, *x: jax.jvp(
        lambda *x: jax.jvp(f, x, ALONG)[1], x, tuple(t + 1 for t in ALONG)
    ),
    "mean_flow": lambda f, *x: jax.value_and_grad(partial(mean_flow, f), EVERY)(*x),
    "terminal_velocity": lambda f, *x: jax.value_and_grad(partial(terminal_velocity, f), EVERY)(*x),
    "gradient_penalty": lambda f, *x: jax.grad(partial(penalty, f), EVERY)(*x),
    "stopped_hvp": lambda f, *x: jax.grad(partial(stopped_hvp, f), EVERY)(*x),
    "third_order": lambda f, *x: jax.grad(
        lambda *x: sum((y**2).sum() for y in hvp(partial(loss, f), x, ALONG)), EVERY
    )(*x),
    "linearize": lambda f, *x: jax.linearize(f, *x)[1](*ALONG),
    "linear_transpose": lambda f, *x: jax.linear_transpose(jax.linearize(f, *x)[1], *x)(WANT),
    "vmap": lambda f, *x: jax.vmap(f, (0, None, 0))(TWO[0], x[1], TWO[2]),
    "vmap_of_jvp": lambda f, *x: jax.vmap(lambda *t: jax.jvp(f, x, t)[1])(*TWO),
    "vmap_of_grad": lambda f, *x: jax.vmap(partial(gradients, f), (0, None, None))(TWO[0], *x[1:]),
    "vmap_of_hvp": lambda f, *x: jax.vmap(lambda *t: hvp(partial(loss, f), x, t))(*TWO),
    "grad_of_vmap_of_jvp": lambda f, *x: jax.grad(
        lambda *x: (jax.vmap(lambda *t: jax.jvp(f, x, t)[1])(*TWO) ** 2).sum(), EVERY
    )(*x),
    "jacfwd": lambda f, *x: jax.jacfwd(f, EVERY)(*x),
    "jacrev": lambda f, *x: jax.jacrev(f, EVERY)(*x),
    "hessian": lambda f, *x: jax.hessian(partial(loss, f), EVERY)(*x),
    "remat_of_grad": lambda f, *x: jax.grad(jax.checkpoint(partial(loss, f)), EVERY)(*x),
    "remat_of_hvp": lambda f, *x: hvp(jax.checkpoint(partial(loss, f)), x, ALONG),
    "remat_with_policy": lambda f, *x: hvp(
        jax.checkpoint(
            partial(loss, f),
            policy=jax.checkpoint_policies.save_only_these_names(*jattn.CHECKPOINT_NAMES),
        ),
        x,
        ALONG,
    ),
    "scan_of_grad": lambda f, *x: jax.grad(lambda *x: scanned(f, *x).sum(), EVERY)(*x),
    "scan_of_jvp": lambda f, *x: jax.jvp(partial(scanned, f), x, ALONG)[1],
    "scan_of_hvp": lambda f, *x: hvp(lambda *x: (scanned(f, *x) ** 2).sum(), x, ALONG),
    "shard_map_of_grad": lambda f, *x: gradients(partial(in_shards, f), *x),
    "shard_map_of_jvp": lambda f, *x: jax.jvp(partial(in_shards, f), x, ALONG)[1],
    "shard_map_of_hvp": lambda f, *x: hvp(partial(loss, partial(in_shards, f)), x, ALONG),
    "export": exported,
}
ALONE = ("export",)  # jitted by itself, and not inside of another


@cache
def expected(way: str) -> Any:
    return run(EAGER, way)


def run(backend: Backend, way: str) -> Any:
    of = partial(WAYS[way], partial(backend, is_causal=True))
    return of(*QKV) if way in ALONE or backend is hopper.INTERPRETED else quick_jit(of)(*QKV)


# Those that no other goes through.
ALWAYS = (
    "mean_flow", "stopped_hvp", "linear_transpose", "vmap_of_hvp", "remat_with_policy",
    "shard_map_of_hvp",
)  # fmt: skip


@pytest.mark.parametrize(
    ("backend", "way"),
    [
        *((CHUNKED, way) for way in ALWAYS),
        *thorough(*((CHUNKED, way) for way in WAYS if way not in ALWAYS)),
        *thorough(*((portable.FLASH, way) for way in WAYS)),
        *thorough(*((portable.CHUNKED, way) for way in ("mean_flow", "vmap_of_hvp"))),
    ],
    ids=str,
)
def test_every_derivative_is_the_formulas(backend: Backend, way: str) -> None:
    assert_close(run(backend, way), expected(way))


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["mean_flow", "forward_over_reverse", "reverse_over_reverse"])
def test_derivatives_of_hopper_kernels_are_the_formulas(way: str) -> None:
    """In bfloat16, of a head dim that they take."""
    shapes = ((1, 40, 2, 64), (1, 40, 1, 64), (1, 40, 1, 64))
    x, t = (
        tuple(normal(f"{way}{i}", *shape).astype(jnp.bfloat16) for i, shape in enumerate(shapes))
        for way in ("x", "t")
    )

    def wide(f: Attend, *x: jax.Array) -> jax.Array:
        out = f(*x, is_causal=True)
        return out if out.dtype.itemsize > 2 else out.astype(jnp.float32)

    def total(f: Attend, *x: jax.Array) -> jax.Array:
        return (wide(f, *x) ** 2).sum()

    def of(f: Attend, x: Any, t: Any) -> Any:
        if way == "mean_flow":

            def flow(*x: jax.Array) -> jax.Array:
                u, du = jax.jvp(partial(wide, f), x, t)
                return ((u - jax.lax.stop_gradient(1 - du)) ** 2).sum()

            return jax.grad(flow, EVERY)(*x)
        if way == "forward_over_reverse":
            return hvp(partial(total, f), x, t)
        return jax.grad(
            lambda *x: sum((g**2).sum() for g in jax.grad(partial(total, f), EVERY)(*x)),
            EVERY,
        )(*x)

    expected = formula.expected(of, x, t)
    formula.compare(of(hopper.INTERPRETED, x, t), expected, times=tolerance.SECOND_ORDER)


def primitives(jaxpr: Any) -> list[str]:
    found = []
    for equation in jaxpr.eqns:
        found.append(equation.primitive.name)
        if not equation.primitive.name.startswith("attention"):
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                found += primitives(inner)
    return [name for name in found if name.startswith("attention")]


def test_reverse_mode_alone_is_forward_and_backward() -> None:
    """Nothing of the tangents is left in it, and of what is stopped nothing is made."""
    attend = partial(CHUNKED, is_causal=True)
    found = jax.jit(partial(gradients, attend)).trace(*QKV).jaxpr
    assert sorted(primitives(found)) == ["attention", "attention_backward"]
    flow = jax.jit(jax.grad(partial(mean_flow, attend), EVERY)).trace(*QKV).jaxpr
    assert sorted(primitives(flow)) == ["attention", "attention_backward", "attention_tangent"]
