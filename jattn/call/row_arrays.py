"""What the derivatives of a call take of each row of its logits, beside its operands.

Letters as in `spec`. All are in the accumulator's dtype but the output and what is of its shape,
(B, T, N, D), which have the call's. Common to all three: `top` and `rest` (B, T, N) are what
forward gave, the row's maximum in the kernels' unit and the logarithm of the sum beside it, with
the sink in that sum if there is one; -inf and 0 of a row that sees no key.
"""

from __future__ import annotations

from typing import NamedTuple

from jax import Array

__all__ = [
    "AnyBackwardRows",
    "BackwardRows",
    "BackwardRowsBeside",
    "BackwardTangentRows",
    "TangentRows",
]


class BackwardRows(NamedTuple):
    """For the gradients.

    of_output: (B, T, N), the row term: rowsum(O dO) less the gradient of the log-sum-exp, 0 of a
      row that sees no key; or the output (B, T, N, D) of what makes that itself.
    d_out: (B, T, N, D), the output's gradient; 0 past the query lengths.
    """

    top: Array
    rest: Array
    of_output: Array
    d_out: Array


class BackwardRowsBeside(NamedTuple):
    """The same beside the output (B, T, N, D), where the row term is rowsum(O dO) and nothing else.

    For kernels that may make that themselves; what is then not used the compiler leaves out.
    """

    top: Array
    rest: Array
    of_output: Array
    d_out: Array
    out: Array


type AnyBackwardRows = BackwardRows | BackwardRowsBeside


class TangentRows(NamedTuple):
    """For the tangents of output and log-sum-exp.

    out: (B, T, N, D), the output.
    of_sinks: (B, T, N), the sinks' part of the log-sum-exp's tangent: weight by tangent; None if
      none moves.
    """

    top: Array
    rest: Array
    out: Array
    of_sinks: Array | None


class BackwardTangentRows(NamedTuple):
    """For the tangents of the gradients.

    d_out: (B, T, N, D), the output's gradient; 0 past the query lengths.
    row_term: (B, T, N), rowsum(O dO) less the gradient of the log-sum-exp.
    t_lse: (B, T, N), the tangent of the log-sum-exp; 0 of a row that sees no key, as is row_term.
    t_row_term: (B, T, N), the tangent of row_term; likewise.
    td_out: (B, T, N, D), the tangent of d_out; 0 past the query lengths; None if it does not move.
    """

    top: Array
    rest: Array
    d_out: Array
    row_term: Array
    t_lse: Array
    t_row_term: Array
    td_out: Array | None
