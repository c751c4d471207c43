"""A kernel's call on arrays sharded over batch or heads: each device runs it on what it holds.

The partitioner knows nothing of what is inside a kernel, and would gather all of every array. Here
it is told which axes may stay sharded: batch, and heads where query and key heads are cut alike (or
there is one key head). Sequences and head dims are gathered if they are sharded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
from jax import Array
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jattn.folding import Attention
from jattn.spec import AttentionSpec, Operands

__all__ = ["per_shard"]

# The axes of each operand in the partitioner's notation, N being `_query_heads`.
_AXES = {
    "query": "b t N h",
    "key": "b s k h",
    "value": "b s k d",
    "query_lengths": "b",
    "key_lengths": "b",
    "query_segments": "b t",
    "key_segments": "b s",
    "sinks": "N",
}
_ROW_SINKS = "b N"
_RESULTS = "b t N d, b t N"


def per_shard(attention: Attention) -> Attention:
    """The same function; on sharded arrays each device runs it on its own rows and heads."""

    def partitioned(spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
        names = [name for name, x in operands._asdict().items() if x is not None]
        axes = {name: _AXES[name] for name in names}
        if operands.sinks is not None and operands.sinks.ndim == 2:
            axes["sinks"] = _ROW_SINKS

        @custom_partitioning
        def call(*arrays: Array) -> tuple[Array, Array]:
            held = Operands(**dict(zip(names, arrays, strict=True)))
            own = replace(
                spec,
                batch=held.query.shape[0],
                heads=held.query.shape[2],
                kv_heads=held.key.shape[2],
            )
            return attention(own, held)

        def partition(mesh: Mesh, arguments: Any, results: Any) -> Any:
            batch, heads, key_heads = _kept_axes(spec, arguments)

            def placed(axes: str) -> NamedSharding:
                kept = {"b": batch, "k": key_heads, "N": heads}
                return NamedSharding(mesh, PartitionSpec(*map(kept.get, axes.split())))

            out = tuple(placed(axes) for axes in _RESULTS.split(", "))
            return mesh, lambda *arrays: call.fun(*arrays), out, tuple(map(placed, axes.values()))

        rule, factors = _rule(spec, list(axes.values()))
        call.def_partition(
            partition=partition,
            sharding_rule=rule,
            **factors,
            need_replication_factors=("t", "h", "s", "d"),  # in order of appearance
        )
        out, lse = call(*(x for x in operands if x is not None))
        return out, lse

    return partitioned


def _rule(spec: AttentionSpec, axes: list[str]) -> tuple[str, dict[str, int]]:
    """The partitioner's rule, and the sizes it asks for: a query head is (key head, its group)."""
    rule = f"{', '.join(axes)} -> {_RESULTS}"
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
