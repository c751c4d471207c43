"""A kernel's call on sharded arrays: each device runs it on what it holds.

The partitioner knows nothing of what is inside a kernel, and would gather all of every array. Here
it is told which axes may stay sharded: batch; heads, of keys where they are cut as those of queries
are; queries, and keys where they are cut as queries are. What a device then has is its part of a
longer call (`transforms.context`). Head dims are gathered if they are sharded, and keys that are
cut otherwise.

A result without an axis that stays sharded is a sum over it, and is added up over the devices: the
gradients of key heads whose query heads are on several, and of a bias that is broadcast.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jattn.call.context import Context
from jattn.call.dropout import seeds_from_head
from jattn.call.spec import AttentionSpec
from jattn.transforms import sharding
from jattn.transforms.constants import none_folded
from jattn.transforms.folding import Arrays, Kernel, operand_of
from jattn.transforms.kept import (
    Kept,
    KeyHeads,
    found_axes,
    named_axes,
    outermost,
    used_key_heads,
)

__all__ = [
    "GRADIENTS",
    "RESULTS",
    "TANGENTS",
    "on_one_device",
    "partitioned_call",
    "per_explicit_shard",
    "per_shard",
]

# The axes of each array, N being query heads, b the batch and c keys that are columns of a matrix,
# which every device has; see `_rule` for the partitioner's.
# A bias or mask for some rows of the batch has B: what it has of the outermost of the axes that the
# batch is made of.
_AXES = {
    "query": "b t N h",
    "key": "b s k h",
    "value": "b s k d",
    "bias": "b N t c",
    "mask": "b N t c",
    "query_lengths": "b",
    "key_lengths": "b",
    "query_offset": "b",
    "query_segments": "b t",
    "key_segments": "b s",
    "sinks": "N",
    "dropout_seeds": "b word",
    "scale": "b",
    "out": "b t N d",
    "top": "b t N",
    "rest": "b t N",
    "row_term": "b t N",
    "d_out": "b t N d",
    "of_sinks": "b t N",
    "t_lse": "b t N",
    "t_out": "b t N d",
    "t_row_term": "b t N",
    "td_out": "b t N d",
    "u_lse": "b t N",
    "u_out": "b t N d",
    "by_scale": "b t N",
}
_AXES |= {
    f"{way}_{name}": _AXES[name]
    for way in "tu"
    for name in ("query", "key", "value", "bias", "sinks", "scale")
}
RESULTS = ("out", "top", "rest")
GRADIENTS = ("query", "key", "value")  # the bias's may follow
TANGENTS = ("t_out", "t_lse")


def per_shard(kernel: Kernel, results: tuple[str, ...], *, takes_parts: bool) -> Kernel:
    """The same function; on sharded arrays each device runs it on its own rows, heads and queries.

    results: names that have the axes of each, `RESULTS`, `GRADIENTS` or `TANGENTS`.
    takes_parts: whether it computes a device's part of a longer call (`AttentionSpec.context`).
    """

    def partitioned(spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
        axes = {name: _axes_of(name, x.shape, spec) for name, x in _in_order(arrays).items()}
        out_axes = _out_axes(axes, results, spec)

        @custom_partitioning
        def call(*held: Array) -> tuple[Array, ...]:
            return _on_a_device(kernel, spec, axes, out_axes, Kept(), held)

        def partition(mesh: Mesh, arguments: Any, _: Any) -> Any:
            query, key = (found_axes(x.sharding, 4, mesh) for x in arguments[:2])
            kept = Kept.of(spec, mesh, query, key, takes_parts=takes_parts)

            def placed(axes: str) -> NamedSharding:
                return NamedSharding(mesh, kept.place(axes))

            def on_each(*held: Array) -> tuple[Array, ...]:
                return _on_a_device(kernel, spec, axes, out_axes, kept, held)

            return mesh, on_each, tuple(map(placed, out_axes)), tuple(map(placed, axes.values()))

        names = ("d_bias" if name == "bias" else name for name in results)
        named_results = dict(zip(names, out_axes, strict=True))

        def rule(mesh: Mesh, *_: Any) -> tuple[str, dict[str, Any]]:
            cuts_key_heads = any(spec.kv_heads % n == 0 for n in mesh.shape.values() if n > 1)
            text, factors = _rule(spec, axes, named_results, cuts_key_heads=cuts_key_heads)
            whole = ("t", "h", "s", "d") if not takes_parts else ("h", "d")
            columns = any("c" in axes[name].split() for name in ("bias", "mask") if name in axes)
            whole += (*(("c",) if columns else ()), *(("word",) if "dropout_seeds" in axes else ()))
            # In order of appearance.
            return text, {"need_replication_factors": whole, **factors}

        call.def_partition(
            partition=partition,
            sharding_rule=rule,
            decode_shardings=False,  # JAX's raises on what no name of the mesh says
        )
        found: tuple[Array, ...] = call(*(arrays[name] for name in axes))
        return found

    return partitioned


@cache
def partitioned_call() -> Any:
    """The jaxpr of some call of `per_shard`.

    JAX looks for such calls in the parameters of primitives, and tells only those it finds which
    devices a program is lowered for: one that is traced when it is lowered needs it beside it.
    """

    @custom_partitioning
    def call(x: Array) -> Array:
        return x

    def partition(mesh: Mesh, arguments: Any, result: Any) -> Any:
        return mesh, call, result.sharding, (arguments[0].sharding,)

    call.def_partition(partition=partition, sharding_rule="i -> i")
    return jax.make_jaxpr(call)(jax.ShapeDtypeStruct((1,), jnp.float32))


def per_explicit_shard(kernel: Kernel, results: tuple[str, ...], *, takes_parts: bool) -> Kernel:
    """The same function; on a mesh with explicit axes each device runs it on what it holds.

    There the types of the arrays say how they are sharded, and the partitioner is not asked.
    """

    def shard_mapped(spec: AttentionSpec, arrays: Arrays) -> tuple[Array, ...]:
        mesh = jax.sharding.get_abstract_mesh()
        types = zip(mesh.axis_names, mesh.axis_types, strict=True)
        typed = {name for name, of in types if of == AxisType.Explicit}
        if AxisType.Manual in mesh.axis_types and not typed:
            # Pallas would be asked how its results vary over those axes: as the arrays do.
            unchecked = jax.shard_map(
                partial(kernel, spec), in_specs=PartitionSpec(), out_specs=PartitionSpec(),
                axis_names=set(), check_vma=False,
            )  # fmt: skip
            each: tuple[Array, ...] = unchecked(arrays)
            return each
        if not typed:
            return kernel(spec, arrays)
        axes = {name: _axes_of(name, x.shape, spec) for name, x in _in_order(arrays).items()}
        out_axes = _out_axes(axes, results, spec)
        query, key = (named_axes(sharding.partition(arrays[name]), 4) for name in ("query", "key"))
        kept = Kept.of(spec, mesh, query, key, takes_parts=takes_parts)
        placed = [jax.sharding.reshard(arrays[name], kept.place(of)) for name, of in axes.items()]

        def on_each(*held: Array) -> tuple[Array, ...]:
            return _on_a_device(kernel, spec, axes, out_axes, kept, held)

        found: tuple[Array, ...] = jax.shard_map(
            on_each,
            in_specs=tuple(map(kept.place, axes.values())),
            out_specs=tuple(map(kept.place, out_axes)),
            axis_names=typed,
            check_vma=False,
        )(*placed)
        return found

    return shard_mapped


def on_one_device(
    spec: AttentionSpec, query: NamedSharding, key: NamedSharding | None, *, takes_parts: bool
) -> AttentionSpec:
    """What a device holds of a call on arrays that are sharded so; a bias or mask as it is."""
    mesh = query.mesh
    places = (named_axes(PartitionSpec() if x is None else x.spec, 4) for x in (query, key))
    kept = Kept.of(spec, mesh, *places, takes_parts=takes_parts)

    def share(size: int, axes: tuple[str, ...]) -> int:
        devices: int = math.prod(mesh.shape[axis] for axis in axes)
        return -(-size // devices)

    heads = share(spec.heads, kept.heads)
    return replace(
        spec,
        batch=share(spec.batch, kept.batch),
        queries=share(spec.queries, kept.queries),
        keys=share(spec.keys, kept.keys),
        heads=heads,
        kv_heads=used_key_heads(spec, heads),
        context=_context(spec, kept),
    )


def _context(spec: AttentionSpec, kept: Kept) -> Context | None:
    """What a device's queries and keys are a part of."""
    if kept.devices == 1:
        return spec.context
    return Context(
        axes=kept.queries[0] if len(kept.queries) == 1 else kept.queries,
        devices=kept.devices,
        queries=spec.queries,
        keys=spec.keys,
        has_whole_keys=not kept.keys,
    )


