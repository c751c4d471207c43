"""The portable kernels of tangents as functions of a case's arrays, beside what eager makes of it.

In float64 eager says what is right, in the case's dtype how far off it may be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jattn.call.arguments import attention_call
from jattn.call.masking import past_zeroed
from jattn.call.row_arrays import BackwardTangentRows, TangentRows
from jattn.call.spec import AttentionSpec, Operands, Tangents
from jattn.transforms.rows import row_term
from pallas_kernels.portable import flash
from pallas_kernels.portable.backward_tangent import backward_tangent
from pallas_kernels.portable.elements import base
from pallas_kernels.portable.tangent import tangent
from pallas_kernels.portable.tangent_tiles import BackwardTiles
from pallas_kernels.portable.tiles import Tiles
from pallas_kernels.portable.triton import LN2
from tests import formula, long_reference, reference, tolerance
from tests.backends import Backend, Results, call, kept, quick_jit
from tests.cases import Case, operands
from tests.portable.exact import ON_GPU

NAMES = {"q": "query", "k": "key", "v": "value"}
TINY = Tiles(16, 16, 4, 2)  # several blocks of each kind in few positions


@cache
def directions(case: Case, seed: int, names: str = "", scale: bool = False) -> Results:
    """Tangents of the operands of these names, or of all that are differentiable, by name."""
    arrays = arrays_of(case, seed, scale)
    wanted = names.split() or list(arrays)
    rng = np.random.default_rng([seed, 77])
    return {
        name: np.asarray(rng.standard_normal(x.shape), x.dtype)
        for name, x in arrays.items()
        if name in wanted
    }


def arrays_of(case: Case, seed: int, scale: bool = False) -> Results:
    """The operands that may have a tangent; with a scale, if it is to be an array."""
    found = dict(operands(case, seed).differentiable)
    return found | {"scale": np.float32(case.scale or 0.3)} if scale else found


def attend(attention: Callable[..., Any], case: Case, seed: int, arrays: Results) -> Any:
    """The call on arrays that may have a scale among them, batch axis and log-sum-exp included."""
    drawn = operands(case, seed)
    if "scale" not in arrays:
        return call(Backend("", attention), drawn, arrays, return_residual=True)
    scale = arrays["scale"]

    def scaled(*args: Any, **options: Any) -> Any:
        return attention(*args, **{**options, "scale": scale})

    return call(Backend("", scaled), drawn, arrays, return_residual=True)


def pushed(
    attention: Callable[..., Any], arrays: Results, moving: Results, *, case: Case, seed: int
) -> Results:
    """Output and log-sum-exp of eager, or of another attention, and their tangents."""

    def function(moving: Results) -> Any:
        return attend(attention, case, seed, arrays | moving)

    primal = {name: arrays[name] for name in moving}
    (out, lse), (t_out, t_lse) = jax.jvp(function, (primal,), (moving,))
    dead = lse == -jnp.inf
    return {"out": out, "lse": jnp.where(dead, 0, lse), "t_out": t_out, "t_lse": t_lse}


def saved(case: Case, seed: int, arrays: Results) -> Any:
    """The call as the kernels take it, and what forward gives: output, top, rest with the sink.

    And the sink's weights, (B, T, N), or None.
    """
    spec, own = called(case, seed, arrays)
    out, top, rest = flash.forward(spec, own, interpret=not ON_GPU)
    own, rest, share = with_sinks(own, top * (base(spec) * LN2), rest)
    return spec, own, out, top, rest, share


def called(case: Case, seed: int, arrays: Results) -> tuple[AttentionSpec, Operands]:
    """The call as the kernels take it."""
    found: list[Any] = []

    def record(*args: Any, **options: Any) -> Any:
        made = attention_call(*args, **options)
        found.append(made)
        return jnp.zeros((1,)), jnp.zeros((1,))

    attend(record, case, seed, arrays)
    return found[0].spec, found[0].operands


def with_sinks(own: Operands, top: Any, rest: Any) -> tuple[Operands, Any, Any]:
    """Operands without the sinks, `rest` with them, and their weights, (B, T, N), or None.

    top: natural.
    """
    if own.sinks is None:
        return own, rest, None
    finite = jnp.where(top == -jnp.inf, 0, top)
    sinks = own.sinks.astype(jnp.float32)[None, None] - finite
    rest = jnp.logaddexp(rest, sinks)
    share = jnp.where(top == -jnp.inf, 0, jnp.exp(sinks - rest))
    return own._replace(sinks=None), rest, share


def tangents_of(case: Case, moving: Mapping[str, Any]) -> Tangents:
    """Those of the operands that the kernels look at, shaped as these."""
    found = {NAMES.get(name, name): jnp.asarray(x) for name, x in moving.items() if name != "sinks"}
    if "scale" in found:
        found["scale"] = found["scale"].reshape(1)
    return Tangents(**found)


def of_sinks(moving: Results, share: Any) -> Any:
    """The sinks' part of the log-sum-exp's tangent; None if they have none."""
    if "sinks" not in moving:
        return None
    return share * moving["sinks"].astype(jnp.float32)[None, None]


def log_sum_exp(spec: Any, top: Any, rest: Any) -> Any:
    """Natural, 0 of a row that sees no key."""
    return jnp.where(top == -jnp.inf, 0, top * (base(spec) * LN2) + rest)


def pushed_by_kernel(
    arrays: Results, moving: Results, *, case: Case, seed: int, tiles: Tiles | None
) -> Results:
    """`pushed` by the kernels."""
    spec, own, out, top, rest, share = saved(case, seed, arrays)
    t_out, mu = tangent(
        spec, own, TangentRows(top, rest, out, of_sinks(moving, share)), tangents_of(case, moving),
        tiles=tiles, interpret=not ON_GPU,
    )  # fmt: skip
    return {"out": out, "lse": log_sum_exp(spec, top, rest), "t_out": t_out, "t_lse": mu}


def pulled(
    attention: Callable[..., Any],
    arrays: Results,
    moving: Results,
    gradients: Results,
    *,
    case: Case,
    seed: int,
) -> Results:
    """How the gradients of eager, or of another attention, change along the tangents.

    gradients: of the output and the log-sum-exp, "dout" and "dlse", and their tangents with a "t_".
    """

    def function(moving: Results, gradients: tuple[Any, Any]) -> Any:
        _, vjp = jax.vjp(lambda x: attend(attention, case, seed, x), arrays | moving)
        d_out, d_lse = gradients
        kind = jnp.float64 if d_out.dtype == jnp.float64 else jnp.float32
        return vjp((d_out, d_lse.astype(kind)))[0]

    own = (gradients["dout"], gradients["dlse"])
    t_own = jax.tree.map(jnp.zeros_like, own)
    if "t_dout" in gradients:
        t_own = (gradients["t_dout"], gradients["t_dlse"])
    primal = {name: arrays[name] for name in moving}
    found: Results = jax.jvp(function, (primal, own), (moving, t_own))[1]
    return {name: x for name, x in found.items() if name != "sinks"}


def pulled_by_kernel(
    arrays: Results,
    moving: Results,
    gradients: Results,
    *,
    case: Case,
    seed: int,
    tiles: Tiles | None,
    wanted: tuple[str, ...],
) -> Results:
    """`pulled` by the kernels."""
    spec, own, out, top, rest, share = saved(case, seed, arrays)
    tangents = tangents_of(case, moving)
    t_out, mu = tangent(
        spec, own, TangentRows(top, rest, out, of_sinks(moving, share)), tangents,
        tiles=tiles, interpret=not ON_GPU,
    )  # fmt: skip
    d_out, t_d_out = (gradients.get(name) for name in ("dout", "t_dout"))
    if own.query_lengths is not None:
        d_out, t_d_out = (
            None if x is None else past_zeroed(x, own.query_lengths) for x in (d_out, t_d_out)
        )
    term = row_term(top, out, d_out, gradients["dlse"])
    t_term = row_term(top, t_out, d_out, gradients.get("t_dlse", 0))
    if t_d_out is not None:
        t_term = t_term + row_term(top, out, t_d_out)
    rows = BackwardTangentRows(top, rest, d_out, term, mu, t_term, t_d_out)
    found = backward_tangent(
        spec, own, rows, tangents, wanted=wanted,
        tiles=None if tiles is None else BackwardTiles(tiles, tiles, tiles),
        interpret=not ON_GPU,
    )  # fmt: skip
    short = {long: name for name, long in NAMES.items()}
    results = {short.get(name, name): x for name, x in zip(wanted, found, strict=True)}
    if "scale" in results:
        results["scale"] = results["scale"].sum()
    return results


def expected_pushed(case: Case, seed: int, arrays: Results, moving: Results) -> formula.Expected:
    """What is right; on a GPU by a program for many calls."""
    given = (arrays, moving)
    exact = long_reference.pushed(operands(case, seed), kept(case), *given) if ON_GPU else None
    return formula.expected(partial(pushed, case=case, seed=seed), *given, exact=exact)


def expected_pulled(
    case: Case, seed: int, arrays: Results, moving: Results, gradients: Results
) -> formula.Expected:
    given = (arrays, moving, gradients)
    exact = long_reference.pulled(operands(case, seed), kept(case), *given) if ON_GPU else None
    return formula.expected(partial(pulled, case=case, seed=seed), *given, exact=exact)


def size_of_t_lse(case: Case, seed: int, arrays: Results, moving: Results) -> Any:
    """What the roundings of the log-sum-exp's tangent are relative to."""
    drawn = operands(case, seed)
    options = {name: arrays[name] for name in ("bias", "sinks") if name in arrays}
    made = reference.attention(
        arrays["q"], arrays["k"], arrays["v"], seen=drawn.seen,
        scale=arrays.get("scale", case.scale), soft_cap=case.soft_cap, **options,
    )  # fmt: skip
    return made.tangent_magnitude({name: x for name, x in moving.items() if name != "v"})


