"""Kernels for NVIDIA's GPUs that are the loops in XLA where the program runs on anything else.

What `jax.jit` traces on a machine with a GPU may be lowered for its CPU: for arrays that are
committed there, or exported for both. The loops then save what the kernels would, and take it.

A row's maximum is saved in the kernels' unit, and what it loses by that in the number beside it.
Forward and backward take the same product with the unit for it, to the last bit: of numbers cut in
two halves of 12 bits, whose products are not rounded, so that a compiler may join them to sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jattn.backends import any_order
from jattn.backends.kernels import Family, kernels_of
from jattn.backends.loops import Loops
from jattn.call.halves import joined
from jattn.call.row_arrays import AnyBackwardRows, BackwardRows, BackwardTangentRows, TangentRows
from jattn.call.spec import AttentionSpec, Operands, Tangents
from jattn.call.target import Target
from jattn.transforms.kernels import Pair, TangentPair
from jattn.transforms.per_platform import on_nvidia
from jattn.transforms.rows import row_term

__all__ = ["WithLoops", "kernels_anywhere"]

_LOOPS = Loops(Target("cpu", "cpu"), None, None)
_LOOPS_ON_GPU = Loops(Target("gpu", "gpu"), None, None)
_HIGH_BITS = 0xFFFFF000  # of a float32: sign, exponent and the first 11 of 23 bits


def kernels_anywhere(family: Family, algorithm: Literal["flash", "chunked"]) -> WithLoops:
    """Pallas kernels, with the loops beside them but where their text is interpreted."""
    kernels = kernels_of(family, algorithm)
    return WithLoops(kernels, kernels, interpret=kernels.interpret)


class SomeTangents(TangentPair, Protocol):
    """Kernels of the tangents, for the calls that they have them for."""

    def own_tangents(self, spec: AttentionSpec) -> bool:
        """Whether they do a call, whichever of its operands move."""


@dataclass(frozen=True)
class WithLoops:
    """A pair of kernels, and the loops for where they do not run (`transforms.kernels.Kernels`).

    tangents: kernels of the tangents, if there are. What they lack the loops do, from the output
    and the log-sum-exp that the kernels saved.
    interpret: the kernels' text runs here, whatever the device is.
    """

    kernels: Pair
    tangents: SomeTangents | None = None
    interpret: bool = False

    @property
    def can_partition(self) -> bool:
        return self.kernels.can_partition

    @property
    def takes_parts(self) -> bool:
        return self.kernels.takes_parts

    @property
    def takes_output(self) -> bool:
        return self.kernels.takes_output

    def makes_row_term(self, spec: AttentionSpec) -> bool:
        return self.kernels.makes_row_term(spec)

    def takes_halves(self, spec: AttentionSpec) -> bool:
        """Whether forward reads each half of queries and keys where it is (`call.halves`)."""
        return getattr(self.kernels, "takes_halves", lambda _: False)(spec)

    def unit(self, spec: AttentionSpec) -> float:
        return self.kernels.unit(spec)

    def forward(self, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array, Array]:
        if operands.halves is not None and not self.takes_halves(spec):
            operands = joined(operands)
        kernel = partial(self.kernels.forward, spec)
        out, top, rest = self._run(kernel, partial(_forward, self.unit(spec), spec), operands)
        return out, top, rest

    def backward(
        self,
        spec: AttentionSpec,
        operands: Operands,
        rows: AnyBackwardRows,
        *,
        wants_bias: bool,
        wants_scale: bool,
    ) -> tuple[Array, ...]:
        kernel = partial(self.kernels.backward, spec)
        loops = partial(_backward, self.kernels, spec)
        kernel, loops = (
            partial(of, wants_bias=wants_bias, wants_scale=wants_scale) for of in (kernel, loops)
        )
        return self._run(kernel, loops, operands, rows)

    def tangent(
        self,
        spec: AttentionSpec,
        operands: Operands,
        rows: TangentRows,
        tangents: Tangents,
    ) -> tuple[Array, Array]:
        kernel, loops = self._tangents(spec, "tangent")
        t_out, t_lse = self._run(kernel, loops, operands, rows, tangents)
        return t_out, t_lse

    def backward_tangent(
        self,
        spec: AttentionSpec,
        operands: Operands,
        rows: BackwardTangentRows,
        tangents: Tangents,
        *,
        wanted: tuple[str, ...],
    ) -> tuple[Array, ...]:
        both = self._tangents(spec, "backward_tangent")
        kernel, loops = (partial(of, wanted=wanted) for of in both)
        return self._run(kernel, loops, operands, rows, tangents)

    def formula(self, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array]:
        return any_order.attend(spec, operands)

    def _run(self, kernel: Any, loops: Any, *arrays: Any) -> tuple[Array, ...]:
        found: tuple[Array, ...] = (
            kernel(*arrays) if self.interpret else on_nvidia(kernel, loops, *arrays)
        )
        return found

    def _tangents(self, spec: AttentionSpec, which: str) -> tuple[Any, Any]:
        """What runs on NVIDIA's GPUs, and what runs elsewhere."""
        unit = self.unit(spec)
        loops = partial(_from_saved, getattr(_LOOPS, which), unit, spec)
        if self.tangents is not None and self.tangents.own_tangents(spec):
            return partial(getattr(self.tangents, which), spec), loops
        if self.interpret:
            return loops, loops
        return partial(_from_saved, getattr(_LOOPS_ON_GPU, which), unit, spec), loops