@none_folded
def _on_a_device(
    kernel: Kernel,
    spec: AttentionSpec,
    axes: dict[str, str],
    out_axes: list[str],
    kept: Kept,
    held: tuple[Array, ...],
) -> tuple[Array, ...]:
    """The kernel on the part that a device holds, and the sums over what others hold."""
    own = dict(zip(axes, held, strict=True))
    heads = own["query"].shape[2]
    key_heads = KeyHeads.of(spec, kept, heads, own["key"].shape[2])
    own |= {name: key_heads.taken(x) for name, x in own.items() if "k" in axes[name].split()}
    if "dropout_seeds" in own and kept.heads and not spec.broadcast_dropout:
        first = lax.axis_index(kept.heads) * heads
        own["dropout_seeds"] = seeds_from_head(own["dropout_seeds"], first)
    shapes: dict[str, Any] = {
        f"{name}_shape": own[name].shape for name in ("bias", "mask") if name in own
    }
    (batch, queries, *_), (_, keys, kv_heads, _) = own["query"].shape, own["key"].shape
    rows = tuple((name, rows.part(spec.batch // batch)) for name, rows in spec.mapped_rows)
    part = replace(
        spec,
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        kv_heads=kv_heads,
        mapped_rows=rows,
        directions=spec.directions if batch == spec.batch else 1,
        context=_context(spec, kept),
        **shapes,
    )
    found = zip(kernel(part, own), out_axes, strict=True)
    whole = ((key_heads.put_back(x) if "k" in of.split() else x, of) for x, of in found)
    return tuple(_added_up(x, kept.summed_over(of)) for x, of in whole)


def _added_up(x: Array, over: tuple[str, ...]) -> Array:
    return lax.psum(x.astype(jnp.float32), over).astype(x.dtype) if over else x


def _in_order(arrays: Arrays) -> Arrays:
    """In the table's order: that of a pytree's dict is its names'."""
    return {name: arrays[name] for name in _AXES if name in arrays}


def _out_axes(axes: dict[str, str], results: tuple[str, ...], spec: AttentionSpec) -> list[str]:
    found = {**_AXES, **axes}
    if spec.d_bias_shape is not None:
        found["bias"] = _axes_of("d_bias", spec.d_bias_shape, spec)
    return [found[name] for name in results]


def _axes_of(name: str, shape: tuple[int, ...], spec: AttentionSpec) -> str:
    """The axes that an array really has: a bias or mask may be 1 along any of its own."""
    of = operand_of(name)
    if of == "sinks" and len(shape) == 2:
        return "b N"
    if of == "scale" and shape != (spec.batch,):
        return "one"
    if of not in ("bias", "mask", "d_bias"):
        return _AXES[name]
    rows = spec.rows(name)
    own = {True: "B" if rows.is_mixed else "b", False: f"{name}b"}
    full = (spec.heads, spec.queries, spec.keys)
    axes = zip("Ntc", shape[1:], full, strict=True)
    return " ".join(
        [own[rows.outer.own], *(x if n == of else f"{name}{x.lower()}" for x, n, of in axes)]
    )


def _rule(
    spec: AttentionSpec,
    axes: dict[str, str],
    results: dict[str, str],
    *,
    cuts_key_heads: bool,
) -> tuple[str, dict[str, int]]:
    """The partitioner's rule, and the sizes it asks for: of what is nowhere an axis of its own.

    A query head is (key head, its group), or an axis of its own where no axis of the mesh cuts key
    heads, as a part of one would. Where rows of the batch share a bias, a row is (outer, inner), of
    which a bias or mask may have the outer, and inner ones of its own.
    """
    outer = outermost(spec)
    sizes = {"g": spec.group, "outer": outer, "inner": spec.batch // outer}
    named = {"N": "k" if spec.group == 1 else "(k g)" if cuts_key_heads else "n"}
    if outer < spec.batch:
        named["b"] = "(outer inner)"

    def written(name: str, of: str) -> str:
        own = dict(named)
        if "B" in of.split():
            sizes[f"{name}inner"] = spec.rows(name).count // outer
            own["B"] = "outer" if sizes[f"{name}inner"] == 1 else f"(outer {name}inner)"
        return " ".join(own.get(axis, axis) for axis in of.split())

    sides = (", ".join(written(name, of) for name, of in side.items()) for side in (axes, results))
    rule = " -> ".join(sides)
    alone = set(re.sub(r"\(.*?\)", "", rule).replace(",", "").split())
    compound = set(re.sub(r"[(),]", " ", rule).split()) - alone
    return rule, {name: size for name, size in sizes.items() if name in compound}
