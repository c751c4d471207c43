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
from jattn.call.spec import AttentionSpec, MovingRows, Operands, Tangents
from jattn.call.target import Target
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
    """A pair of kernels, forward and backward, and those of tangents.

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
        """Output (B, T, N, D), and of each row (B, T, N), float32, two numbers `top` and `rest`.

        Together, as top `unit` + rest, they are the log-sum-exp of the keys' logits, natural, to
        which no sink belongs: the maximum, and the logarithm of the sum of what is relative to it.
        A row that sees no key has -inf and 0.
        """
        if self.family == "hopper":
            from pallas_kernels.hopper import forward as hopper  # imports Mosaic GPU

            return hopper.forward(spec, operands, interpret=self.interpret)
        found: tuple[Array, Array, Array] = self._portable().forward(
            spec, operands, interpret=self.interpret
        )
        return found

    def unit(self, spec: AttentionSpec) -> float:
        """What 1 in `top` is of the natural logarithm."""
        if self.family == "hopper":
            from pallas_kernels.hopper.softmax import unit

            return unit(spec)
        from pallas_kernels.portable.elements import base

        return base(spec) * math.log(2)

    def backward(
        self,
        spec: AttentionSpec,
        operands: Operands,
        top: Array,
        rest: Array,
        row_term: Array,
        d_out: Array,
        *,
        wants_bias: bool,
        wants_scale: bool,
    ) -> tuple[Array, ...]:
        """Gradients of query, key and value, and of the bias if it is wanted.

        Args:
          spec: the call.
          operands: its arrays.
          top: (B, T, N) float32, what forward gave.
          rest: (B, T, N) float32, the same, with the sink in its sum if there is one.
          row_term: (B, T, N) float32, rowsum(O dO) less the gradient of the log-sum-exp; 0 of rows
            that see no key.
          d_out: (B, T, N, D), gradient of the output; 0 past the query lengths.
          wants_bias: the call has a bias whose gradient is asked for.
          wants_scale: the scale is an array whose gradient is asked for: then the gradient of query
            is not yet multiplied by it, and float32.
        """
        portable = spec.mask_shape is not None or spec.bias_shape is not None
        if self.family == "hopper" and not portable:
            from pallas_kernels.hopper import backward as hopper

            return hopper.backward(
                *(spec, operands, top, rest, row_term, d_out),
                wants_scale=wants_scale,
                deterministic=self.deterministic,
                interpret=self.interpret,
            )
        saved = self._in_portable_unit(spec, top, rest)
        found: tuple[Array, ...] = self._portable().backward(
            *(spec, operands, *saved, row_term, d_out),
            wants_bias=wants_bias,
            wants_scale=wants_scale,
            interpret=self.interpret,
        )
        return found

    def own_tangents(self, spec: AttentionSpec, names: frozenset[str]) -> bool:
        """Whether there are kernels of a call's tangents, whichever of its operands move.

        They are the portable ones, of both families, but where Hopper has one of its own.
        """
        return not limits.tangent_refusals(spec)

    def tangent(
        self,
        spec: AttentionSpec,
        operands: Operands,
        top: Array,
        rest: Array,
        out: Array,
        tangents: Tangents,
        of_sinks: Array | None,
    ) -> tuple[Array, Array]:
        """Tangents of the output (B, T, N, D) and of the log-sum-exp (B, T, N) float32.

        Args:
          spec: the call.
          operands: its arrays; sinks are not looked at.
          top: (B, T, N) float32, what forward gave.
          rest: (B, T, N) float32, the same, with the sink in its sum if there is one.
          out: (B, T, N, D), what forward gave.
          tangents: what moves.
          of_sinks: (B, T, N) float32, the sinks' part of the log-sum-exp's tangent, or None.
        """
        moves = any(x is not None for x in (tangents.query, tangents.key, tangents.value))
        moves &= tangents.scale is None
        # Mosaic's interpreter has ordered effects, which a primitive of linear maps cannot have.
        if self.family == "hopper" and moves and not self.interpret:
            from pallas_kernels.hopper import limits as hopper_limits

            if not hopper_limits.tangent_refusals(spec):
                from pallas_kernels.hopper.tangent import tangent as hopper

                return hopper(spec, operands, top, rest, out, tangents, of_sinks)
        from pallas_kernels.portable.tangent import tangent

        saved = (*self._in_portable_unit(spec, top, rest), out)
        return tangent(spec, operands, *saved, tangents, of_sinks, interpret=self.interpret)

    def backward_tangent(
        self,
        spec: AttentionSpec,
        operands: Operands,
        top: Array,
        rest: Array,
        rows: MovingRows,
        tangents: Tangents,
        *,
        wanted: tuple[str, ...],
    ) -> tuple[Array, ...]:
        """Tangents of those gradients that are wanted, "query", "key", "value", "bias", "scale".

        Of the scale it is each row's part, (B, T, N) float32.
        """
        from pallas_kernels.portable.backward_tangent import backward_tangent

        saved = self._in_portable_unit(spec, top, rest)
        found: tuple[Array, ...] = backward_tangent(
            spec, operands, *saved, rows, tangents, wanted=wanted, interpret=self.interpret
        )
        return found

    def _in_portable_unit(
        self, spec: AttentionSpec, top: Array, rest: Array
    ) -> tuple[Array, Array]:
        """The log-sum-exp as the portable kernels have it; `rest` has what rounding leaves out."""
        if self.family == "portable" or spec.bias_shape is not None:
            return top, rest  # with a bias both are natural
        from pallas_kernels.portable.elements import base

        seen = top > -jnp.inf
        finite = jnp.where(seen, top, 0)
        own = finite / base(spec)
        rest = rest + (finite - own * base(spec)) * math.log(2)
        return jnp.where(seen, own, -jnp.inf), rest

    def _portable(self) -> Any:
        from pallas_kernels.portable import chunked, flash  # import Pallas

        return {"flash": flash, "chunked": chunked}[self.algorithm]


def kernels_of(family: Family, algorithm: Literal["flash", "chunked"]) -> Kernels:
    """The pair, to be run as the contexts in force ask."""
    asked: _Only | None = _only.value
    return Kernels(family, algorithm, is_deterministic(), asked is not None and asked.interpret)
