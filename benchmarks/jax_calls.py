"""A JAX peer in a cell, compiled and ready to be timed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.cells import Cell, Pass
from benchmarks.jax_peers import (
    DIFFERENTIABLE,
    Arrays,
    Attend,
    arrays_of,
    attend,
    refusal,
    wants_dense_mask,
)
from benchmarks.row_check import row_error, rows_to_check

__all__ = ["Ready", "facts", "prepare", "refusal"]

_PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu13",
    "flash-attn3-jax",
    "tokamax",
    "numpy",
)


class Ready:
    """One pass of one peer, compiled; calling it runs it to its end.

    Nothing is on the device before the first call: operands are described until then.
    """

    def __init__(self, peer: str, cell: Cell, which: Pass) -> None:
        self._cell, self._which = cell, which
        self._operands = _Operands(cell, which, dense_mask=wants_dense_mask(peer))
        function: Callable[..., Any] = attend(peer, cell)
        if which == "gradient":
            on_gpu = jax.default_backend() == "gpu"
            function = (_with_cotangent if on_gpu else _of_the_sum)(function)
        elif which in _ALONG:
            function = _ALONG[which](function)
        start = time.perf_counter()
        self._compiled = jax.jit(function).lower(*self._operands.shapes).compile()
        self.compile_s = time.perf_counter() - start
        self._pick = _rows_of(cell)
        if which == "forward" and not cell.dropout:
            shapes = (self._operands.shapes[0], jax.eval_shape(function, *self._operands.shapes))
            self._pick = jax.jit(self._pick).lower(*shapes).compile()
        memory = self._compiled.memory_analysis()
        self.temp_bytes: int | None = getattr(memory, "temp_size_in_bytes", None)

    def __call__(self) -> Any:
        return jax.block_until_ready(self._compiled(*self._operands.arrays))

    def too_large(self) -> str | None:
        """Why the device cannot hold the call, as far as it tells."""
        stats = jax.devices()[0].memory_stats() or {}
        limit, used = stats.get("bytes_limit"), stats.get("bytes_in_use", 0)
        if limit is None or self.temp_bytes is None:
            return None
        needed, free = self.temp_bytes + 2 * self._operands.nbytes, limit - used
        if needed < 0.9 * free:
            return None
        return f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"

    def error(self, result: Any) -> float | None:
        """The largest relative error of some rows of the output; None if it cannot be known."""
        if self._which != "forward" or self._cell.dropout:
            return None
        rows = rows_to_check(self._cell)
        kept = self._pick(self._operands.arrays[0], result)
        host = {name: np.asarray(x) for name, x in kept.items()}
        out = host.pop("output")
        return max(
            row_error(self._cell, row, {name: x[i] for name, x in host.items()}, out[i])
            for i, row in enumerate(rows)
        )

    def device_times(self, repeats: int) -> tuple[list[float], str]:
        """Milliseconds of all kernels of each call, by CUPTI; by the host's clock if that fails."""
        from jax.experimental.mosaic.gpu import profiler

        try:
            _, found = profiler.measure(self._compiled, iterations=repeats)(*self._operands.arrays)
        except Exception as error:  # CUPTI has one user at a time, and may be absent
            return host_times(self, repeats), f"host clock (CUPTI: {error})"
        if found is None:
            return host_times(self, repeats), "host clock (CUPTI saw no kernel)"
        return [float(ms) for ms in np.atleast_1d(found)], "CUPTI, sum of kernels"


class _Operands:
    """The arguments of a compiled pass: described at once, made where they are first asked for.

    What makes the random ones is compiled with the rest, beside what others measure.
    """

    def __init__(self, cell: Cell, which: Pass, *, dense_mask: bool) -> None:
        self._cell, self._dense_mask = cell, dense_mask
        on_gpu = jax.default_backend() == "gpu"
        self._cotangents = 2 if which == "jvp-gradient" else 1
        if which in ("forward", "jvp") or (which == "gradient" and not on_gpu):
            self._cotangents = 0
        self._along = which in _ALONG
        self._split = which in ("gradient", *_ALONG)
        self.shapes: tuple[Any, ...] = jax.eval_shape(self._made)
        self.nbytes = sum(
            x.size * x.dtype.itemsize
            for x in jax.tree.leaves(self.shapes)
            if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        )
        # A mask of all pairs would be a constant of the program: it is sent instead.
        self._make: Callable[[], tuple[Any, ...]] = self._made
        if not cell.mask.has_documents:
            self._make = jax.jit(self._made).lower().compile()

    @cached_property
    def arrays(self) -> tuple[Any, ...]:
        return self._make()

    def _made(self) -> tuple[Any, ...]:
        arrays = arrays_of(self._cell, dense_mask=self._dense_mask)
        if not self._split:
            return (arrays,)
        wanted = {name: arrays[name] for name in DIFFERENTIABLE if name in arrays}
        rest = {name: x for name, x in arrays.items() if name not in wanted}
        made: tuple[Any, ...] = (wanted, rest)
        if self._along:
            keys = jax.random.split(jax.random.key(3), len(wanted))
            pairs = zip(wanted.items(), keys, strict=True)
            made += ({n: jax.random.normal(key, x.shape, x.dtype) for (n, x), key in pairs},)
        for seed in range(2, 2 + 2 * self._cotangents, 2):
            shape = (*arrays["query"].shape[:-1], self._cell.values)
            made += (jax.random.normal(jax.random.key(seed), shape, self._cell.dtype),)
        return made


