"""Queries dealt out so that each device's see as many keys: for a gather, where all have all keys.

Of 2 n parts device i has 2 i and 2 i + 1, and gets i and 2 n - 1 - i, as in a zigzag, but in the
order in which they are sent: the first parts of all devices, then the second. For n = 3

    device       0     1     2
    has         0 1   2 3   4 5
    gets        0 5   4 1   2 3

Nothing is put in order before it is computed: a run of queries may stand anywhere. Results come
back by the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax

from jattn.call.context import Axes
from jattn.call.spec import AttentionSpec
from jattn.transforms.context.parts import context_of, queries_of
from jattn.transforms.context.runs import Run, runs

__all__ = ["Deal"]

_Way = list[tuple[int, int]]  # which device sends to which


@dataclass(frozen=True)
class Deal:
    """Who computes which of the queries: each device its own, or as above.

    own: the runs of a device's queries as they lie.
    """

    axes: Axes
    devices: int
    own: tuple[Run, ...]
    is_even: bool

    @staticmethod
    def of(spec: AttentionSpec, *, is_even: bool) -> Deal:
        """Of a device's call."""
        context = context_of(spec)
        own = runs(context.query_layout, context.devices, spec.queries)
        return Deal(context.axes, context.devices, own, is_even)

    @property
    def runs(self) -> tuple[Run, ...]:
        """What a device computes, in the order of `cut`."""
        if not self.is_even:
            return self.own
        half = self.own[0].count // 2
        found = []
        for t in range(2):
            by_home = sorted((to, i) for i, to in self._way(t))
            starts = tuple((2 * i + t) * half for _, i in by_home)
            found.append(Run(0, half, self.devices, table=starts))
        return tuple(found)

    def cut(self, x: Array) -> list[Array]:
        """An array of queries (B, T, ...): that of each run."""
        if not self.is_even:
            return [queries_of(run, x) for run in self.own]
        halves = jnp.split(x, 2, axis=1)
        return [self._sent(part, self._way(t)) for t, part in enumerate(halves)]

    def joined(self, found: Sequence[Array]) -> Array:
        """The reverse: results of each run, (B, T, ...)."""
        if not self.is_even:
            return jnp.concatenate(found, axis=1)
        back = [[(to, i) for i, to in self._way(t)] for t in range(2)]
        return jnp.concatenate([self._sent(x, b) for x, b in zip(found, back, strict=True)], axis=1)

    def cut_alike(self, arrays: Sequence[Array]) -> list[list[Array]]:
        """`cut` of several of one shape and dtype, which are sent together."""
        if not self.is_even:
            return [self.cut(x) for x in arrays]
        found = self.cut(jnp.stack(arrays, axis=2))
        return [[x[:, :, i] for x in found] for i in range(len(arrays))]

    def joined_alike(self, found: Sequence[Sequence[Array]]) -> list[Array]:
        """`joined` likewise."""
        if not self.is_even:
            return [self.joined(x) for x in found]
        whole = self.joined([jnp.stack(x, axis=2) for x in zip(*found, strict=True)])
        return [whole[:, :, i] for i in range(len(found))]

    def _sent(self, x: Array, way: _Way) -> Array:
        if all(i == to for i, to in way):
            return x
        sent: Array = lax.ppermute(x, self.axes, way)
        return sent

    def _way(self, t: int) -> _Way:
        """Where each device's first or second part goes."""
        n = self.devices
        return [(i, min(2 * i + t, 2 * n - 1 - 2 * i - t)) for i in range(n)]
