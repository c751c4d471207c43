"""Which row of a bias or mask each row of the batch takes.

`jax.vmap` adds its axis to the batch as the outermost. A bias has rows of its own along some of the
axes that a batch is made of, and is one along the others:

    batch of (3, 2)     0 1 2 3 4 5
    rows of (3, 1)      0 0 1 1 2 2        ((3, True), (2, False))
    rows of (1, 2)      0 1 0 1 0 1        ((3, False), (2, True))
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

__all__ = ["Axis", "Rows"]


class Axis(NamedTuple):
    """A part of the batch axis, and whether there is a row for each of its indices."""

    size: int
    own: bool


@dataclass(frozen=True)
class Rows:
    """The axes that a batch is made of, the outermost first; no two neighbours are alike."""

    axes: tuple[Axis, ...]

    @staticmethod
    def of(rows: int, batch: int) -> Rows:
        """Those of an array with one row, or with a row for each of the batch."""
        return Rows((Axis(batch, rows == batch),))

    @property
    def count(self) -> int:
        """How many rows there are."""
        return math.prod(axis.size for axis in self.axes if axis.own)

    @property
    def is_mixed(self) -> bool:
        """Whether some but not all rows of the batch share a row."""
        return len(self.axes) > 1

    @property
    def outer(self) -> Axis:
        """The outermost axis."""
        return self.axes[0]

    @property
    def inner(self) -> Axis:
        """The innermost axis."""
        return self.axes[-1]

    def within(self, size: int, *, own: bool) -> Rows:
        """The same in a batch that has one more axis, the outermost."""
        if size == 1:
            return self
        axes = [axis for axis in self.axes if axis.size > 1]
        if axes and axes[0].own == own:
            size *= axes.pop(0).size
        return Rows((Axis(size, own), *axes))

    def part(self, count: int) -> Rows:
        """The same in each of this many equal parts of the batch; it divides the outermost axis."""
        size, own = self.outer
        rest = Rows(self.axes[1:] or (Axis(1, own),))
        return rest.within(size // count, own=own)

    def row(self, index: Array) -> Array:
        """The row that this row of the batch takes."""
        if not self.is_mixed:
            return index if self.inner.own else jnp.zeros_like(index)
        return _joined([(a, digit if a.own else None) for a, digit in self._digits(index)], index)

    def member(self, row: Array, turn: Array) -> Array:
        """Of the rows of the batch that take this row, the one with this number."""
        own, shared = (Rows(tuple(a for a in self.axes if a.own is x)) for x in (True, False))
        digits = {True: list(own._digits(row)), False: list(shared._digits(turn))}
        joined = [digits[axis.own].pop(0)[1] for axis in self.axes]
        return _joined(list(zip(self.axes, joined, strict=True)), row)

    def _digits(self, index: Array) -> list[tuple[Axis, Array]]:
        """The index along each axis."""
        found = []
        for place, axis in reversed(list(enumerate(self.axes))):
            digit = index
            if place > 0:
                size = jnp.full_like(index, axis.size)
                index, digit = lax.div(index, size), lax.rem(index, size)
            found.append((axis, digit))
        return found[::-1]


def _joined(digits: list[tuple[Axis, Array | None]], like: Array) -> Array:
    """The index whose digits these are, without the axes that have none."""
    index: Array | None = None
    for axis, digit in digits:
        if digit is not None:
            index = digit if index is None else index * axis.size + digit
    return jnp.zeros_like(like) if index is None else index
