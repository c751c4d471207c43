"""Calls with numbers at the ends of their range, and every backend that is to get them right."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import reference, tolerance
from tests.backends import CHUNKED, EAGER, Backend, Results, quick_jit
from tests.hopper import exact as hopper
from tests.portable import exact as portable

EVERY = [EAGER, CHUNKED, portable.FLASH, portable.CHUNKED]
HOPPER = hopper.FLASH if portable.ON_GPU else hopper.INTERPRETED

_NAMES = {"query": "q", "key": "k", "value": "v"}


def compute(backend: Backend, arrays: Results, cotangents: Any, **options: Any) -> Results:
    """Output, log-sum-exp and the gradients of both by each array, named as the arguments."""
    lengths = {n: jnp.array(options.pop(n)) for n in list(options) if "lengths" in n}
    run = _everything(backend, tuple(sorted(options.items())))
    found: Results = run(*jax.tree.map(jnp.asarray, (arrays, lengths, cotangents)))
    return found


@cache
def _everything(backend: Backend, options: tuple[tuple[str, Any], ...]) -> Any:
    """Compiled once for each backend, options and shapes."""

    def everything(arrays: Results, lengths: Results, cotangents: Any) -> Results:
        (out, lse), vjp = jax.vjp(
            lambda arrays: backend(**arrays, **lengths, **dict(options), return_residual=True),
            arrays,
        )
        return {"out": out, "lse": lse, **vjp(cotangents)[0]}

    # The interpreter's effects cannot be compiled where a call is partitioned.
    return everything if backend is hopper.INTERPRETED else quick_jit(everything)


def check(
    backend: Backend, arrays: Results, *, seen: reference.Bools | None = None, **options: Any
) -> Results:
    """`backend`'s results, held to float64 as every backend is; all of them, for more to be said.

    seen: the boolean mask that the options stand for; None if they hide nothing.
    """
    query, key, value = (arrays[name] for name in _NAMES)
    (b, t, n, _), s, d = query.shape, key.shape[1], value.shape[3]
    rng = np.random.default_rng(5)
    d_out = rng.standard_normal((b, t, n, d)).astype(query.dtype)
    d_lse = rng.standard_normal((b, t, n)).astype(np.float32)
    exact = reference.attention(
        query, key, value,
        bias=arrays.get("bias"),
        sinks=arrays.get("sinks"),
        soft_cap=options.get("logits_soft_cap"),
        scale=options.get("scale"),
        seen=reference.visible(b, t, s) if seen is None else seen,
    )  # fmt: skip
    values = {"out": exact.out, "lse": exact.lse, **exact.gradients(d_out, d_lse)}
    magnitudes = exact.magnitudes(d_out, d_lse)
    found = compute(backend, arrays, (d_out, d_lse), **options)
    peer = cache(partial(compute, EAGER, arrays, (d_out, d_lse), **options))
    for name, got in found.items():
        own = _NAMES.get(name, name)
        if backend is EAGER:
            largest = np.abs(values[own][np.isfinite(values[own])]).max(initial=0.0)
            few = 64 * tolerance.epsilon(query.dtype) * (largest + magnitudes[own].max())
            assert tolerance.error(got, values[own]) <= few, name
        else:
            tolerance.check_against_peer(
                name,
                got,
                partial(lambda name: peer()[name], name),
                values[own],
                magnitudes[own],
                query.dtype,
            )
    return found
