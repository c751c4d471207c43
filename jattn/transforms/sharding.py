"""What jax's sharded array types ask of a call, under `jax.shard_map` and explicit meshes."""

from __future__ import annotations

import jax
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec

__all__ = ["partition", "placed", "varying_alike", "varying_as"]


def varying_alike[T](tree: T) -> T:
    """The arrays, all varying over each manual mesh axis that one of them varies over.

    Outside `shard_map` they come back as they are. Differentiation sums the gradient of an array
    that was the same everywhere over the axes added here.
    """
    return varying_as(tree, tree)


def varying_as[T](tree: T, operands: object) -> T:
    """The arrays of `tree`, varying as the arrays of `operands` do: loop carries must."""
    axes = frozenset[str]().union(*(_manual_axes(x) for x in jax.tree.leaves(operands)))

    def cast(x: Array) -> Array:
        missing = tuple(sorted(axes - _manual_axes(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    varied: T = jax.tree.map(cast, tree)
    return varied


def partition(x: Array) -> PartitionSpec:
    """How an array is laid out over the mesh's explicit axes, one entry a dimension."""
    spec = jax.typeof(x).sharding.spec
    return PartitionSpec(*spec, *(None,) * (x.ndim - len(spec)))


def placed(x: Array, place: PartitionSpec) -> Array:
    """The array laid out so over the mesh's explicit axes, if there are any."""
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return x
    laid_out: Array = jax.sharding.reshard(x, place)
    return laid_out


def _manual_axes(x: Array) -> frozenset[str]:
    axes: frozenset[str] = jax.typeof(x).manual_axis_type.varying
    return axes
