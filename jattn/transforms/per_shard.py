"""A kernel's call on sharded arrays: each device runs it on what it holds.

The partitioner knows nothing of what is inside a kernel, and would gather all of every array. Here
it is told which axes may stay sharded: batch; heads where query and key heads are cut alike (or
there is one key head); queries, and keys where they are cut as queries are. What a device then has
is its part of a longer call (`transforms.context`). Head dims are gathered if they are sharded, and
keys that are cut otherwise.

A result without an axis that stays sharded is a sum over it, and is added up over the devices: the
gradients of one key head for many query heads, and of a bias that is broadcast.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jattn.call.context import Context
from jattn.call.dropout import seeds_from_head
from jattn.call.positions import MOST
from jattn.call.spec import AttentionSpec
from jattn.transforms import sharding
from jattn.transforms.folding import Arrays, Kernel, operand_of

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
            return _on_a_device(kernel, spec, axes, out_axes, _Kept(), held)

        def partition(mesh: Mesh, arguments: Any, _: Any) -> Any:
            query, key, *_ = (_entries(x.sharding, len(x.shape)) for x in arguments)
            kept = _Kept.of(spec, mesh, query, key, takes_parts=takes_parts)

            def placed(axes: str) -> NamedSharding:
                return NamedSharding(mesh, kept.place(axes))

            def on_each(*held: Array) -> tuple[Array, ...]:
                return _on_a_device(kernel, spec, axes, out_axes, kept, held)

            return mesh, on_each, tuple(map(placed, out_axes)), tuple(map(placed, axes.values()))

        names = ("d_bias" if name == "bias" else name for name in results)
        rule, factors = _rule(spec, axes, dict(zip(names, out_axes, strict=True)))
        whole = ("t", "h", "s", "d") if not takes_parts else ("h", "d")
        columns = any("c" in axes[name].split() for name in ("bias", "mask") if name in axes)
        whole += (*(("c",) if columns else ()), *(("word",) if "dropout_seeds" in axes else ()))
        call.def_partition(
            partition=partition,
            sharding_rule=rule,
            **factors,
            need_replication_factors=whole,  # in order of appearance
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
        query, key = (tuple(sharding.partition(arrays[name])) for name in ("query", "key"))
        kept = _Kept.of(spec, mesh, query, key, takes_parts=takes_parts)
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
    entries = (_entries(query, 4), _entries(key, 4))
    kept = _Kept.of(spec, mesh, *entries, takes_parts=takes_parts)

    def share(size: int, entry: Any) -> int:
        devices: int = math.prod(mesh.shape[axis] for axis in _names(entry))
        return -(-size // devices)

    return replace(
        spec,
        batch=share(spec.batch, kept.batch),
        queries=share(spec.queries, kept.queries if kept.devices > 1 else None),
        keys=share(spec.keys, kept.keys),
        heads=share(spec.heads, kept.heads),
        kv_heads=share(spec.kv_heads, kept.key_heads),
        context=_context(spec, kept),
    )


class _Kept(NamedTuple):
    """The mesh axes over which batch, heads, queries and keys stay sharded: names, or tuples."""

    batch: Any = None
    heads: Any = None
    key_heads: Any = None
    queries: Any = None
    keys: Any = None
    devices: int = 1  # that the queries are cut over

    @staticmethod
    def of(
        spec: AttentionSpec,
        mesh: Any,
        query: tuple[Any, ...],
        key: tuple[Any, ...],
        *,
        takes_parts: bool,
    ) -> _Kept:
        """By how query and key are sharded, an entry for each of their axes."""
        batch, queries, heads, _ = query
        if _outermost(spec) % math.prod(mesh.shape[axis] for axis in _names(batch)):
            batch = None
        key_heads = key[2]
        if spec.kv_heads > 1 and heads != key_heads:
            heads = key_heads = None
        key_heads = None if spec.kv_heads == 1 else key_heads
        devices = math.prod(mesh.shape[axis] for axis in _names(queries))
        # Their number beside the offsets of a device: see `positions.MOST`.
        if not takes_parts or spec.context is not None or spec.queries + spec.keys > MOST:
            devices = 1
        if devices == 1:
            return _Kept(batch, heads, key_heads)
        return _Kept(
            batch, heads, key_heads, queries, key[1] if key[1] == queries else None, devices
        )

    def place(self, axes: str) -> PartitionSpec:
        """How an array with these axes is laid out."""
        named = {"b": self.batch, "B": self.batch, "k": self.key_heads, "N": self.heads}
        named |= {"t": self.queries, "s": self.keys}
        return PartitionSpec(*map(named.get, axes.split()))

    def summed_over(self, axes: str) -> tuple[str, ...]:
        """The mesh axes over which a result is a sum: those kept of what it does not have."""
        own = axes.split()
        missing = () if "b" in own or "B" in own else (self.batch,)
        if "N" not in own and not ("k" in own and self.key_heads is not None):
            missing += (self.heads,)
        if "t" not in own and not ("s" in own and self.keys is not None):
            missing += (self.queries,)
        return tuple(axis for entry in missing for axis in _names(entry))


def _context(spec: AttentionSpec, kept: _Kept) -> Context | None:
    """What a device's queries and keys are a part of."""
    if kept.devices == 1:
        return spec.context
    return Context(
        axes=kept.queries,
        devices=kept.devices,
        queries=spec.queries,
        keys=spec.keys,
        has_whole_keys=kept.keys is None,
    )


def _on_a_device(
    kernel: Kernel,
    spec: AttentionSpec,
    axes: dict[str, str],
    out_axes: list[str],
    kept: _Kept,
    held: tuple[Array, ...],
) -> tuple[Array, ...]:
    """The kernel on the part that a device holds, and the sums over what others hold."""
    own = dict(zip(axes, held, strict=True))
    heads = own["query"].shape[2]
    if "dropout_seeds" in own and kept.heads is not None and not spec.broadcast_dropout:
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
        context=_context(spec, kept),
        **shapes,
    )
    found = kernel(part, own)
    return tuple(_added_up(x, kept.summed_over(of)) for x, of in zip(found, out_axes, strict=True))


def _added_up(x: Array, over: tuple[str, ...]) -> Array:
    return lax.psum(x.astype(jnp.float32), over).astype(x.dtype) if over else x


def _entries(placed: Any, rank: int) -> tuple[Any, ...]:
    found = tuple(getattr(placed, "spec", ()) or ())
    return found + (None,) * (rank - len(found))


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of an entry of a `PartitionSpec`."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _outermost(spec: AttentionSpec) -> int:
    """The size of the outermost axis that the batch is made of, where rows of it share a bias."""
    mixed = [rows.outer.size for _, rows in spec.mapped_rows if rows.is_mixed]
    return math.gcd(*mixed) if mixed else spec.batch


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
    spec: AttentionSpec, axes: dict[str, str], results: dict[str, str]
) -> tuple[str, dict[str, int]]:
    """The partitioner's rule, and the sizes it asks for: of what is nowhere an axis of its own.

    A query head is (key head, its group). Where rows of the batch share a bias, a row is (outer,
    inner), of which a bias or mask may have the outer, and inner ones of its own.
    """
    outer = _outermost(spec)
    sizes = {"g": spec.group, "outer": outer, "inner": spec.batch // outer}
    named = {"N": "k" if spec.group == 1 else "n" if spec.kv_heads == 1 else "(k g)"}
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
