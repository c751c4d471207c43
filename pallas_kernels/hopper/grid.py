"""The thread blocks of a kernel by named axes, of any size.

The last axis changes fastest. CUDA lets that one alone grow over 65,535; where another would, all
are launched as one, in the same order, and each thread block divides its number by their sizes.
Else it does not, as what is divided takes registers; but of four, the first two are launched as
one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from jax import Array, lax

from pallas_kernels.hopper.indices import divided

__all__ = ["Grid"]

MOST_OF_AN_AXIS = 65_535  # but the last; CUDA C++ Programming Guide, "Technical specifications"


@dataclass(frozen=True)
class Grid:
    """Sizes of the axes by name, in order."""

    axes: tuple[tuple[str, int], ...]

    @property
    def is_flat(self) -> bool:
        """Whether it is launched as one axis."""
        sizes = [size for _, size in self.axes]
        return any(size > MOST_OF_AN_AXIS for size in (prod(sizes[:-2]), *sizes[-2:-1]))

    @property
    def count(self) -> int:
        """How many thread blocks there are."""
        return prod(size for _, size in self.axes)

    @property
    def launch(self) -> dict[str, Any]:
        """The arguments that say so to `plgpu.kernel`."""
        names, sizes = zip(*self.axes, strict=True)
        if self.is_flat:
            return {"grid": (prod(sizes),), "grid_names": ("block",)}
        return {"grid": sizes, "grid_names": names}

    def place(self) -> dict[str, Array]:
        """Where along each axis the thread block is that asks."""
        if not self.is_flat:
            return {name: lax.axis_index(name) for name, _ in self.axes}
        return self.at(lax.axis_index("block"))

    def at(self, number: Array) -> dict[str, Array]:
        """Where along each axis the thread block with this number is, in the order of launch."""
        rest, place = number, {}
        for name, size in reversed(self.axes[1:]):
            rest, place[name] = divided(rest, size)
        return place | {self.axes[0][0]: rest}
