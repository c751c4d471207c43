"""A kernel's call on arrays sharded over batch or heads: each device runs it on what it holds.

The partitioner knows nothing of what is inside a kernel, and would gather all of every array. Here
it is told which axes may stay sharded: batch, and heads where query and key heads are cut alike (or
there is one key head). Sequences and head dims are gathered if they are sharded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jattn.folding import Arrays, Kernel
from jattn.spec import AttentionSpec

__all__ = ["GRADIENTS", "RESULTS", "per_shard"]

# The axes of each array in the partitioner's notation, N being `_query_heads`.
_AXES = {
    "query": "b t N h",
    "key": "b s k h",
    "value": "b s k d",
    "query_lengths": "b",
    "key_lengths": "b",
    "query_segments": "b t",
    "key_segments": "b s",
    "sinks": "N",
    "lse": "b t N",
    "row_term": "b t N",
    "d_out": "b t N d",
}
_ROW_SINKS = "b N"
RESULTS = "b t N d, b t N"  # output and log-sum-exp
GRADIENTS = "b t N h, b s k h, b s k d"  # of query, key and value


def per_shard(kernel: Kernel, results: str) -> Kernel:
    """The same function; on sharded arrays each device runs it on its own rows and heads.

    results: the axes of each, `RESULTS` or `GRADIENTS`.
    """

    def partitioned(spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
        # In the table's order: that of a pytree's dict is its names'.
        axes = {name: of for name, of in _AXES.items() if name in arrays}
        if "sinks" in arrays and arrays["sinks"].ndim == 2:
            axes["sinks"] = _ROW_SINKS

        @custom_partitioning
        def call(*held: Array) -> tuple[Array, ...]:
            own = dict(zip(axes, held, strict=True))
            batch, _, heads, _ = own["query"].shape
            kv_heads = own["key"].shape[2]
            return kernel(replace(spec, batch=batch, heads=heads, kv_heads=kv_heads), own)

        def partition(mesh: Mesh, arguments: Any, _: Any) -> Any:
            batch, heads, key_heads = _kept_axes(spec, arguments)

            def placed(axes: str) -> NamedSharding:
                kept = {"b": batch, "k": key_heads, "N": heads}
                return NamedSharding(mesh, PartitionSpec(*map(kept.get, axes.split())))

            def on_each(*held: Array) -> tuple[Array, ...]:
                found: tuple[Array, ...] = call.fun(*held)
                if heads is None or key_heads is not None:
                    return found
                # One key head for the query heads of several devices: the results without query
                # heads are sums over all of them.
                return tuple(
                    x if "N" in axes else lax.psum(x.astype(jnp.float32), heads).astype(x.dtype)
                    for x, axes in zip(found, results.split(", "), strict=True)
                )

            out = tuple(placed(axes) for axes in results.split(", "))
            return mesh, on_each, out, tuple(map(placed, axes.values()))

        rule, factors = _rule(spec, list(axes.values()), results)
        call.def_partition(
            partition=partition,
            sharding_rule=rule,
            **factors,
            need_replication_factors=("t", "h", "s", "d"),  # in order of appearance
        )
        found: tuple[Array, ...] = call(*(arrays[name] for name in axes))
        return found

    return partitioned


def _rule(spec: AttentionSpec, axes: list[str], results: str) -> tuple[str, dict[str, int]]:
    """The partitioner's rule, and the sizes it asks for: a query head is (key head, its group)."""
    rule = f"{', '.join(axes)} -> {results}"
    if spec.group == 1:
        return rule.replace("N", "k"), {}
    if spec.kv_heads == 1:
        return rule.replace("N", "n"), {}
    return rule.replace("N", "(k g)"), {"g": spec.group}


def _kept_axes(spec: AttentionSpec, arguments: Any) -> tuple[Any, Any, Any]:
    """The mesh axes that batch, query heads and key heads stay sharded over."""

    def entries(argument: jax.ShapeDtypeStruct) -> tuple[Any, ...]:
        found = tuple(getattr(argument.sharding, "spec", ()) or ())
        return found + (None,) * (len(argument.shape) - len(found))

    batch, _, heads, _ = entries(arguments[0])
    key_heads = entries(arguments[1])[2]
    if spec.kv_heads > 1 and heads != key_heads:
        heads = key_heads = None
    return batch, heads, None if spec.kv_heads == 1 else key_heads
