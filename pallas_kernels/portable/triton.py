"""All that is particular to Pallas' Triton lowering, which compiles these kernels.

Blocks have power-of-two sizes, so what does not fill one is masked where it is read and written. An
array is read by index arrays that broadcast to the block, in whatever strides it has.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.experimental.pallas.triton as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

__all__ = [
    "LN2",
    "LOG2E",
    "Factor",
    "Index",
    "Mask",
    "Ref",
    "divided",
    "exp2",
    "interpreting",
    "load",
    "multiply_add",
    "place_in",
    "product",
    "store",
    "zero_below",
]

type Ref = Any
type Mask = Array | None
type Index = tuple[Array | int, ...]
type Factor = tuple[Array, ...]  # a matrix as the sum of these

LOG2E = math.log2(math.e)
LN2 = math.log(2)

_interpreting = ContextVar("interpreting", default=False)

# Known; a jax without the lowering is refused.
warnings.filterwarnings(
    "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
)


@contextmanager
def interpreting(is_so: bool) -> Generator[None]:
    """Says of the kernel that is traced inside whether it is to run on a CPU."""
    token = _interpreting.set(is_so)
    try:
        yield
    finally:
        _interpreting.reset(token)


def load(ref: Ref, index: Index, mask: Mask = None, other: float = 0) -> Array:
    """The elements at `index`, an index array for each axis; `other` where the mask is False."""
    fill = None if mask is None else other
    value: Array = plgpu.load(ref.at[_arrays(index)], mask=mask, other=fill)
    return value


def store(ref: Ref, index: Index, value: Array, mask: Mask = None) -> None:
    """Writes the elements at `index` where the mask is True, in the array's dtype."""
    plgpu.store(ref.at[_arrays(index)], value.astype(ref.dtype), mask=mask)


def exp2(x: Array, c: float, top: Array, rest: Array | None = None) -> Array:
    """2^((x - top) c - rest), x (rows, columns) and the others broadcastable to it, float32.

    x - top is exact for x near top, and no product is rounded beside a large one. As three
    instructions: the compiler's own power of two keeps numbers below 2^-126, which no sum of
    weights needs.
    """
    if _interpreting.get():
        exponent = (x - top) * c
        return jnp.exp2(exponent if rest is None else exponent - rest)
    factor = f"0f{np.float32(c).view(np.uint32):08X}"
    scaled = f"mul.rn.ftz.f32 t, t, {factor}"
    args = [x, jnp.broadcast_to(top, x.shape)]
    if rest is not None:
        scaled = f"fma.rn.ftz.f32 t, t, {factor}, $3"
        args.append(jnp.broadcast_to(-rest, x.shape))
    (result,) = plgpu.elementwise_inline_asm(
        f"{{ .reg .f32 t; sub.rn.ftz.f32 t, $1, $2; {scaled}; ex2.approx.ftz.f32 $0, t; }}",
        args=args,
        constraints=",".join(["=f", *"f" * len(args)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def multiply_add(x: Array, c: Array | float, y: Array) -> Array:
    """x c + y, float32, rounded once, wherever it stands.

    Of a product and a sum the compiler may make one instruction here and two there. Forward and
    backward would then disagree by a step of the result, which beside 1e9 is 64.
    """
    if _interpreting.get():
        return x * c + y
    args = [x, jnp.broadcast_to(y, x.shape)]
    if isinstance(c, float):
        factor = f"0f{np.float32(c).view(np.uint32):08X}"
    else:
        factor = "$3"
        args.append(jnp.broadcast_to(c, x.shape))
    (result,) = plgpu.elementwise_inline_asm(
        f"fma.rn.ftz.f32 $0, $1, {factor}, $2;",
        args=args,
        constraints=",".join(["=f", *["f"] * len(args)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def zero_below(x: Array, bits: Array, limit: int) -> Array:
    """x, float32, with zeros where `bits`, uint32, are below the limit.

    A choice that the compiler sees it moves behind the rounding to two bytes, and packs those anew.
    """
    if _interpreting.get():
        return jnp.where(bits < jnp.uint32(limit), 0.0, x)
    (result,) = plgpu.elementwise_inline_asm(
        f"{{ .reg .pred p; setp.lo.u32 p, $2, {limit}; selp.f32 $0, 0f00000000, $1, p; }}",
        args=[x, bits],
        constraints="=f,f,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )
    return result


def divided(x: Array, by: int) -> tuple[Array, Array]:
    """Quotient and remainder of what is not negative, int32."""
    if by == 1:
        return x, jnp.zeros_like(x)
    divisor = jnp.full_like(x, by)
    return lax.div(x, divisor), lax.rem(x, divisor)


def place_in(grid: tuple[int, ...]) -> tuple[Array, ...]:
    """Where in a launch's grid the program is that asks."""
    rest = pl.program_id(0)
    found = []
    for size in grid[:-1]:
        rest, own = divided(rest, size)
        found.append(own)
    return (*found, rest)


def _arrays(index: Index) -> tuple[Array, ...]:
    return tuple(jnp.int32(i) if isinstance(i, int) else i for i in index)


def product(a: Factor, b: Factor) -> Array:
    """The matrix product in float32 of matrices in terms, less what is below their last terms."""
    total = None
    for order in range(len(a) - 1, -1, -1):  # the smallest first
        for j in range(order + 1):
            one = jnp.dot(a[order - j], b[j], preferred_element_type=jnp.float32)
            total = one if total is None else total + one
    assert total is not None
    return total
