"""Which Pallas kernels there are, what a device lacks for them, and how they are called."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jattn.call.determinism import is_deterministic
from jattn.call.row_arrays import AnyBackwardRows, BackwardTangentRows, TangentRows
from jattn.call.spec import AttentionSpec, Operands, Tangents
from jattn.call.target import Target
from pallas_kernels.hopper import bias_form
from pallas_kernels.hopper import limits as hopper_limits
from pallas_kernels.portable import limits

__all__ = ["Family", "Kernels", "kernels_of", "lacks", "only"]

Family = Literal["hopper", "portable"]


class _Only(NamedTuple):
    family: Family
    interpret: bool


_only = jax.make_user_context(None)


@contextmanager
def only(family: Family, *, interpret: bool = False) -> Generator[None]:
    """Leaves calls inside the kernels of one family, to test and to time them.

    interpret: run their text on a CPU, which is slow.
    """
    with _only(_Only(family, interpret)):
        yield


def lacks(family: Family, target: Target) -> str | None:
    """What the target lacks for the kernels of a family; None if they run there."""
    asked: _Only | None = _only.value
    if asked is not None and asked.family == family and asked.interpret:
        return None
    capability = target.compute_capability or (0, 0)
    if not target.is_nvidia or capability < (8, 0):
        return f"needs an NVIDIA GPU of compute capability 8.0 or later, the target is {target}"
    if asked is not None and asked.family != family:
        return f"only its {asked.family} kernels may run here"
    if family == "hopper" and capability != (9, 0):
        return f"its Hopper kernels are for compute capability 9.0, the target is {target}"
    return None


@dataclass(frozen=True)
class Kernels:
    """A pair of kernels, forward and backward, and those of tangents (`transforms.kernels`).

    algorithm: "flash" or "chunked", the query-chunked one, which is portable alone.
    deterministic: gradients are to be bitwise the same each time; portable ones always are.
    """

    family: Family
    algorithm: Literal["flash", "chunked"]
    deterministic: bool
    interpret: bool
    takes_output = False
    takes_parts = True

    @property
    def can_partition(self) -> bool:
        """Whether the partitioner may cut a call: not the effects of Mosaic's interpreter."""
        return not (self.interpret and self.family == "hopper")

    def forward(self, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array, Array]:
        if self.family == "hopper":
            from pallas_kernels.hopper import forward as hopper  # imports Mosaic GPU

            return hopper.forward(spec, operands, interpret=self.interpret)
        found: tuple[Array, Array, Array] = self._portable().forward(
            spec, operands, interpret=self.interpret
        )
        return found

    def takes_halves(self, spec: AttentionSpec) -> bool:
        """Whether forward reads each half of queries and keys where it is (`call.halves`)."""
        if self.family != "hopper" or self.interpret:
            return False
        from pallas_kernels.hopper.forward import takes_halves

        return takes_halves(spec)

    def makes_row_term(self, spec: AttentionSpec) -> bool:
        """Whether backward makes the row term itself where it is given the output beside it."""
        if self.family != "hopper":
            return False
        from pallas_kernels.hopper.backward_tiles import makes_row_term

        return makes_row_term(spec)

    def unit(self, spec: AttentionSpec) -> float:
        if self.family == "hopper":
            from pallas_kernels.hopper.softmax import unit

            return unit(spec)
        from pallas_kernels.portable.elements import base

        return base(spec) * math.log(2)

    def backward(
        self,
        spec: AttentionSpec,
        operands: Operands,
        rows: AnyBackwardRows,
        *,
        wants_bias: bool,
        wants_scale: bool,
    ) -> tuple[Array, ...]:
        if self.family == "hopper" and not hopper_limits.leaves_backward(
            spec, wants_bias=wants_bias
        ):
            from pallas_kernels.hopper import backward as hopper

            on_hopper = bias_form.writes_gradient(spec) or bias_form.sums_gradient(spec)
            on_hopper &= wants_bias
            gradients: tuple[Array, ...] = hopper.backward(
                spec,
                operands,
                rows,
                wants_bias=on_hopper,
                wants_scale=wants_scale,
                deterministic=self.deterministic,
                interpret=self.interpret,
            )
            if wants_bias and not on_hopper:
                from pallas_kernels.portable import flash

                own = self._in_portable_unit(spec, rows)
                gradients += (
                    flash.whole_bias_gradient(spec, operands, own, interpret=self.interpret),
                )
            return gradients
        found: tuple[Array, ...] = self._portable().backward(
            spec,
            operands,
            self._in_portable_unit(spec, rows),
            wants_bias=wants_bias,
            wants_scale=wants_scale,
            interpret=self.interpret,
        )
        return found

    def own_tangents(self, spec: AttentionSpec) -> bool:
        """Whether there are kernels of a call's tangents, whichever of its operands move.

        They are the portable ones, of both families, but where Hopper has one of its own.
        """
        return not limits.tangent_refusals(spec)

    def tangent(
        self, spec: AttentionSpec, operands: Operands, rows: TangentRows, tangents: Tangents
    ) -> tuple[Array, Array]:
        moves = any(x is not None for x in (tangents.query, tangents.key, tangents.value))
        moves &= tangents.scale is None
        # Mosaic's interpreter has ordered effects, which a primitive of linear maps cannot have.
        on_hopper = self.family == "hopper" and moves and not self.interpret
        if on_hopper and not hopper_limits.tangent_refusals(spec):
            from pallas_kernels.hopper.tangent import tangent as hopper

            return hopper(spec, operands, rows, tangents)
        from pallas_kernels.portable.tangent import tangent

        rows = self._in_portable_unit(spec, rows)
        return tangent(spec, operands, rows, tangents, interpret=self.interpret)

    def backward_tangent(
        self,
        spec: AttentionSpec,
        operands: Operands,
        rows: BackwardTangentRows,
        tangents: Tangents,
        *,
        wanted: tuple[str, ...],
    ) -> tuple[Array, ...]:
        found: dict[str, Array] = {}
        on_hopper = self.family == "hopper" and tangents.scale is None and not self.interpret
        # The tangent of a scale's gradient is a sum that the portable kernel makes of the same.
        by_queries = on_hopper and "query" in wanted and "scale" not in wanted
        if by_queries and not hopper_limits.backward_tangent_refusals(spec):
            from pallas_kernels.hopper.backward_tangent import query_gradient_tangent

            found["query"] = query_gradient_tangent(spec, operands, rows, tangents)
        by_keys = on_hopper and ("key" in wanted or "value" in wanted)
        if by_keys and not hopper_limits.key_tangent_refusals(spec):
            from pallas_kernels.hopper.key_tangents import key_gradient_tangents

            # One alone is made beside the other.
            found["key"], found["value"] = key_gradient_tangents(spec, operands, rows, tangents)
        others = tuple(name for name in wanted if name not in found)
        if others:
            from pallas_kernels.portable.backward_tangent import backward_tangent

            own = self._in_portable_unit(spec, rows)
            made = backward_tangent(
                spec, operands, own, tangents, wanted=others, interpret=self.interpret
            )
            found |= dict(zip(others, made, strict=True))
        return tuple(found[name] for name in wanted)

    def _in_portable_unit[Rows: (AnyBackwardRows, TangentRows, BackwardTangentRows)](
        self, spec: AttentionSpec, rows: Rows
    ) -> Rows:
        """The log-sum-exp as the portable kernels have it; `rest` has what rounding leaves out."""
        if self.family == "portable" or spec.bias_shape is not None:
            return rows  # with a bias both are natural
        from pallas_kernels.portable.elements import base

        seen = rows.top > -jnp.inf
        finite = jnp.where(seen, rows.top, 0)
        own = finite / base(spec)
        rest = rows.rest + (finite - own * base(spec)) * math.log(2)
        return rows._replace(top=jnp.where(seen, own, -jnp.inf), rest=rest)

    def _portable(self) -> Any:
        from pallas_kernels.portable import chunked, flash  # import Pallas

        return {"flash": flash, "chunked": chunked}[self.algorithm]


def kernels_of(family: Family, algorithm: Literal["flash", "chunked"]) -> Kernels:
    """The pair, to be run as the contexts in force ask."""
    asked: _Only | None = _only.value
    return Kernels(family, algorithm, is_deterministic(), asked is not None and asked.interpret)
