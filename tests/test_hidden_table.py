"""What each kind of hiding stops, of the largest number, infinity and NaN, where nothing is seen.

    lengths                            all three: not a bit changes, nor by the output's gradient
    mask, segments, causal, windows    numbers; infinity and NaN stay in their row of the batch
    a bias of -inf                     likewise, where the product of query and key is finite

A call with a mask, a bias, segments and lengths is compiled once; each hides in its turn.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import cudnn_calls
from tests.backends import CHUNKED, EAGER, Backend, quick_jit
from tests.cases import first, thorough
from tests.hopper import exact as hopper
from tests.portable import exact as portable
from tests.portable.exact import ampere

__all__ = ["ampere"]

BATCH, QUERIES, KEYS, HEADS = 2, 24, 40, 2
NAN, INF = float("nan"), float("inf")
HOPPER = hopper.FLASH if portable.ON_GPU else hopper.INTERPRETED


class Way(NamedTuple):
    """The queries and keys that are hidden in the first row of the batch, and the options that do.

    is_static: these are no arrays.
    """

    queries: slice | None
    keys: slice
    options: dict[str, Any]
    is_static: bool = False


LOOSE = (slice(5, 8), slice(30, 37))
PAST = (slice(5, QUERIES), slice(30, KEYS))


def seen() -> Any:
    found = np.ones((BATCH, 1, QUERIES, KEYS), bool)
    found[0, :, LOOSE[0]] = found[0, :, :, LOOSE[1]] = False
    return found


def ids(size: int, hidden: slice, own: int) -> Any:
    found = np.zeros((BATCH, size), np.int32)
    found[0, hidden] = own
    return found


BIAS = np.where(seen(), 0.5, -np.inf).astype(np.float32).repeat(HEADS, axis=1)
IDS = {
    "query_segment_ids": ids(QUERIES, LOOSE[0], 1),
    "key_value_segment_ids": ids(KEYS, LOOSE[1], 2),
}
LENGTHS = {
    "query_seq_lengths": np.array([PAST[0].start, QUERIES]),
    "key_value_seq_lengths": np.array([PAST[1].start, KEYS]),
}
WAYS = {
    "lengths": Way(*PAST, LENGTHS),
    "mask": Way(*LOOSE, {"mask": seen()}),
    "segments": Way(*LOOSE, IDS),
    "bias": Way(*LOOSE, {"bias": BIAS}),
    "causal": Way(None, LOOSE[1], {"is_causal": True}, is_static=True),
    "window": Way(None, LOOSE[1], {"local_window_size": (3, 4)}, is_static=True),
}
NOTHING = {
    "mask": np.ones((BATCH, 1, QUERIES, KEYS), bool),
    "bias": np.zeros((BATCH, HEADS, QUERIES, KEYS), np.float32),
    **{name: np.zeros_like(x) for name, x in IDS.items()},
    "query_seq_lengths": np.full(BATCH, QUERIES),
    "key_value_seq_lengths": np.full(BATCH, KEYS),
}
OF_HOPPER = {*IDS, *LENGTHS}


def stops(way: str, place: str, number: float) -> bool:
    """The rule."""
    if way == "lengths":
        return True
    return bool(np.isfinite(number)) and not (way == "bias" and place in ("query", "key"))


@cache
def compiled(backend: Backend, static: tuple[tuple[str, Any], ...]) -> Any:
    def run(
        arrays: dict[str, jax.Array], d_out: jax.Array, options: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        out, vjp = jax.vjp(lambda arrays: backend(**arrays, **options, **dict(static)), arrays)
        return {"out": out, **vjp(d_out)[0]}

    return run if backend is hopper.INTERPRETED else quick_jit(run)


def check(backend: Backend, name: str, numbers: tuple[float, ...], dtype: Any) -> None:
    """Each number in each place: nothing changes that the rule says does not."""
    way = WAYS[name]
    known = {n: x for n, x in NOTHING.items() if backend is not HOPPER or n in OF_HOPPER}
    static = way.options if way.is_static else {}
    options = {} if static else jax.tree.map(jnp.asarray, {**known, **way.options})
    function = compiled(backend, tuple(static.items()))
    size = 64 if backend is HOPPER else 16
    rng = np.random.default_rng(0)
    hidden = {"query": way.queries, "key": way.keys, "value": way.keys, "d_out": way.queries}
    lengths = {"query": QUERIES, "key": KEYS, "value": KEYS, "d_out": QUERIES}
    clean = {
        n: jnp.asarray(rng.standard_normal((BATCH, length, HEADS, size)), dtype)
        for n, length in lengths.items()
    }

    def put(place: str, number: float) -> jax.Array:
        at = hidden[place]
        return clean[place] if at is None else clean[place].at[0, at].set(number)

    def run(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
        found = function(
            {n: arrays[n] for n in ("query", "key", "value")}, arrays["d_out"], options
        )
        return jax.tree.map(np.float32, found)

    clean = {place: put(place, 0) for place in clean}
    want = run(clean)
    assert all(np.isfinite(x).all() for x in want.values())
    for place in (n for n, at in hidden.items() if at is not None):
        for number in numbers:
            found = run(clean | {place: put(place, number)})
            rows = slice(None if stops(name, place, number) else 1, None)
            for result, x in found.items():
                np.testing.assert_array_equal(
                    x[rows], want[result][rows], err_msg=f"{name}: {number} in {place}, {result}"
                )


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("backend", first(2, [EAGER, CHUNKED, *portable.BOTH]), ids=str)
def test_each_entry(backend: Backend, name: str) -> None:
    check(backend, name, (NAN, INF, float(jnp.finfo(jnp.float32).max)), jnp.float32)


# tests/hopper/test_hidden_values.py has the largest number.
@pytest.mark.parametrize(
    "name", [*thorough(*((n,) for n in ("lengths", "segments", "causal", "window")))]
)
def test_each_entry_of_hoppers_kernels(name: str) -> None:
    if portable.ON_GPU and not hopper.has_hopper():
        pytest.skip("needs a GPU of compute capability 9.0")
    check(HOPPER, name, (NAN, INF) if portable.ON_GPU else (NAN,), jnp.bfloat16)


@pytest.mark.gpu
@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("backend", [EAGER, CHUNKED, *portable.BOTH], ids=str)
def test_each_entry_on_a_gpu(backend: Backend, dtype: str, name: str) -> None:
    check(backend, name, (NAN, INF, float(jnp.finfo(dtype).max)), jnp.dtype(dtype))


@pytest.mark.gpu
@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_each_entry_of_cudnn(dtype: str) -> None:
    """Of the table, causal masks are all that it takes; its products must not overflow float32."""
    largest = min(float(jnp.finfo(dtype).max), 1e36)
    check(cudnn_calls.CUDNN, "causal", (NAN, INF, largest), jnp.dtype(dtype))
