"""Over which mesh axes a call on sharded arrays stays cut, and which heads of the keys go where.

An axis of an array is cut by the first of its mesh axes that divide it: of what XLA pads, a sum
over devices would be wrong. The sequence alone may have a last part that is shorter, or none.

Query heads stay cut further than key heads are, as they are where there are more devices than key
heads: a device then computes with those key heads that its query heads have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec, Sharding

from jattn.call.positions import MOST
from jattn.call.spec import AttentionSpec

__all__ = ["Kept", "KeyHeads", "found_axes", "named_axes", "outermost", "used_key_heads"]

type Axes = tuple[str, ...]  # the mesh axes that an axis of an array is cut by, outermost first


class Kept(NamedTuple):
    """The mesh axes over which batch, heads, queries and keys stay cut."""

    batch: Axes = ()
    heads: Axes = ()
    key_heads: Axes = ()  # the first of `heads`
    queries: Axes = ()
    keys: Axes = ()
    devices: int = 1  # that the queries are cut over

    @staticmethod
    def of(
        spec: AttentionSpec,
        mesh: Any,
        query: tuple[Axes, ...],
        key: tuple[Axes, ...],
        *,
        takes_parts: bool,
    ) -> Kept:
        """By how query and key are cut, each along their four axes."""

        def devices(axes: Axes) -> int:
            return math.prod(mesh.shape[axis] for axis in axes)

        def key_heads_of(heads: Axes) -> Axes:
            return _common(heads, key[2]) if spec.kv_heads > 1 else ()

        def fits(heads: Axes) -> bool:
            share, left = divmod(spec.heads, devices(heads))
            is_even = left == 0 and spec.kv_heads % devices(key_heads_of(heads)) == 0
            return is_even and (share % spec.group == 0 or spec.group % share == 0)

        batch = _longest(query[0], lambda axes: outermost(spec) % devices(axes) == 0)
        heads = _longest(query[2], fits)
        kept = Kept(batch, heads, key_heads_of(heads))
        along = devices(query[1])
        # Their number beside the offsets of a device: see `positions.MOST`.
        may_cut = takes_parts and spec.context is None and spec.queries + spec.keys <= MOST
        if along == 1 or not may_cut:
            return kept
        keys = query[1] if key[1] == query[1] else ()
        return kept._replace(queries=query[1], keys=keys, devices=along)

    def place(self, axes: str) -> PartitionSpec:
        """How an array with these axes is laid out."""
        named = {"b": self.batch, "B": self.batch, "k": self.key_heads, "N": self.heads}
        named |= {"t": self.queries, "s": self.keys}
        return PartitionSpec(*(named.get(axis) or None for axis in axes.split()))

    def summed_over(self, axes: str) -> Axes:
        """The mesh axes over which a result is a sum: those kept of what it does not have."""
        own = axes.split()
        missing = () if "b" in own or "B" in own else self.batch
        if "k" in own:
            missing += self.of_one_key_head
        elif "N" not in own:
            missing += self.heads
        if "t" not in own and not ("s" in own and self.keys):
            missing += self.queries
        return missing

    @property
    def of_one_key_head(self) -> Axes:
        """Those that cut query heads, but not key heads."""
        return self.heads[len(self.key_heads) :]


class KeyHeads(NamedTuple):
    """Of the key heads that a device holds those of its query heads: `used`, from `first` on."""

    held: int
    used: int
    first: Array | int

    @staticmethod
    def of(spec: AttentionSpec, kept: Kept, heads: int, held: int) -> KeyHeads:
        """On a device that holds so many query and key heads."""
        used = used_key_heads(spec, heads)
        if used == held:
            return KeyHeads(held, used, 0)
        return KeyHeads(held, used, lax.axis_index(kept.of_one_key_head) * heads // spec.group)

    def taken(self, x: Array) -> Array:
        """(B, S, held, H) -> (B, S, used, H)."""
        if self.used == self.held:
            return x
        return lax.dynamic_slice_in_dim(x, self.first, self.used, axis=2)

    def put_back(self, x: Array) -> Array:
        """(B, S, used, H) -> (B, S, held, H), zero elsewhere."""
        if self.used == self.held:
            return x
        batch, keys, _, dim = x.shape
        zeros = jnp.zeros((batch, keys, self.held, dim), x.dtype)
        return lax.dynamic_update_slice_in_dim(zeros, x, self.first, axis=2)


def used_key_heads(spec: AttentionSpec, heads: int) -> int:
    """How many key heads so many query heads of a device have."""
    return max(1, heads // spec.group)


def named_axes(spec: PartitionSpec, rank: int) -> tuple[Axes, ...]:
    """Those of each axis of an array."""
    entries = (*spec, *(None,) * (rank - len(spec)))
    return tuple(x if isinstance(x, tuple) else () if x is None else (x,) for x in entries)


def found_axes(placed: Sharding | None, rank: int, mesh: Mesh) -> tuple[Axes, ...]:
    """The mesh axes by which the partitioner cuts an array, those of each of its axes.

    It may cut by a part of a mesh axis, which has no name: that is left out, and all within it.
    """
    if placed is None or placed.is_fully_replicated or mesh.empty:
        return ((),) * rank
    length = mesh.size  # which every number of parts divides
    slices = placed.devices_indices_map((length,) * rank)
    bounds = [[x.indices(length)[:2] for x in slices[device]] for device in mesh.devices.flat]
    starts, stops = np.moveaxis(np.array(bounds), -1, 0).reshape(2, *mesh.devices.shape, rank)
    shares = np.ravel(stops - starts)[:rank]
    return tuple(_axes_by(starts[..., i], length, share, mesh) for i, share in enumerate(shares))


def outermost(spec: AttentionSpec) -> int:
    """The size of the outermost axis that the batch is made of, where rows of it share a bias."""
    mixed = [rows.outer.size for _, rows in spec.mapped_rows if rows.is_mixed]
    return math.gcd(*mixed) if mixed else spec.batch


def _axes_by(starts: np.ndarray, length: int, share: int, mesh: Mesh) -> Axes:
    """By where the shares of a length start, for each device of the mesh."""
    sizes = zip(mesh.axis_names, mesh.devices.shape, np.indices(mesh.devices.shape), strict=True)
    untried = [(name, size, place) for name, size, place in sizes if size > 1]
    found: Axes = ()
    while length > share:
        for name, size, place in untried:
            each, left = divmod(length, size)
            if name not in found and left == 0 and np.array_equal(starts // max(each, 1), place):
                break
        else:
            break
        found, length, starts = (*found, name), each, starts % each
    return found


def _common(axes: Axes, others: Axes) -> Axes:
    """The first of them that are the same."""
    same = 0
    while axes[same : same + 1] == others[same : same + 1] != ():
        same += 1
    return axes[:same]


def _longest(axes: Axes, fits: Callable[[Axes], bool]) -> Axes:
    """The most of the first of them that fit."""
    return next(axes[:n] for n in range(len(axes), -1, -1) if n == 0 or fits(axes[:n]))
