"""Tangents of one call along several directions, which share its weights.

`jax.vmap` over tangents alone makes a batch of as many copies of the call
(`AttentionSpec.directions`). Here some of them go over the blocks together: S and P are made once
for all of these, and only what depends on a direction for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax import Array, lax

from jattn.call.rows import Rows
from jattn.call.sizes import is_known
from jattn.call.spec import AttentionSpec, Operands, Tangents

__all__ = ["Directions"]

# With eight a ninth of S and P is left; blocks are smaller by as much, to take no more memory.
MOST = 8
SAVED = ("top", "rest", "out")  # of the rows' arrays, what forward left


class Directions(NamedTuple):
    """One of the alike calls, how many they are, and how many go together, at least two."""

    one: AttentionSpec
    number: int
    together: int

    @staticmethod
    def of(
        spec: AttentionSpec, tangents: Tangents, wanted: Sequence[str] = ()
    ) -> Directions | None:
        """None of a call that stays a batch.

        That is one of a single direction; of so many that no number from 2 to 8 divides them; with
        a bias or mask that an earlier `jax.vmap` gave rows of its own; or with a tangent or a
        gradient of a bias or scale that directions share.
        """
        m = spec.directions
        if m == 1 or not is_known(spec.batch) or spec.is_empty:
            return None
        together = max(n for n in range(1, MOST + 1) if m % n == 0)
        one = replace(spec, batch=spec.batch // m, directions=1, mapped_rows=())
        names = ["t_bias"] * (tangents.bias is not None) + ["d_bias"] * ("bias" in wanted)
        if together == 1 or not _has_rows_of(one, spec, names):
            return None
        if tangents.scale is not None and tangents.scale.shape[0] != spec.batch:
            return None
        return Directions(one, m, together)

    @property
    def step(self) -> AttentionSpec:
        """A call whose blocks have as many logits as those of the directions that go together."""
        heads, kv_heads = self.one.heads, self.one.kv_heads
        return replace(
            self.one, heads=heads * self.together, kv_heads=kv_heads * self.together,
            bias_shape=None, mask_shape=None,
        )  # fmt: skip

    def each(
        self,
        run: Callable[[Operands, Any], tuple[Array, ...]],
        operands: Operands,
        own: tuple[Any, Any],
    ) -> tuple[Array, ...]:
        """The results of all directions, as those of a batch.

        run: of one direction the results, of its operands, and its own arrays.
        operands: of the batch.
        own: the rows' arrays and the tangents, those of the directions one after another.
        """
        m, together, b = self.number, self.together, self.one.batch

        def of_one(name: str, x: Array | None) -> Array | None:
            if x is None or name in ("bias", "mask", "dropout_start") or x.shape[0] != m * b:
                return x
            return x[:b]

        found = {name: of_one(name, x) for name, x in operands._asdict().items() if name != "sinks"}
        shared = Operands(**found)  # type: ignore[arg-type]
        rows, tangents = own
        kept = {name: x[:b] for name in SAVED if (x := getattr(rows, name, None)) is not None}
        moving = rows._replace(**dict.fromkeys(kept)), tangents
        cut = jax.tree.map(
            lambda x: x.reshape(m // together, together, x.shape[0] // m, *x.shape[1:]), moving
        )
        some = jax.vmap(lambda own: run(shared, (own[0]._replace(**kept), own[1])))
        results: tuple[Array, ...] = lax.map(some, cut)
        return tuple(x.reshape(-1, *x.shape[3:]) for x in results)


def _has_rows_of(one: AttentionSpec, spec: AttentionSpec, names: Sequence[str]) -> bool:
    """Whether a bias and a mask are the same for all directions, and as if there was one alone, and
    what is named has rows for each direction.
    """

    def of(name: str, shape: tuple[int, ...] | None, *, own: bool) -> bool:
        if shape is None:
            return True
        if shape[0] not in (1, one.batch):
            return False
        return spec.rows(name) == Rows.of(shape[0], one.batch).within(spec.directions, own=own)

    bias, mask = one.bias_shape, one.mask_shape
    alike = of("bias", bias, own=False) and of("mask", mask, own=False)
    return alike and all(of(name, bias, own=True) for name in names)
