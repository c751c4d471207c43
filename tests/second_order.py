"""The first and second derivatives of a case's call, in every mode, held to float64.

With f the output and the log-sum-exp, of all operands that have a gradient; t and u tangents, and c
cotangents that move along tc:

    tangent              f's tangent along t
    forward_reverse      of f's gradients at c the tangent, along t and tc
    reverse_forward      the gradients of c times that tangent, by the operands and by t
    reverse_reverse      the gradients of t times f's gradients, by the operands and by c
    forward_forward      of f's tangent along t the tangent, along u
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import tolerance
from tests.backends import EAGER, Backend, call, quick_jit
from tests.cases import Case, Operands, operands
from tests.reference import float64

__all__ = ["MODES", "check", "directions", "planted"]

type Tree = dict[str, Any]


def _results(backend: Backend, drawn: Operands, x: Tree) -> Any:
    out, lse = call(backend, drawn, x, return_residual=True)
    return out, jnp.where(jnp.isfinite(lse), lse, 0)


def _gradients(f: Callable[[Tree], Any], x: Tree, c: Any) -> Any:
    return jax.vjp(f, x)[1](c)[0]


def _inner(a: Any, b: Any) -> Any:
    """The sum over the products of two trees."""

    def wide(x: Any) -> Any:
        return x if x.dtype.itemsize > 2 else x.astype(jnp.float32)

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum((wide(x) * wide(y)).sum() for x, y in pairs)


def _tangent(f: Any, d: Tree) -> Any:
    return jax.jvp(f, (d["x"],), (d["t"],))[1]


def _forward_reverse(f: Any, d: Tree) -> Any:
    return jax.jvp(partial(_gradients, f), (d["x"], d["c"]), (d["t"], d["tc"]))[1]


def _reverse_forward(f: Any, d: Tree) -> Any:
    def weighted(x: Tree, t: Tree) -> Any:
        return _inner(jax.jvp(f, (x,), (t,))[1], d["c"])

    return jax.grad(weighted, (0, 1))(d["x"], d["t"])


def _reverse_reverse(f: Any, d: Tree) -> Any:
    def weighted(x: Tree, c: Any) -> Any:
        return _inner(_gradients(f, x, c), d["t"])

    return jax.grad(weighted, (0, 1))(d["x"], d["c"])


def _forward_forward(f: Any, d: Tree) -> Any:
    return jax.jvp(lambda x: jax.jvp(f, (x,), (d["t"],))[1], (d["x"],), (d["u"],))[1]


MODES: dict[str, Callable[[Any, Tree], Any]] = {
    "tangent": _tangent,
    "forward_reverse": _forward_reverse,
    "reverse_forward": _reverse_forward,
    "reverse_reverse": _reverse_reverse,
    "forward_forward": _forward_forward,
}


def directions(case: Case, seed: int) -> Tree:
    """The operands of a case that have gradients, tangents for them, and cotangents."""
    drawn = operands(case, seed)
    rng = np.random.default_rng([seed, zlib.crc32(case.name.encode()), 2])

    def like(x: Any) -> Any:
        return rng.standard_normal(np.shape(x)).astype(x.dtype)

    x = drawn.differentiable
    t, u = jax.tree.map(like, x), jax.tree.map(like, x)
    c = (drawn["dout"], drawn["dlse"])
    return {"x": x, "t": t, "u": u, "c": c, "tc": jax.tree.map(like, c)}


def planted(case: Case, d: Tree, poison: float) -> Tree:
    """The same, with poison in what lies past the lengths: operands, tangents and cotangents."""
    lengths = {"q": case.query_lengths, "k": case.key_lengths, "v": case.key_lengths}

    def of(name: str, x: Any) -> Any:
        if lengths.get(name) is None:
            return x
        x = np.array(x)
        for row, length in zip(x, lengths[name] or (), strict=True):
            row[max(length, 0) :] = poison
        return x

    tangents = {way: {name: of(name, x) for name, x in d[way].items()} for way in "xtu"}
    return d | tangents | {way: (of("q", d[way][0]), d[way][1]) for way in ("c", "tc")}


def _computed(backend: Backend, case: Case, seed: int, modes: tuple[str, ...], d: Tree) -> Tree:
    drawn = operands(case, seed)

    def everything(d: Tree) -> Tree:
        f = partial(_results, backend, drawn)
        dtype = jax.eval_shape(f, d["x"])[1].dtype
        c, tc = ((out, lse.astype(dtype)) for out, lse in (d["c"], d["tc"]))
        return {mode: MODES[mode](f, d | {"c": c, "tc": tc}) for mode in modes}

    run = everything if backend.name == "flash_interpreted" else quick_jit(everything)
    return run(jax.tree.map(jnp.asarray, d))


@cache
def _expected(case: Case, seed: int, modes: tuple[str, ...]) -> tuple[Tree, Tree]:
    """What eager gives in the case's dtype, and in float64."""
    d = directions(case, seed)
    peer = _computed(EAGER, case, seed, modes, d)
    with jax.enable_x64(True):
        exact = _computed(EAGER, case, seed, modes, jax.tree.map(lambda x: x.astype(np.float64), d))
    return peer, jax.tree.map(float64, exact)


def check(
    backend: Backend,
    case: Case,
    seed: int,
    modes: tuple[str, ...] = tuple(MODES),
    poison: float = np.nan,
) -> None:
    """Each mode's results are as exact as eager's, and finite where only lengths hide NaN."""
    found = _computed(backend, case, seed, modes, planted(case, directions(case, seed), poison))
    peer, exact = _expected(case, seed, modes)
    assert jax.tree.structure(found) == jax.tree.structure(exact)
    named = jax.tree_util.tree_leaves_with_path(found)
    for (path, got), other, true in zip(named, *map(jax.tree.leaves, (peer, exact)), strict=True):
        name = jax.tree_util.keystr(path)
        assert got.dtype == other.dtype, name
        times = None if path[0].key == "tangent" else tolerance.SECOND_ORDER
        tolerance.check_against_peer(name, got, other, true, np.abs(true), case.dtype, times=times)
