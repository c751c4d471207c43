"""What is asked of kernels: a call's forward and backward, and the tangents of both.

They are hashable, as a jitted function's static argument is, and compare equal where they do the
same. Letters as in `call.spec`.
"""

from __future__ import annotations

from typing import Protocol

from jax import Array

from jattn.call.row_arrays import AnyBackwardRows, BackwardTangentRows, TangentRows
from jattn.call.spec import AttentionSpec, Operands, Tangents

__all__ = ["Kernels", "Pair", "TangentPair"]


class Pair(Protocol):
    """Forward and backward."""

    @property
    def can_partition(self) -> bool:
        """Whether the partitioner may cut a call."""

    @property
    def takes_parts(self) -> bool:
        """Whether parts of a softmax may be computed, each by a call with an offset of its own."""

    @property
    def takes_output(self) -> bool:
        """Whether backward takes the output, and makes the row term, instead of being given it."""

    def makes_row_term(self, spec: AttentionSpec) -> bool:
        """Whether backward makes the row term itself where it is given the output beside it."""

    def unit(self, spec: AttentionSpec) -> float:
        """What 1 in `top` is of the natural logarithm."""

    def forward(self, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array, Array]:
        """Output (B, T, N, D), and of each row (B, T, N), float32, two numbers `top` and `rest`.

        Together, as top `unit` + rest, they are the log-sum-exp of the keys' logits, natural, to
        which no sink belongs: the maximum, and the logarithm of the sum of what is relative to it.
        A row that sees no key has -inf and 0.
        """

    def backward(
        self,
        spec: AttentionSpec,
        operands: Operands,
        rows: AnyBackwardRows,
        /,
        *,
        wants_bias: bool,
        wants_scale: bool,
    ) -> tuple[Array, ...]:
        """Gradients of query, key and value, and of the bias if it is wanted.

        Args:
          spec: the call.
          operands: its arrays; sinks are not looked at.
          rows: what else each row has.
          wants_bias: the call has a bias whose gradient is asked for.
          wants_scale: the scale is an array whose gradient is asked for: then the gradient of query
            is not yet multiplied by it, and float32.
        """


class TangentPair(Protocol):
    """The tangents of both."""

    def tangent(
        self,
        spec: AttentionSpec,
        operands: Operands,
        rows: TangentRows,
        tangents: Tangents,
        /,
    ) -> tuple[Array, Array]:
        """Tangents of the output (B, T, N, D), and of the log-sum-exp (B, T, N), natural.

        Args:
          spec: the call.
          operands: its arrays; sinks are not looked at.
          rows: what else each row has.
          tangents: of the operands that move; one at least, or of the sinks, in `rows`.
        """

    def backward_tangent(
        self,
        spec: AttentionSpec,
        operands: Operands,
        rows: BackwardTangentRows,
        tangents: Tangents,
        /,
        *,
        wanted: tuple[str, ...],
    ) -> tuple[Array, ...]:
        """Tangents of the gradients.

        Args:
          spec: the call.
          operands: its arrays; sinks are not looked at.
          rows: what else each row has.
          tangents: of the operands that move; it may be that none does.
          wanted: of which gradients, some of query, key, value, bias and scale, in that order. What
            is given of the scale's is a part for each row, (B, T, N) float32.
        """


class Kernels(Pair, TangentPair, Protocol):
    """All four, and a function for what is of higher order."""

    def formula(self, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
        """Output and natural log-sum-exp by a function that JAX differentiates, to any order."""
