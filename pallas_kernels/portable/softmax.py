"""The running softmax of a tile's rows, in base 2, and its end.

    m' = max(m, rowmax x)    P = 2^((x - m') c)    l' = l 2^((m - m') c) + rowsum P

(Milakov and Gimelshein, 2018; Dao et al., 2022, section 3.1.) A row that has seen no key has
m = -inf and l = 0. The maximum is one of the x as they are: its difference to those near it
is exact, however large both are.

A row's elements are in several threads, and each exchange between these costs as much as some
steps of the sum itself. So what need not be known yet is kept apart, by key modulo `APART`:

    key       0  1 .. 7 | 8  9 .. 15 | 16 ..        a thread of a matrix product's result has
    kept in   0  1 .. 7 | 0  1 .. 7  | 0  ..        2i and 2i + 1 of every eight
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.portable.elements import Logits
from pallas_kernels.portable.triton import LN2, LOG2E, exp2

__all__ = ["APART", "End", "Softmax", "apart"]

APART = 8


class End(NamedTuple):
    """A row's result: what its O is multiplied by, and its keys' log-sum-exp in two numbers.

    That is top c log 2 + rest, natural; -inf and 0 of a row that sees no key. `total` is the sum of
    the exponentials relative to the maximum, the sink's too.
    """

    factor: Array
    top: Array
    rest: Array
    total: Array


class Softmax(NamedTuple):
    """The rows' maximum and sum so far, each (rows, 1) or (rows, APART)."""

    m: Array
    l: Array

    @staticmethod
    def start(rows: int, *, maxima: int, sums: int) -> Softmax:
        """Of rows that have seen nothing, with so many columns of each: 1 or APART."""
        return Softmax(
            jnp.full((rows, maxima), -jnp.inf, jnp.float32), jnp.zeros((rows, sums), jnp.float32)
        )

    def update(self, logits: Logits, *, may_hide: bool) -> tuple[Array, Softmax, Array]:
        """P of a block, the softmax that includes it, and the correction of what came before.

        For one maximum a row. may_hide: whether a row may have seen nothing yet.
        """
        x, c, _ = logits
        m = jnp.maximum(self.m, x.max(axis=1, keepdims=True))
        shift = jnp.where(m == -jnp.inf, 0.0, m) if may_hide else m
        p = exp2(x, c, shift)
        correction = jnp.exp2((self.m - shift) * c)
        added = p.sum(axis=1, keepdims=True) if self.l.shape[1] == 1 else apart(p).sum(axis=1)
        return p, Softmax(m, self.l * correction + added), correction

    def add(self, logits: Logits, *, may_hide: bool) -> Softmax:
        """The softmax that includes a block, where P is not needed."""
        if self.m.shape[1] == 1:
            return self.update(logits, may_hide=may_hide)[1]
        x, c, _ = logits
        x = apart(x)
        m = jnp.maximum(self.m, x.max(axis=1))
        shift = jnp.where(m == -jnp.inf, 0.0, m) if may_hide else m
        p = exp2(x, c, shift[:, None, :])
        return Softmax(m, self.l * jnp.exp2((self.m - shift) * c) + p.sum(axis=1))

    def whole(self, c: float) -> Softmax:
        """The same with one maximum and sum a row."""
        m = self.m.max(axis=1, keepdims=True)
        shift = jnp.where(m == -jnp.inf, 0.0, m)
        l = (self.l * jnp.exp2((self.m - shift) * c)).sum(axis=1, keepdims=True)
        return Softmax(m, l)

    def finish(self, c: float, *, sink: Array | None, real: Array | None) -> End:
        """The rows' results, for one maximum and sum a row.

        sink: one more logit of each row, natural, which has no value; or None.
        real: which rows are to have any; None if all.
        """
        none = self.l == 0.0
        if real is not None:
            none = none | ~real
        m, l = jnp.where(none, 0.0, self.m), jnp.where(none, 1.0, self.l)
        # Of a sink far above all keys the sum is infinite, and what is divided by it 0.
        total = l if sink is None else l + jnp.exp2((sink - m * (c * LN2)) * LOG2E)
        return End(
            factor=jnp.where(none, 0.0, 1.0 / total),
            top=jnp.where(none, -jnp.inf, m),
            rest=jnp.log(l),
            total=total,
        )


def apart(x: Array) -> Array:
    """(rows, keys) as (rows, keys / APART, APART), whose sum over axis 1 no threads exchange."""
    return x.reshape(x.shape[0], -1, APART)
