"""PTX of the kernels' own, where the compiler makes more of an expression than it has to."""

from __future__ import annotations

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

__all__ = ["zero_below", "zero_lowest"]

WGMMA = plgpu.Layout.WGMMA


def zero_below(x: Array, bits: Array, limit: int) -> Array:
    """x, float32, with zeros where `bits`, uint32, are below the limit: both in wgmma's layout.

    A choice that the compiler sees it moves behind the rounding to two bytes, and packs those anew.
    """
    text = f"{{ .reg .pred p; setp.lo.u32 p, $2, {limit}; selp.f32 $0, 0f00000000, $1, p; }}"

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(WGMMA, WGMMA),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=WGMMA),
    )
    def made(ctx: Any, x: Any, bits: Any) -> Any:
        registers = np.empty_like(x.registers)
        for place in np.ndindex(registers.shape):
            registers[place] = _each(text, x.registers[place], bits.registers[place])
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    result: Array = made(x, bits)
    return result


def zero_lowest(x: Array, bits: Array, first: int) -> Array:
    """x, of two bytes, with zeros where the upper half of `bits`, uint32, is in first .. 0xFC00.

    As float16 these halves are the lowest there are, -inf among them, and two are compared at once.
    """
    bound = (first - 1) * 0x10001  # what is lower as a number has more of these bits
    text = (
        "{ .reg .b32 both, kept; prmt.b32 both, $2, $3, 0x7632;"
        f" mov.b32 kept, {bound}; set.geu.u32.f16x2 kept, both, kept; and.b32 $0, $1, kept; }}"
    )

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(WGMMA, WGMMA),
        return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=WGMMA),
    )
    def made(ctx: Any, x: Any, bits: Any) -> Any:
        word = ir.IntegerType.get_signless(32)
        registers = np.empty_like(x.registers)
        for place in np.ndindex(registers.shape):
            pair = x.registers[place]
            two = [_at(bits.registers[place], i) for i in range(2)]
            both = llvm.bitcast(word, pair)
            kept = llvm.inline_asm(word, [both, *two], text, "=r,r,r,r")
            registers[place] = llvm.bitcast(pair.type, kept)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    result: Array = made(x, bits)
    return result


def _at(x: Any, i: int) -> Any:
    """An element of a vector."""
    place = ir.DenseI64ArrayAttr.get([i])
    return vector.extract(x, dynamic_position=[], static_position=place)


def _each(text: str, x: Any, bits: Any) -> Any:
    """The same of each of the elements that a thread holds together."""
    number = ir.F32Type.get()
    count = x.type.shape[0]
    made = llvm.mlir_undef(ir.VectorType.get((count,), number))
    for i in range(count):
        at: dict[str, Any] = {
            "dynamic_position": [],
            "static_position": ir.DenseI64ArrayAttr.get([i]),
        }
        pair = [vector.extract(each, **at) for each in (x, bits)]
        made = vector.insert(llvm.inline_asm(number, pair, text, "=f,f,r"), made, **at)
    return made
