"""PTX of the kernels' own: a bit for each element of a matrix, kept by the thread that has it.

A thread has, of a matrix (64, n) in wgmma's layout, two rows and of each two neighbours in every
eight columns. Its bits are in the four registers that it has of a matrix (64, 8): of a register,
bit j is of columns 8 j to 8 j + 7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

__all__ = ["below", "marked", "zeroed"]

WGMMA = plgpu.Layout.WGMMA
COLUMNS = 8  # of a tile of the layout


def below(x: Array, limit: int) -> Array:
    """Bits (64, 8), uint32: where x (64, up to 256), uint32, is below the limit."""
    rows, columns = x.shape

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(WGMMA,),
        return_type=plgpu.ShapeDtypeStruct((rows, COLUMNS), jnp.uint32, layout=WGMMA),
    )
    def found(ctx: Any, x: Any) -> Any:
        word = ir.IntegerType.get_signless(32)
        bits = np.empty((1, 1, *x.registers.shape[2:]), object)
        for place in np.ndindex(bits.shape):
            zero = llvm.mlir_constant(ir.IntegerAttr.get(word, 0))  # type: ignore[call-arg]
            own = [zero] * 2
            for j in range(columns // COLUMNS):
                values = _elements(x.registers[(0, j, *place[2:])])
                own = [_bit(j, limit, *pair) for pair in zip(own, values, strict=True)]
            bits[place] = _vector(word, own)
        return mgpu.FragmentedArray(_registers=bits, _layout=x.layout, _is_signed=False)

    made: Array = found(x)
    return made


def _bit(j: int, limit: int, bits: Any, value: Any) -> Any:
    text = (
        f"{{ .reg .pred p; .reg .b32 t; setp.lo.u32 p, $2, {limit}; "
        f"selp.b32 t, {1 << j}, 0, p; or.b32 $0, $1, t; }}"
    )
    return llvm.inline_asm(bits.type, [bits, value], text, "=r,r,r", has_side_effects=True)


def zeroed(x: Array, bits: Array) -> Array:
    """x, float32, with zeros where its bit is set.

    A choice that the compiler sees it moves behind the rounding to two bytes, and packs those anew.
    """
    return _by_bit(
        lambda j: (
            f"{{ .reg .pred p; .reg .b32 t; and.b32 t, $2, {1 << j}; setp.eq.u32 p, t, 0; "
            "selp.f32 $0, $1, 0f00000000, p; }"
        ),
        x,
        bits,
    )


def marked(x: Array, bits: Array) -> Array:
    """x, float32, with its sign turned where its bit is set."""
    return _by_bit(
        lambda j: (
            f"{{ .reg .b32 t, u; shl.b32 t, $2, {31 - j}; and.b32 t, t, 0x80000000; "
            "mov.b32 u, $1; xor.b32 u, u, t; mov.b32 $0, u; }"
        ),
        x,
        bits,
    )


def _by_bit(text: Callable[[int], str], x: Array, bits: Array) -> Array:
    """float32 $0 of x's element $1 and the register $2 whose bit j is its own, by text(j)."""

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(WGMMA, WGMMA),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=WGMMA),
    )
    def made(ctx: Any, x: Any, bits: Any) -> Any:
        registers = np.empty_like(x.registers)
        number = ir.F32Type.get()
        for place in np.ndindex(registers.shape):
            j = place[1]
            own = _elements(bits.registers[(0, 0, *place[2:])])
            pairs = zip(_elements(x.registers[place]), own, strict=True)
            registers[place] = _vector(
                number, [llvm.inline_asm(number, list(pair), text(j), "=f,f,r") for pair in pairs]
            )
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    result: Array = made(x, bits)
    return result


def _at(i: int) -> dict[str, Any]:
    return {"dynamic_position": [], "static_position": ir.DenseI64ArrayAttr.get([i])}


def _elements(register: Any) -> list[Any]:
    return [vector.extract(register, **_at(i)) for i in range(register.type.shape[0])]


def _vector(kind: Any, elements: list[Any]) -> Any:
    made = llvm.mlir_undef(ir.VectorType.get((len(elements),), kind))
    for i, element in enumerate(elements):
        made = vector.insert(element, made, **_at(i))
    return made
