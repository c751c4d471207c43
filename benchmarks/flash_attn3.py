"""The peer `flash-attn3-jax`: FlashAttention-3 through XLA's FFI, as its wheel installs it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from jax import Array

from benchmarks.cells import Cell

__all__ = ["attend_with", "refusal"]

HEAD_DIM = 128  # the one that its wheel is built for
_MULTIPROCESSORS = 132  # of an H100 or H200


def refusal(cell: Cell) -> str | None:
    """Why it cannot do the cell, as far as is known before it is tried."""
    if (cell.head_dim, cell.values) != (HEAD_DIM, HEAD_DIM):
        return f"its wheel is for head dim {HEAD_DIM} alone"
    if cell.bias:
        return "takes no bias"
    if cell.dtype not in ("bfloat16", "float16"):
        return f"dtype {cell.dtype} is not bfloat16 or float16"
    if cell.mask.kind != "full" and cell.queries != cell.keys:
        return f"causal is from the bottom right (T {cell.queries}, S {cell.keys})"
    try:
        importlib.import_module("flash_attn3_jax")
    except Exception as error:  # a broken installation can raise anything
        return f"flash_attn3_jax cannot be imported: {error!r}"
    return None


def attend_with(cell: Cell) -> Callable[[dict[str, Array]], Array]:
    """Its function for this kind of cell: padded, packed, or one query against a cache."""
    module = importlib.import_module("flash_attn3_jax")
    window = (cell.mask.size, 0) if cell.mask.kind == "window" else (-1, -1)
    causal = cell.mask.kind == "causal" or cell.mask.has_documents
    options: dict[str, Any] = {"is_causal": causal, "window_size": window}

    def plain(arrays: dict[str, Array]) -> Array:
        operands = arrays["query"], arrays["key"], arrays["value"]
        return cast(Array, module.flash_mha(*operands, **options))

    def packed(arrays: dict[str, Array]) -> Array:
        shape = arrays["query"].shape
        operands = (arrays[name].reshape(-1, *arrays[name].shape[2:]) for name in _OPERANDS)
        lengths = np.tile(np.bincount(cell.documents()), cell.batch)
        starts = jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32)
        longest = {name: int(lengths.max()) for name in ("max_seqlen_q", "max_seqlen_k")}
        out = module.flash_mha_varlen(*operands, starts, **longest, **options)
        return cast(Array, out.reshape(shape))

    def cached(arrays: dict[str, Array]) -> Array:
        operands = arrays["query"], arrays["key"], arrays["value"]
        splits = max(_MULTIPROCESSORS // (cell.batch * cell.kv_heads), 1)
        out = module.flash_mha_with_kvcache(*operands, num_splits=splits, **options)
        return cast(Array, out[0] if isinstance(out, tuple) else out)

    if cell.mask.has_documents:
        return packed
    return cached if cell.queries == 1 else plain


_OPERANDS = ("query", "key", "value")
