"""Kernels for NVIDIA's GPUs that are the loops in XLA where the program runs on anything else.

What `jax.jit` traces on a machine with a GPU may be lowered for its CPU: for arrays that are
committed there, or exported for both. The loops then save what the kernels would, and take it.

A row's maximum is saved in the kernels' unit, and what it loses by that in the number beside it.
Forward and backward take the same product with the unit for it, to the last bit: of numbers cut in
two halves of 12 bits, whose products are not rounded, so that a compiler may join them to sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jattn.backends.kernels import Family, kernels_of
from jattn.backends.loops import Loops
from jattn.call.spec import AttentionSpec, Operands
from jattn.call.target import Target
from jattn.transforms import derivatives
from jattn.transforms.per_platform import on_nvidia

__all__ = ["WithLoops", "kernels_anywhere"]

_LOOPS = Loops(Target("cpu", "cpu"), None, None)
_HIGH_BITS = 0xFFFFF000  # of a float32: sign, exponent and the first 11 of 23 bits


def kernels_anywhere(family: Family, algorithm: Literal["flash", "chunked"]) -> derivatives.Kernels:
    """A Pallas pair, with the loops beside it but where its text is interpreted."""
    kernels = kernels_of(family, algorithm)
    return kernels if kernels.interpret else WithLoops(kernels)


@dataclass(frozen=True)
class WithLoops:
    """A pair of kernels, and the loops for where they do not run (`derivatives.Kernels`)."""

    kernels: derivatives.Kernels

    @property
    def can_partition(self) -> bool:
        return self.kernels.can_partition

    @property
    def takes_parts(self) -> bool:
        return self.kernels.takes_parts

    @property
    def takes_output(self) -> bool:
        return self.kernels.takes_output

    def unit(self, spec: AttentionSpec) -> float:
        return self.kernels.unit(spec)

    def forward(self, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array, Array]:
        kernel = partial(self.kernels.forward, spec)
        out, top, rest = on_nvidia(kernel, partial(_forward, self.unit(spec), spec), operands)
        return out, top, rest

    def backward(
        self,
        spec: AttentionSpec,
        operands: Operands,
        top: Array,
        rest: Array,
        of_output: Array,
        d_out: Array,
        *,
        wants_bias: bool,
        wants_scale: bool,
    ) -> tuple[Array, ...]:
        kernel = partial(self.kernels.backward, spec)
        loops = partial(_backward, self.kernels, spec)
        kernel, loops = (
            partial(of, wants_bias=wants_bias, wants_scale=wants_scale) for of in (kernel, loops)
        )
        return on_nvidia(kernel, loops, operands, top, rest, of_output, d_out)


def _forward(unit: float, spec: AttentionSpec, operands: Operands) -> tuple[Array, Array, Array]:
    out, natural, rest = _LOOPS.forward(spec, operands)
    seen = natural > -jnp.inf
    finite = jnp.where(seen, natural, 0)
    top = finite / unit
    rest = rest + (finite - _natural(top, unit))
    return out, jnp.where(seen, top, -jnp.inf), rest


def _backward(
    kernels: derivatives.Kernels,
    spec: AttentionSpec,
    operands: Operands,
    top: Array,
    rest: Array,
    of_output: Array,
    d_out: Array,
    *,
    wants_bias: bool,
    wants_scale: bool,
) -> tuple[Array, ...]:
    seen = top > -jnp.inf
    natural = jnp.where(seen, _natural(jnp.where(seen, top, 0), kernels.unit(spec)), -jnp.inf)
    term = derivatives.row_term(top, of_output, d_out) if kernels.takes_output else of_output
    saved = (natural, rest, term, d_out)
    return _LOOPS.backward(spec, operands, *saved, wants_bias=wants_bias, wants_scale=wants_scale)


def _natural(top: Array, unit: float) -> Array:
    """top * unit, and the same number for the same arguments, whatever it is compiled with."""
    bits = lax.bitcast_convert_type(top, jnp.uint32) & jnp.uint32(_HIGH_BITS)
    high = lax.bitcast_convert_type(bits, jnp.float32)
    low = top - high
    u = np.float32(unit)
    u_high = (u.view(np.uint32) & np.uint32(_HIGH_BITS)).view(np.float32)
    u_low = u - u_high
    return high * u_high + (high * u_low + (low * u_high + low * u_low))