def within(
    name: str,
    got: Any,
    expected: formula.Expected,
    *,
    case: Case,
    times: float,
    size: Callable[[], Any] | None = None,
) -> None:
    """At most so many times as far from exact as the peer, and a few units of rounding.

    Those are of the call's dtype for the gradient of a bias in float32 too, but for none of the
    log-sum-exp. size: of the terms that are added up, no less than the result's; by default that.
    """
    kind, exact = expected.kinds[name], expected.exact[name]
    assert got.dtype == kind.dtype, name
    dtype = got.dtype if name == "t_lse" else max(case.dtype, got.dtype, key=tolerance.epsilon)
    found = tolerance.error(got, exact)
    if found <= tolerance.allowed(name, 0.0, exact, np.abs(exact), dtype, times):
        return
    bound = tolerance.allowed(
        name,
        tolerance.error(expected.peer()[name], exact),
        exact,
        np.abs(exact) if size is None else size(),
        dtype,
        times,
    )
    assert found <= bound, f"{name}: error {found:.3g}, allowed {bound:.3g}"


def check_tangent(
    case: Case,
    seed: int,
    names: str = "",
    *,
    scale: bool = False,
    tiles: Tiles | None = TINY,
    arrays: Results | None = None,
    moving: Results | None = None,
) -> Results:
    """The kernel's tangents are as exact as eager's; gives what it found."""
    arrays = arrays_of(case, seed, scale) if arrays is None else arrays
    moving = directions(case, seed, names, scale) if moving is None else moving
    run = partial(pushed_by_kernel, case=case, seed=seed, tiles=tiles)
    found: Results = quick_jit(run)(arrays, moving)
    check_pushed(found, case, seed, arrays, moving)
    return found


