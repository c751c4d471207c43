"""The static facts of one attention call, and the arrays beside them.

Letters, as in `jax.nn`: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K
query heads to a key head, H head dim, D value head dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jattn.call.band import Band
from jattn.call.context import Context
from jattn.call.rows import Rows
from jattn.call.sizes import is_known

__all__ = ["AttentionSpec", "Operands", "Shape4", "Tangents"]

type Shape4 = tuple[int, int, int, int]


class Operands(NamedTuple):
    """The arrays of one call, in canonical rank; what the call does not use is None.

    Shapes: query (B, T, N, H); key (B, S, K, H); value (B, S, K, D); bias and mask rank 4,
    broadcastable to (B, N, T, S); query_lengths and key_lengths (B,) int32; query_segments (B, T)
    and key_segments (B, S) int32; sinks (N,); dropout_seeds (B, 2) uint32; query_offset (B,) int32,
    the key position of query 0 where it is not known when traced; scale (1,) in the accumulator's
    dtype. Of a batch that `jax.vmap` was folded into, scale may be (B,). dropout_start (2,) int32:
    where the first query and key stand among those that dropout counts, if not at 0. halves: of
    query, key and value, where these are but what came from another device.
    """

    query: Array
    key: Array
    value: Array
    bias: Array | None = None
    mask: Array | None = None
    query_lengths: Array | None = None
    key_lengths: Array | None = None
    query_segments: Array | None = None
    key_segments: Array | None = None
    sinks: Array | None = None
    dropout_seeds: Array | None = None
    query_offset: Array | None = None
    scale: Array | None = None
    dropout_start: Array | None = None
    halves: Any = None  # Halves | None; Any, as the others are given by name, in dicts of arrays


class Tangents(NamedTuple):
    """Tangents of a call's operands, in their dtypes; None of what does not move.

    Shapes: those of the operands, but for what `jax.vmap` over tangents alone leaves: a bias has
    rows of its own, `AttentionSpec.rows("t_bias")`, and a scale may be (B,) where the call's is
    (1,). What sinks add is one number a row, and reaches no kernel.
    """

    query: Array | None = None
    key: Array | None = None
    value: Array | None = None
    bias: Array | None = None
    scale: Array | None = None


@dataclass(frozen=True)
class AttentionSpec:
    """What is known of a call while it is traced. Hashable, so it can key any cache.

    scale: None if it is an array, which the operands then have.
    context: the longer call that this is a device's part of.
    directions: the batch is so many times the same rows, one after another: operands and what
      forward saved are alike in all of them, tangents and gradients need not be.
    dropout_from: whether dropout counts from `Operands.dropout_start`.
    """

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: np.dtype[np.generic]
    precision: str | None
    scale: float | None
    band: Band
    logits_soft_cap: float | None = None
    dropout_rate: float = 0.0
    broadcast_dropout: bool = False
    bias_shape: Shape4 | None = None
    bias_dtype: np.dtype[np.generic] | None = None
    mask_shape: Shape4 | None = None
    mapped_rows: tuple[tuple[str, Rows], ...] = ()
    has_query_lengths: bool = False
    has_key_lengths: bool = False
    has_segments: bool = False
    has_query_offset: bool = False
    has_sinks: bool = False
    wants_residual: bool = False
    context: Context | None = None
    dropout_from: Literal["zero", "anywhere"] = "zero"
    directions: int = 1

    @property
    def group(self) -> int:
        """G, the query heads that share one key head."""
        return self.heads // self.kv_heads

    def rows(self, name: str) -> Rows:
        """Of a "bias" or a "mask": which row the batch's rows take.

        A bias's gradient, "d_bias", and its tangents, "t_bias" and "u_bias", have those of the bias
        but where `jax.vmap` has one for each mapped row.
        """
        found = dict(self.mapped_rows)
        if name != "mask" and name not in found:
            name = "bias"
        if name in found:
            return found[name]
        shape = self.mask_shape if name == "mask" else self.bias_shape
        assert shape is not None
        return Rows.of(shape[0], self.batch)

    def with_rows(self, **names: str) -> AttentionSpec:
        """The same call; what is named on the left has the rows of what is named on the right."""
        kept = {name: rows for name, rows in self.mapped_rows if name in ("bias", "mask")}
        if self.bias_shape is not None:
            found = {new: self.rows(old) for new, old in names.items()}
            kept |= {new: rows for new, rows in found.items() if rows != self.rows("bias")}
        return replace(self, mapped_rows=tuple(kept.items()))

    @property
    def d_bias_shape(self) -> Shape4 | None:
        """The shape of the bias's gradient."""
        if self.bias_shape is None:
            return None
        return (self.rows("d_bias").count, *self.bias_shape[1:])

    @property
    def free_sizes(self) -> list[str]:
        """Those that `jax.export` leaves free, as in "B b, T t"."""
        sizes = {"B": self.batch, "T": self.queries, "S": self.keys}
        return [f"{name} {size}" for name, size in sizes.items() if not is_known(size)]

    @property
    def is_empty(self) -> bool:
        """Whether there is no batch row, no query or no key."""
        return any(is_known(size) and size == 0 for size in (self.batch, self.queries, self.keys))

    @property
    def accumulator(self) -> np.dtype[np.generic]:
        """The dtype of sums and softmax: float32, or float64 for float64 inputs."""
        return np.dtype(np.float64 if self.dtype == np.float64 else np.float32)

    def tiles(self, rows: int) -> int:
        """Tiles of so many queries of all heads, or of keys, whichever are more.

        0 if a size is not known, as in an exported function.
        """
        if not all(isinstance(size, int) for size in (self.batch, self.queries, self.keys)):
            return 0
        of_queries = self.heads * -(-self.queries // rows)
        of_keys = self.kv_heads * -(-self.keys // rows)
        return self.batch * max(of_queries, of_keys)

    @property
    def element_bytes(self) -> int:
        """Bytes of one element of query, key, value and output."""
        return self.dtype.itemsize

    def grouped(self, x: Array) -> Array:
        """A bias or mask block (b, n, t, s) as (b, K, G, t, s), or (b, 1, 1, t, s) if n is 1."""
        b, n, t, s = x.shape
        return x.reshape(b, *((1, 1) if n == 1 else (self.kv_heads, self.group)), t, s)

    def scale_beside(self, x: Array, operands: Operands) -> float | Array:
        """What multiplies x (B, ...) if it is to be scaled: a number, or (1 or B, 1, ...)."""
        if self.scale is not None:
            return self.scale
        assert operands.scale is not None
        return operands.scale.reshape(-1, *(1,) * (x.ndim - 1))

    def soft_cap(self, products: Array) -> Array:
        """cap * tanh(products / cap), where the call asks for it (Gemma 2, section 2.2).

        Of the scaled products: bias and mask are added to what is capped, as no cap may show what
        they hide.
        """
        cap = self.logits_soft_cap
        return products if cap is None else cap * jnp.tanh(products / cap)

    def dropout_heads(self) -> Array:
        """The head index that each head's dropout mask is drawn for, (1, K, G, 1, 1)."""
        heads = jnp.arange(self.heads, dtype=jnp.int32)
        heads = heads.reshape(1, self.kv_heads, self.group, 1, 1)
        return jnp.zeros_like(heads) if self.broadcast_dropout else heads

    @property
    def _described_context(self) -> str:
        context = self.context
        if context is None:
            return ""
        return (
            f"part of T {context.queries}, S {context.keys} on {context.devices} devices along "
            f"{context.name}"
        )

    def describe(self) -> str:
        """One line for people: shapes, dtype and every feature in use."""
        shape = (
            f"B {self.batch}, T {self.queries}, S {self.keys}, heads {self.heads}/{self.kv_heads}"
        )
        dims = f"head dim {self.head_dim}"
        if self.value_dim != self.head_dim:
            dims += f", value head dim {self.value_dim}"
        features = {
            self.band.describe(): self.band != Band(),
            f"soft cap {self.logits_soft_cap}": self.logits_soft_cap is not None,
            f"dropout {self.dropout_rate}": self.dropout_rate > 0,
            f"bias {self.bias_shape}": self.bias_shape is not None,
            f"mask {self.mask_shape}": self.mask_shape is not None,
            "query lengths": self.has_query_lengths,
            "key lengths": self.has_key_lengths,
            "segments": self.has_segments,
            "query offsets": self.has_query_offset,
            "sinks": self.has_sinks,
            "an array as scale": self.scale is None,
            "log-sum-exp": self.wants_residual,
            self._described_context: self.context is not None,
        }
        used = [name for name, present in features.items() if present]
        return ", ".join([shape, dims, self.dtype.name, *used])
