"""Which positions a device holds, and what queries of one run see of keys of another.

A run is of positions that stand one after another: all of a device's in a contiguous layout, either
half in a zigzag one. Every device runs the same program, so what is known of a run is where it
stands on each of them:

    3 devices, keys sent on by 1     device        0    1    2
                                     queries of    0    1    2
                                     keys of       2    0    1
                                     distance    -2 s   s    s     first query less first key
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jattn.call.band import Band
from jattn.call.context import Layout
from jattn.call.spec import AttentionSpec

__all__ = ["Run", "Sight", "runs", "sight"]


@dataclass(frozen=True)
class Run:
    """Neighbouring positions.

    first, count: which of a device's array they are.
    devices: how many there are.
    zeroth, step: where the first of them stands in the whole sequence on device 0, and how much
      further on each next one.
    sent: by how many devices they have been sent on.
    table: where the first stands on each device, if it stands nowhere so even.
    """

    first: int
    count: int
    devices: int
    zeroth: int = 0
    step: int = 0
    sent: int = 0
    table: tuple[int, ...] = ()

    @property
    def starts(self) -> tuple[int, ...]:
        """Where the first stands, on each device."""
        if self.table:
            return self.table
        n = self.devices
        return tuple(self.zeroth + self.step * ((i - self.sent) % n) for i in range(n))

    def start(self, device: Array) -> Array:
        """Where the first stands on this device, int32."""
        if self.table:
            # No array of them: a call that the partitioner may cut takes no constants.
            found = jnp.full((), self.table[0], jnp.int32)
            for i, first in enumerate(self.table[1:], 1):
                found = jnp.where(device == i, first, found)
            return found
        if self.step == 0:
            return jnp.full((), self.zeroth, jnp.int32)
        home = lax.rem(device + (self.devices - self.sent), jnp.int32(self.devices))
        return self.zeroth + self.step * home


def runs(layout: Layout, devices: int, count: int) -> tuple[Run, ...]:
    """Those of a device that holds so many positions."""
    if layout == "contiguous":
        return (Run(0, count, devices, step=count),)
    half = count // 2
    last = (2 * devices - 1) * half
    return Run(0, half, devices, step=half), Run(half, half, devices, last, -half)


class Sight(NamedTuple):
    """The band of a run of queries and one of keys.

    needs_start: it counts from where they stand, which differs by device or is not known.
    """

    band: Band
    needs_start: bool


def sight(spec: AttentionSpec, queries: Run, keys: Run) -> Sight | None:
    """What queries see of keys by the band alone; None if on no device any sees one."""
    if spec.band == Band():
        return Sight(spec.band, needs_start=False)
    if spec.has_query_offset:
        return Sight(spec.band, needs_start=True)
    distances = {q - k for q, k in zip(queries.starts, keys.starts, strict=True)}
    bands = [spec.band.moved(d).within(queries.count, keys.count) for d in sorted(distances)]
    if all(band.hides_all(queries.count, keys.count) for band in bands):
        return None
    if len(set(bands)) == 1:
        return Sight(bands[0], needs_start=False)
    return Sight(spec.band, needs_start=True)
