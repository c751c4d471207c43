"""A sequence over several devices: along which axis it lies, and what one device holds of it.

Of a call over n devices each has T / n of the queries and S / n of the keys, in one of two layouts,
here for n = 3:

    contiguous    0 0 1 1 2 2        device i has part i of n
    zigzag        0 1 2 2 1 0        parts i and 2 n - 1 - i of 2 n, one after the other, so that
                                     under a causal mask all see as many keys
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax import lax

__all__ = ["Context", "Layout", "Schedule", "context_parallel", "not_dealt", "own_context"]

Schedule = Literal["gather", "heads", "ring"]
Layout = Literal["contiguous", "zigzag"]
type Axes = str | tuple[str, ...]


@dataclass(frozen=True)
class Context:
    """The whole of a call of which `AttentionSpec.queries` and `keys` are a device's part.

    Then a call's lengths, its query offset and the columns of its bias and mask are the whole's.

    queries, keys: how many there are on all devices together; the last may hold fewer.
    schedule: what was asked for; None leaves it to the shapes.
    query_layout, key_layout: how either lie over the devices.
    has_whole_keys: every device has all keys, and its own queries.
    """

    axes: Axes
    devices: int
    queries: int
    keys: int
    schedule: Schedule | None = None
    query_layout: Layout = "contiguous"
    key_layout: Layout = "contiguous"
    has_whole_keys: bool = False

    @property
    def name(self) -> str:
        """The mesh axes in words."""
        return repr(self.axes)


class _Asked(NamedTuple):
    axes: Axes
    schedule: Schedule | None
    layout: Layout


_asked = jax.make_user_context(None)


@contextmanager
def context_parallel(
    axis_name: Axes | None, *, schedule: Schedule | None = None, layout: Layout = "contiguous"
) -> Generator[None]:
    """Makes attention inside `jax.shard_map` that of a sequence cut along a mesh axis.

    A context, as models call attention far below what knows the mesh. Calls inside take a device's
    own part of query, key, value and segment ids, and of bias and mask the rows of its own queries
    with the columns of all keys. Lengths, `query_offset`, "bottom_right" and dropout are those of
    the whole sequence, and so are the results: each device gets those of its own queries, whatever
    others hold, and gradients of its own arrays from all (Liu et al., "Ring Attention with
    Blockwise Transformers", 2023). Mesh axes that `shard_map` leaves to the partitioner are
    gathered for GPU kernels: let it cut batch and heads as well. Part of `jax.jit`'s cache key.
    Under `jax.jit` without `jax.shard_map` nothing has to be said: arrays sharded along the
    sequence are enough.

    Args:
      axis_name: the mesh axis, or several, along which `shard_map` cuts the sequence; None: calls
        inside are of the device's own arrays alone.
      schedule: "gather": every device gets all keys and values, some heads at a time, while those
        that came before are computed. "heads": every device gets the queries, keys and values of
        its share of the heads, computes them as one device would, and sends results back; of key
        heads that the devices divide, and no bias or mask with a row for each query. "ring": keys
        and values go from device to device, and a device holds one part at a time. None: by shape;
        `jattn.explain` says which and why.
      layout: how arrays lie: "contiguous", device i having part i; a causal mask's work is then
        balanced inside the call. "zigzag": as `jattn.zigzag` puts them, for a model that keeps them
        so in all its layers, with positions given.

    Raises:
      ValueError: a schedule or layout of no known name; at a call, an axis that is not a manual
        one there, or "heads" where they cannot be dealt out.

    >>> import jax, jax.numpy as jnp, jattn
    >>> from jax.sharding import PartitionSpec as P
    >>> kinds = (jax.sharding.AxisType.Auto,)
    >>> mesh = jax.make_mesh((len(jax.devices()),), ("sequence",), axis_types=kinds)
    >>> def attend(query, key, value):
    ...     with jattn.context_parallel("sequence"):
    ...         return jattn.dot_product_attention(query, key, value, is_causal=True)
    >>> own = P(None, "sequence")
    >>> attend = jax.jit(jax.shard_map(attend, mesh=mesh, in_specs=own, out_specs=own))
    >>> x = jnp.ones((1, 8 * len(jax.devices()), 2, 8))
    >>> bool(jnp.allclose(attend(x, x, x), jattn.dot_product_attention(x, x, x, is_causal=True)))
    True
    """
    for name, given, kind in (("schedule", schedule, Schedule), ("layout", layout, Layout)):
        if given not in get_args(kind) and not (name == "schedule" and given is None):
            allowed = " or ".join(map(repr, get_args(kind)))
            none = ", or None" if name == "schedule" else ""
            raise ValueError(f"{name} must be {allowed}{none}, got {given!r}")
    axes = axis_name
    names = axes if isinstance(axes, tuple) else (axes,)
    if axes is not None and not (names and all(isinstance(name, str) for name in names)):
        raise ValueError(f"axis_name must be a mesh axis, several, or None, got {axis_name!r}")
    with _asked(None if axes is None else _Asked(axes, schedule, layout)):
        yield


def own_context(queries: int, keys: int) -> Context | None:
    """What calls are part of here whose device has so many queries and keys; None: of nothing."""
    asked: _Asked | None = _asked.value
    if asked is None:
        return None
    devices = _size(asked.axes)
    if devices == 1:
        return None
    if asked.layout == "zigzag" and (queries % 2 or keys % 2):
        raise ValueError(
            "in a zigzag layout a device has two parts of one size, got "
            f"T {queries} and S {keys} a device"
        )
    return Context(
        axes=asked.axes,
        devices=devices,
        queries=devices * queries,
        keys=devices * keys,
        schedule=asked.schedule,
        query_layout=asked.layout,
        key_layout=asked.layout,
    )


def not_dealt(
    context: Context, queries: int, kv_heads: int, shapes: Iterable[tuple[int, ...] | None]
) -> str | None:
    """Why a device's call cannot be of some heads of all positions; None if it can.

    shapes: those of its bias and mask.
    """
    if context.has_whole_keys:
        return "every device has all keys"
    if kv_heads % context.devices:
        return f"{kv_heads} key heads are not a multiple of {context.devices} devices"
    # A device that has one query cannot tell its row from one for all.
    if any(shape is not None and (shape[2] > 1 or queries == 1) for shape in shapes):
        return "a bias or mask has a row for each query"
    return None


def _size(axes: Axes) -> int:
    try:
        size: Any = lax.axis_size(axes)
    except NameError:
        mesh = jax.sharding.get_abstract_mesh()
        manual = ", ".join(map(repr, mesh.manual_axes)) or "none"
        raise ValueError(
            f"context_parallel({axes!r}) is for calls inside jax.shard_map over that axis; manual "
            f"axes here: {manual}. Under jax.jit alone, arrays that are sharded along the sequence "
            "need no context"
        ) from None
    return int(size)
