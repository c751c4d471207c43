"""In which order the kernel of the output's tangent visits a tile's blocks of keys, and how often.

c, which is taken off the tangents of a row's logits, is made before its first weights are. A block
that all rows see whole gives one near the rows' means, so it is visited first:

    step of `masks`     0      1      2      3      4
                       mask   mask |  clear  clear | mask
    visit               1      2      0      3      4

A tile without one, as a causal call's first or any of a narrow window, sees few blocks: they are
swept before, for keys and their tangents alone, and c is the rows' mean itself.

    step of `masks`     0      1      2
                       mask   mask   mask
    sweep, then visit   0 0    1 1    2 2
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

if TYPE_CHECKING:
    from jax import Array

    from pallas_kernels.hopper.masks import Steps
    from pallas_kernels.hopper.plan import Plan

__all__ = ["Order", "order_of"]


class Order(NamedTuple):
    """A tile's visits.

    first: the step of the first visit; None where no block needs a mask, and visits are steps.
    sweep: how many blocks are swept before: none or all, in the order of steps.
    """

    steps: Steps
    first: Array | None
    sweep: Array | int

    def step(self, i: Array | int) -> Array | int:
        """The step that the i-th visit makes."""
        if self.first is None:
            return i
        if isinstance(i, int) and i == 0:
            return self.first
        return jnp.where(i == 0, self.first, jnp.where(i <= self.first, i - 1, i))

    def block(self, i: Array | int) -> Array:
        """The block of keys of the i-th visit."""
        return self.steps.block(self.step(i))


def order_of(plan: Plan, steps: Steps, *, moves_logits: bool) -> Order:
    """The visits of a tile, swept before only if a logit has a tangent."""
    if not plan.masked:
        return Order(steps, None, 0)
    has_clear = steps.clear_from < steps.clear_to
    first = jnp.where(has_clear, steps.clear_from, 0)
    if not moves_logits:
        return Order(steps, first, 0)
    return Order(steps, first, jnp.where(has_clear, 0, steps.visits))