def check_pushed(found: Results, case: Case, seed: int, arrays: Results, moving: Results) -> None:
    """Tangents, and what else `pushed` gives, are as exact as eager's."""
    expected = expected_pushed(case, seed, arrays, moving)
    size = partial(size_of_t_lse, case, seed, arrays, moving)
    for name, got in found.items():
        times = 2 if name in tolerance.FORWARD else 3
        own = size if name == "t_lse" else None
        within(name, got, expected, case=case, times=times, size=own)


def check_backward_tangent(
    case: Case,
    seed: int,
    names: str | None = None,
    *,
    moves_gradients: bool = True,
    scale: bool = False,
    wanted: str = "",
    tiles: Tiles | None = TINY,
    arrays: Results | None = None,
) -> Results:
    """The kernels' tangents of the gradients are as exact as eager's; gives what it found.

    names: of the operands that move, all by default; wanted: of the gradients, all by default.
    """
    drawn = operands(case, seed)
    arrays = arrays_of(case, seed, scale) if arrays is None else arrays
    moving = directions(case, seed, names or "", scale) if names != "" else {}
    gradients = {"dout": drawn["dout"], "dlse": drawn["dlse"]}
    if moves_gradients:
        rng = np.random.default_rng([seed, 78])
        for name in ("dout", "dlse"):
            x = drawn[name]
            gradients[f"t_{name}"] = np.asarray(rng.standard_normal(x.shape), x.dtype)
    found_names = [NAMES.get(name, name) for name in arrays if name != "sinks"]
    chosen = tuple(wanted.split() or found_names)
    run = partial(pulled_by_kernel, case=case, seed=seed, tiles=tiles, wanted=chosen)
    found: Results = quick_jit(run)(arrays, moving, gradients)
    expected = expected_pulled(case, seed, arrays, moving, gradients)
    for name, got in found.items():
        within(name, got, expected, case=case, times=5)
    return found