def _from_saved[Rows: (TangentRows, BackwardTangentRows)](
    loops: Callable[..., tuple[Array, ...]],
    unit: float,
    spec: AttentionSpec,
    operands: Operands,
    rows: Rows,
    tangents: Tangents,
    **options: Any,
) -> tuple[Array, ...]:
    """The loops, whose unit is 1, from a maximum in a kernel's unit."""
    rows = rows._replace(top=_in_loops_unit(rows.top, unit))
    return loops(spec, operands, rows, tangents, **options)


def _forward(unit: float, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array, Array]:
    out, natural, rest = _LOOPS.forward(spec, joined(operands))
    seen = natural > -jnp.inf
    finite = jnp.where(seen, natural, 0)
    top = finite / unit
    rest = rest + (finite - _natural(top, unit))
    return out, jnp.where(seen, top, -jnp.inf), rest


def _backward(
    kernels: Pair,
    spec: AttentionSpec,
    operands: Operands,
    rows: AnyBackwardRows,
    *,
    wants_bias: bool,
    wants_scale: bool,
) -> tuple[Array, ...]:
    term = rows.of_output
    if kernels.takes_output:
        term = row_term(rows.top, rows.of_output, rows.d_out)
    own = BackwardRows(*rows[:4])._replace(
        top=_in_loops_unit(rows.top, kernels.unit(spec)), of_output=term
    )
    return _LOOPS.backward(spec, operands, own, wants_bias=wants_bias, wants_scale=wants_scale)


def _in_loops_unit(top: Array, unit: float) -> Array:
    """The natural maximum, of one in a kernel's unit."""
    if unit == 1:
        return top
    seen = top > -jnp.inf
    return jnp.where(seen, _natural(jnp.where(seen, top, 0), unit), -jnp.inf)


def _natural(top: Array, unit: float) -> Array:
    """top * unit, and the same number for the same arguments, whatever it is compiled with."""
    bits = lax.bitcast_convert_type(top, jnp.uint32) & jnp.uint32(_HIGH_BITS)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    low = top - high
    u = np.float32(unit)
    u_high = (u.view(np.uint32) & np.uint32(_HIGH_BITS)).view(np.float32)
    u_low = u - u_high
    return high * u_high + (high * u_low + (low * u_high + low * u_low))
