"""The peers written in JAX: each as one function of a cell's arrays."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from itertools import pairwise
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import jattn
from benchmarks import flash_attn3
from benchmarks.cells import Cell
from jattn.backends import kernels

__all__ = ["PEERS", "Arrays", "arrays_of", "attend", "refusal", "wants_dense_mask"]

type Arrays = dict[str, Array]
type Attend = Callable[[Arrays], Array]

DIFFERENTIABLE = ("query", "key", "value", "bias")


def arrays_of(cell: Cell, *, dense_mask: bool = False) -> Arrays:
    """Random operands of the cell, by the names of `jattn.dot_product_attention`'s arguments.

    A cell of packed documents has segment ids, or with `dense_mask` a boolean mask (1, 1, T, S).
    """
    dtype = jnp.dtype(cell.dtype)
    rows = {
        "query": (cell.queries, cell.heads, cell.head_dim),
        "key": (cell.keys, cell.kv_heads, cell.head_dim),
        "value": (cell.keys, cell.kv_heads, cell.values),
    }
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = {
        name: jax.random.normal(key, (cell.batch, *size), dtype)
        for key, (name, size) in zip(keys, rows.items(), strict=False)
    }
    if cell.bias:
        arrays["bias"] = jax.random.normal(keys[3], (1, cell.heads, cell.queries, cell.keys), dtype)
    if cell.mask.has_documents:
        if dense_mask:
            arrays["mask"] = jnp.asarray(cell.dense_mask()[None, None])
        else:
            ids = jnp.broadcast_to(jnp.asarray(cell.documents()), (cell.batch, cell.queries))
            arrays["query_segment_ids"] = arrays["key_value_segment_ids"] = ids
    if cell.dropout:
        arrays["dropout_rng"] = jax.random.key(1)
    return arrays


def _options(cell: Cell) -> dict[str, Any]:
    """The mask arguments, the same for `jax.nn`, tokamax and jattn."""
    window = (cell.mask.size, 0) if cell.mask.kind == "window" else None
    return {"is_causal": cell.mask.kind != "full", "local_window_size": window}


def _call(attention: Callable[..., Any], options: dict[str, Any], implementation: str) -> Attend:
    return lambda arrays: cast(Array, attention(**arrays, **options, implementation=implementation))


# What may follow the name of a backend of jattn: a context that its calls are made in.
_CONTEXTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "": nullcontext,
    "portable": lambda: kernels.only("portable"),
    "deterministic": jattn.deterministic_gradients,
}


def _jattn(implementation: str, context: str = "") -> Callable[[Cell], Attend]:
    """A backend of jattn, in one of the contexts."""

    def of(cell: Cell) -> Attend:
        options = {**_options(cell), "dropout_rate": cell.dropout}

        def attend(*args: Any, **options: Any) -> Any:
            with _CONTEXTS[context]():
                return jattn.dot_product_attention(*args, **options)

        return _call(attend, options, implementation)

    return of


def _jattn_xla(cell: Cell) -> Attend:
    """The form of memory_efficient that any device runs, in its own chunks of a GPU."""
    options = {**_options(cell), "dropout_rate": cell.dropout, "query_chunk_size": 1024}
    attention: Callable[..., Any] = jattn.memory_efficient_attention

    def attend(arrays: Arrays) -> Array:
        return cast(Array, attention(**arrays, **options))

    return attend


def _jax_nn(implementation: str) -> Callable[[Cell], Attend]:
    return lambda cell: _call(jax.nn.dot_product_attention, _options(cell), implementation)


def _tokamax(implementation: str) -> Callable[[Cell], Attend]:
    def of(cell: Cell) -> Attend:
        module = tokamax()
        if cell.mask.has_documents:
            return _tokamax_packed(cell, implementation)
        return _call(module.dot_product_attention, _options(cell), implementation)

    return of


def _tokamax_packed(cell: Cell, implementation: str) -> Attend:
    """tokamax's own form of packed documents, each query's first key, which skips blocks."""
    api = importlib.import_module("tokamax._src.ops.attention.api")
    base = importlib.import_module("tokamax._src.ops.attention.base")
    attend = api.IMPLEMENTATIONS["mosaic_gpu" if implementation == "mosaic" else implementation]
    first_key = jnp.asarray(cell.document_starts())[None, None]

    def packed(arrays: Arrays) -> Array:
        mask = base.Mask(k_start=first_key, is_causal=True)
        q, k, v = arrays["query"], arrays["key"], arrays["value"]
        return cast(Array, attend(q, k, v, bias=arrays.get("bias"), mask=mask))

    return packed


PEERS: dict[str, Callable[[Cell], Attend]] = {
    "jattn/flash": _jattn("flash"),
    "jattn/flash-portable": _jattn("flash", "portable"),
    "jattn/flash-deterministic": _jattn("flash", "deterministic"),
    "jattn/memory_efficient": _jattn("memory_efficient"),
    "jattn/memory_efficient-xla": _jattn_xla,
    "jattn/eager": _jattn("eager"),
    "jattn/cudnn": _jattn("cudnn"),
    "jax.nn/xla": _jax_nn("xla"),
    "jax.nn/cudnn": _jax_nn("cudnn"),
    "flash-attn3-jax": flash_attn3.attend_with,
    "tokamax/mosaic": _tokamax("mosaic"),
    "tokamax/triton": _tokamax("triton"),
    "tokamax/xla_chunked": _tokamax("xla_chunked"),
}


def refusal(peer: str, cell: Cell) -> str | None:
    """Why this peer cannot do the cell, as far as is known before it is tried."""
    if peer.startswith("jattn/"):
        return _jattn_refusal(peer.removeprefix("jattn/"), cell)
    on_gpu = jax.default_backend() == "gpu"
    gpu_only = ("jax.nn/cudnn", "tokamax/mosaic", "tokamax/triton", "flash-attn3-jax")
    if peer in gpu_only and not on_gpu:
        return f"needs an NVIDIA GPU, this is {jax.devices()[0].device_kind}"
    if cell.dropout:
        return f"no dropout (rate {cell.dropout})"
    if peer == "flash-attn3-jax":
        return flash_attn3.refusal(cell)
    if peer == "jax.nn/cudnn" and np.dtype(jnp.dtype(cell.dtype)).itemsize != 2:
        return f"dtype {cell.dtype} is not bfloat16 or float16"
    if peer.startswith("tokamax/"):
        try:
            tokamax()
        except Exception as error:  # a broken installation can raise anything
            return f"tokamax cannot be imported: {error!r}"
    return None


def _jattn_refusal(peer: str, cell: Cell) -> str | None:
    backend, _, context = peer.partition("-")
    shapes = jax.eval_shape(lambda: arrays_of(cell))
    with _CONTEXTS.get(context, nullcontext)():
        report = jattn.explain(**shapes, **_options(cell), dropout_rate=cell.dropout)
    (found,) = [each for each in report.reports if each.name == backend]
    return "; ".join(found.refusals) or None


def attend(peer: str, cell: Cell) -> Attend:
    """The peer as a function of the cell's arrays."""
    return PEERS[peer](cell)


def wants_dense_mask(peer: str) -> bool:
    """Whether packed documents come to this peer as a boolean mask."""
    return peer.startswith("jax.nn/")


@cache
def tokamax() -> Any:
    """The tokamax package; its profiler, which nothing here uses, may be missing."""
    try:
        return importlib.import_module("tokamax")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "xprof":
            raise
    names = ("xprof", "xprof.cli", "xprof.cli.tools", "xprof.cli.tools.get_kernel_stats_tool")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    for package, name in pairwise(names):
        setattr(sys.modules[package], name.rpartition(".")[2], sys.modules[name])
    for loaded in [name for name in sys.modules if name.split(".")[0] == "tokamax"]:
        del sys.modules[loaded]
    return importlib.import_module("tokamax")