def _rows_of(cell: Cell) -> Callable[[Arrays, Array], Arrays]:
    """What the check of some rows needs of the operands and the output."""
    b, t, n = np.array(rows_to_check(cell)).T
    k = n // (cell.heads // cell.kv_heads)

    def pick(arrays: Arrays, out: Array) -> Arrays:
        kept = {
            "query": arrays["query"][b, t, n],
            "key": arrays["key"][b, :, k],
            "value": arrays["value"][b, :, k],
            "output": out[b, t, n],
        }
        return kept | ({"bias": arrays["bias"][0, n, t]} if cell.bias else {})

    return pick


def host_times(call: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of each call by the host's clock."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _with_cotangent(attend: Attend) -> Callable[..., tuple[Array, Arrays]]:
    """Output and gradients for a random gradient of the output."""

    def both(wanted: Arrays, rest: Arrays, cotangent: Array) -> tuple[Array, Arrays]:
        out, vjp = jax.vjp(lambda wanted: attend({**wanted, **rest}), wanted)
        return out, vjp(cotangent)[0]

    return both


def _of_the_sum(attend: Attend) -> Callable[..., tuple[Array, Arrays]]:
    """The sum of the output, and its gradients."""

    def total(wanted: Arrays, rest: Arrays) -> Array:
        return attend({**wanted, **rest}).astype(jnp.float32).sum()

    return jax.value_and_grad(total)


def _jvp(attend: Attend) -> Callable[..., tuple[Array, Array]]:
    """Output, and its tangent along tangents of all arrays that have a gradient."""

    def along(wanted: Arrays, rest: Arrays, tangents: Arrays) -> tuple[Array, Array]:
        return jax.jvp(lambda wanted: attend({**wanted, **rest}), (wanted,), (tangents,))

    return along


def _jvp_gradient(attend: Attend) -> Callable[..., tuple[Any, Any]]:
    """`_jvp`, and gradients by the arrays and their tangents, for random ones of its results."""

    def through(
        wanted: Arrays, rest: Arrays, tangents: Arrays, d_out: Array, dt_out: Array
    ) -> tuple[Any, Any]:
        along = _jvp(attend)
        found, vjp = jax.vjp(lambda x, t: along(x, rest, t), wanted, tangents)
        return found, vjp((d_out, dt_out))

    return through


def _hvp(attend: Attend) -> Callable[..., tuple[Arrays, Arrays]]:
    """Gradients for a random gradient of the output, and their tangents along all arrays'."""

    def along(
        wanted: Arrays, rest: Arrays, tangents: Arrays, cotangent: Array
    ) -> tuple[Arrays, Arrays]:
        def gradients(wanted: Arrays) -> Arrays:
            _, vjp = jax.vjp(lambda wanted: attend({**wanted, **rest}), wanted)
            found: Arrays = vjp(cotangent)[0]
            return found

        return jax.jvp(gradients, (wanted,), (tangents,))

    return along


_ALONG: dict[Pass, Callable[[Attend], Callable[..., Any]]] = {
    "jvp": _jvp,
    "jvp-gradient": _jvp_gradient,
    "hvp": _hvp,
}


def prepare(peer: str, cell: Cell, which: Pass) -> Ready:
    """Compiles; what a peer raises is the caller's to report."""
    return Ready(peer, cell, which)


def facts() -> Mapping[str, Any]:
    """The device, and the versions of what runs on it."""
    device = jax.devices()[0]
    found = {"platform": device.platform, "chip": device.device_kind, "versions": {}}
    for package in _PACKAGES:
        try:
            found["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if os.environ.get("XLA_FLAGS"):
        found["versions"]["XLA_FLAGS"] = os.environ["XLA_FLAGS"]
    if device.platform == "gpu":
        found["versions"]["cuda"] = " ".join(device.client.platform_version.split())
    return found
