"""Products of the tangents' kernels: of two matrices, and of each with the other's tangent."""

from __future__ import annotations

from functools import partial
from typing import Any

from pallas_kernels.hopper.seam import Ref, Seam
from pallas_kernels.hopper.tiles import ROWS

__all__ = ["Products"]


class Products:
    """A compute warpgroup's; `number` is its own in the thread block.

    A tangent that is 0 is not among the arrays, and no product is made with it.
    """

    seam: Seam
    refs: Ref

    @property
    def number(self) -> Any:
        raise NotImplementedError

    def has(self, *names: str) -> bool:
        """Whether all of these arrays are there."""
        return all(name in vars(self.refs) for name in names)

    def there(self, *pairs: tuple[str, str]) -> list[tuple[str, str]]:
        """Those pairs of arrays of which both are there."""
        return [pair for pair in pairs if self.has(*pair)]

    def with_two(self, body: Any, name: str, moving: list[tuple[str, str]], columns: int) -> Any:
        """body(accumulator of a block, that of its tangent or None if nothing moves it)."""
        if not moving:
            return self.accumulator(lambda acc: body(acc, None), name, columns)
        return self.accumulator(
            lambda acc: self.accumulator(partial(body, acc), f"t{name}", columns), name, columns
        )

    def accumulator(self, body: Any, name: str, columns: int) -> Any:
        """body(accumulator of 64 rows), zero at first."""
        seam = self.seam
        stand_in = None
        if seam.interpret:
            stand_in = getattr(self.refs, f"{name}_stand_in").at[self.number]
        return seam.with_accumulator(body, (ROWS, columns), stand_in)
