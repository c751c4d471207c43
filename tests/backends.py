"""The backends under test, and one compiled call of a case that yields all there is to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

import jattn
from tests.cases import Case, Operands, operands
from tests.reference import Bools

Results = dict[str, Any]

# Compiling is most of these tests' time. The same operations, less of LLVM's work on each.
_QUICK = {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else None
quick_jit = partial(jax.jit, compiler_options=_QUICK)


@dataclass(frozen=True)
class Backend:
    """A function with the signature of `jattn.eager_attention`, and options that are its own."""

    name: str
    function: Callable[..., Any]
    options: tuple[tuple[str, int], ...] = field(default=())

    def __str__(self) -> str:
        return self.name

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(*args, **options, **dict(self.options))


EAGER = Backend("eager", jattn.eager_attention)
CHUNKED = Backend(
    "memory_efficient-8x16",
    jattn.memory_efficient_attention,
    (("query_chunk_size", 8), ("key_chunk_size", 16)),
)
TALL_CHUNKS = Backend(
    "memory_efficient-16x8",
    jattn.memory_efficient_attention,
    (("query_chunk_size", 16), ("key_chunk_size", 8)),
)
DEFAULT = Backend("memory_efficient", jattn.memory_efficient_attention)

BACKENDS = [EAGER, CHUNKED]


def call(backend: Backend, drawn: Operands, arrays: Results, **more: Any) -> Any:
    """`backend` on the arrays of a case, without the batch axis if the case has none.

    more: options beside the case's, or in their place.
    """
    case = drawn.case
    inputs = {name: jnp.asarray(value) for name, value in arrays.items()}
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    if not case.batched:
        q, k, v = q[0], k[0], v[0]
    rest = {"bias": inputs.get("bias"), "sinks": inputs.get("sinks")}
    result = backend(q, k, v, **rest, **(drawn.options | more))
    return result if case.batched else jax.tree.map(lambda x: x[None], result)


def compute(backend: Backend, case: Case, seed: int) -> Results:
    """Output, log-sum-exp and the gradients of both, compiled as one function."""
    drawn = operands(case, seed)

    @quick_jit
    def everything(arrays: Results, cotangents: Any) -> Results:
        (out, lse), vjp = jax.vjp(
            lambda arrays: call(backend, drawn, arrays, return_residual=True), arrays
        )
        d_out, d_lse = cotangents
        return {"out": out, "lse": lse, **vjp((d_out, d_lse.astype(lse.dtype)))[0]}

    return everything(drawn.differentiable, (drawn["dout"], drawn["dlse"]))


results = cache(compute)


@cache
def keep_mask(
    rate: float,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    seed: int = 7,
    shared: bool = False,
) -> Bools:
    """What dropout keeps, read off the output: even weights, and values that name their key."""
    q = np.zeros((batch, queries, heads, 1), np.float32)
    k = np.zeros((batch, keys, 1, 1), np.float32)
    v = np.broadcast_to(np.eye(keys, dtype=np.float32)[:, None], (batch, keys, 1, keys))
    out = _dropped(rate, shared)(q, k, v, jax.random.key(seed))
    return np.asarray(out).transpose(0, 2, 1, 3) > 0


@cache
def _dropped(rate: float, shared: bool) -> Callable[..., jax.Array]:
    """Compiled once for all keys of the same sizes."""

    @quick_jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, rng: jax.Array) -> jax.Array:
        return jattn.eager_attention(
            q, k, v, dropout_rate=rate, dropout_rng=rng, broadcast_dropout=shared
        )

    return run


def kept(case: Case) -> Bools | None:
    if not case.dropout:
        return None
    return keep_mask(
        case.dropout,
        case.batch,
        case.heads,
        case.queries,
        case.keys,
        shared=case.shared_dropout,
    )


def arrays_in(function: Callable[..., Any], *args: Any) -> Iterator[Any]:
    """Every array that a function computes, sub-computations included, as shapes and dtypes."""
    yield from computed_by(jax.make_jaxpr(function)(*args).jaxpr)


def computed_by(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars if hasattr(v.aval, "shape"))
        for inner in jaxprs_in_params(equation.params):
            yield from computed_by(inner)


def largest_array(function: Callable[..., Any], *args: Any) -> int:
    """Elements of the largest array that a function computes."""
    return max(array.size for array in arrays_in(function, *args))
