"""PTX of the kernels' own, where the compiler makes more of an expression than it has to."""

from __future__ import annotations

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

__all__ = [
    "at_most",
    "banded",
    "made_before",
    "mask_of",
    "masked",
    "multiply_add",
    "widened",
    "zero_below",
]

WGMMA = plgpu.Layout.WGMMA
ROW = WGMMA.reduce(1)
NUMBER = plgpu.Layout.WG_SPLAT(())


def multiply_add(x: Array, y: Array, z: Array) -> Array:
    """x y + z, float32 (rows,), rounded once, whatever else the compiler has of the product."""

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(ROW, ROW, ROW),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=ROW),
    )
    def made(ctx: Any, x: Any, y: Any, z: Any) -> Any:
        registers = np.empty_like(x.registers)
        for place in np.ndindex(registers.shape):
            own = [each.registers[place] for each in (x, y, z)]
            registers[place] = _each("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", *own)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    result: Array = made(x, y, z)
    return result


def banded(x: Array, ahead: Array, lower: int | None, upper: int | None, none: float) -> Array:
    """x (64, columns) float32, `none` where row + ahead - column is under lower or over upper.

    A thread's rows are two, and its columns 0, 1, 8, 9, 16, .. past an even one: from one number
    all others are immediate operands. What the compiler sees it keeps in as many registers.

    none: 0 or -inf.
    """

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(WGMMA, NUMBER),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=WGMMA),
    )
    def made(ctx: Any, x: Any, ahead: Any) -> Any:
        i32 = ir.IntegerType.get_signless(32)
        hidden = "0fFF800000" if none else "0f00000000"
        text = (
            "{ .reg .u32 thread, part;\n"
            "mov.u32 thread, %tid.x;\n"
            "bfe.u32 part, thread, 5, 2;\n"
            "mad.lo.s32 $0, part, 16, $1;\n"
            "bfe.u32 part, thread, 2, 3;\n"
            "add.s32 $0, $0, part;\n"
            "and.b32 part, thread, 3;\n"
            "mad.lo.s32 $0, part, -2, $0; }"
        )
        own = llvm.inline_asm(i32, [ahead.registers.item()], text, "=&r,r", has_side_effects=True)
        registers = np.empty_like(x.registers)
        for place, pair in enumerate(x.registers.flat):
            found = []
            for i in range(2):
                column = place // 2 * 8 + i - place % 2 * 8
                text = "{ .reg .pred p; setp.eq.s32 p, 0, 0;\n"
                if upper is not None:
                    text += f"setp.le.and.s32 p, $2, {column + upper}, p;\n"
                if lower is not None:
                    text += f"setp.ge.and.s32 p, $2, {column + lower}, p;\n"
                text += f"selp.f32 $0, $1, {hidden}, p; }}"
                found.append(llvm.inline_asm(ir.F32Type.get(), [_at(pair, i), own], text, "=f,f,r"))
            registers.flat[place] = _together(found)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    result: Array = made(x, ahead)
    return result


def at_most(x: Array, ahead: Array, side: Array) -> Array:
    """min(x, side (ahead - 2 (row - column))), (64, columns) float32; `side` is a power of two.

    A product with a sum and a minimum, of two numbers a thread, where `banded` compares twice and
    chooses.
    """

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(WGMMA, NUMBER, NUMBER),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=WGMMA),
    )
    def made(ctx: Any, x: Any, ahead: Any, side: Any) -> Any:
        f32 = ir.F32Type.get()
        text = (
            "{ .reg .u32 thread, part, own;\n"
            "mov.u32 thread, %tid.x;\n"
            "bfe.u32 part, thread, 5, 2;\n"
            "mad.lo.s32 own, part, -32, $1;\n"
            "bfe.u32 part, thread, 2, 3;\n"
            "mad.lo.s32 own, part, -2, own;\n"
            "and.b32 part, thread, 3;\n"
            "mad.lo.s32 own, part, 4, own;\n"
            "cvt.rn.f32.s32 $0, own;\n"
            "mul.f32 $0, $0, $2; }"
        )
        numbers = [ahead.registers.item(), side.registers.item()]
        own = llvm.inline_asm(f32, numbers, text, "=&f,r,f", has_side_effects=True)
        registers = np.empty_like(x.registers)
        for place, pair in enumerate(x.registers.flat):
            found = []
            for i in range(2):
                column = np.float32(2 * (place // 2 * 8 + i - place % 2 * 8)).view(np.uint32)
                text = (
                    f"{{ .reg .f32 most; fma.rn.f32 most, $3, 0f{column:08X}, $2;\n"
                    "min.f32 $0, $1, most; }"
                )
                found.append(
                    llvm.inline_asm(f32, [_at(pair, i), own, numbers[1]], text, "=f,f,f,f")
                )
            registers.flat[place] = _together(found)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    result: Array = made(x, ahead, side)
    return result


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
            registers[place] = _each(text, "=f,f,r", x.registers[place], bits.registers[place])
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    result: Array = made(x, bits)
    return result


def mask_of(bits: Array, first: int, dtype: Any) -> Array:
    """For `masked`, of two bytes: no bits where the upper half of `bits` is in first .. 0xFC00.

    As float16 these halves are the lowest there are, -inf among them, and two are compared at once.
    """
    bound = (first - 1) * 0x10001  # what is lower as a number has more of these bits
    text = (
        "{ .reg .b32 both; prmt.b32 both, $1, $2, 0x7632;"
        f" mov.b32 $0, {bound}; set.geu.u32.f16x2 $0, both, $0; }}"
    )

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(bits.shape, dtype, layout=WGMMA),
    )
    def made(ctx: Any, bits: Any) -> Any:
        word = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))
        registers = np.empty_like(bits.registers)
        for place in np.ndindex(registers.shape):
            two = [_at(bits.registers[place], i) for i in range(2)]
            kept = llvm.inline_asm(word, two, text, "=&r,r,r")
            registers[place] = llvm.bitcast(pair, kept)
        return mgpu.FragmentedArray(_registers=registers, _layout=bits.layout, _is_signed=None)

    result: Array = made(bits)
    return result


def made_before(mask: Array, never: Array) -> None:
    """Keeps all waits behind this after the making of a mask, by a store that is never done.

    never: a zero that the compiler cannot know.
    """

    @plgpu.inline_mgpu(arg_types=(WGMMA, NUMBER))  # type: ignore[untyped-decorator]
    def emit(ctx: Any, mask: Any, never: Any) -> None:
        word = ir.IntegerType.get_signless(32)
        words = [llvm.bitcast(word, pair) for pair in mask.registers.flat]
        stores = "".join(
            f"@p st.shared.v4.b32 [$0], {{${i}, ${i + 1}, ${i + 2}, ${i + 3}}};\n"
            for i in range(1, len(words), 4)
        )
        text = "{ .reg .pred p; setp.ne.u32 p, $0, 0;\n" + stores + "}"
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"), [never.registers.item(), *words], text,
            "r" + ",r" * len(words), has_side_effects=True,
        )  # fmt: skip

    emit(mask, never)


def masked(x: Array, mask: Array) -> Array:
    """x, of two bytes or float32, where `mask_of` has bits, and else zeros."""

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(WGMMA, WGMMA),
        return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=WGMMA),
    )
    def made(ctx: Any, x: Any, mask: Any) -> Any:
        word = ir.IntegerType.get_signless(32)
        registers = np.empty_like(x.registers)
        for place in np.ndindex(registers.shape):
            pair, two = x.registers[place], llvm.bitcast(word, mask.registers[place])
            if x.mlir_dtype != ir.F32Type.get():
                kept = arith.andi(llvm.bitcast(word, pair), two)
                registers[place] = llvm.bitcast(pair.type, kept)
                continue
            found = []
            for i, halves in enumerate(("0x9910", "0xBB32")):  # a half and its sign
                text = f"{{ .reg .b32 m; prmt.b32 m, $2, 0, {halves}; and.b32 $0, $1, m; }}"
                own = [_at(pair, i), two]
                found.append(llvm.inline_asm(ir.F32Type.get(), own, text, "=f,f,r"))
            registers[place] = _together(found)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    result: Array = made(x, mask)
    return result


def widened(x: Array) -> Array:
    """x, bfloat16 in wgmma's layout, as float32: two numbers by a shift and a mask.

    Of the upper one the compiler makes a number of two bytes first.
    """

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.float32, layout=WGMMA),
    )
    def made(ctx: Any, x: Any) -> Any:
        word, number = ir.IntegerType.get_signless(32), ir.F32Type.get()
        registers = np.empty_like(x.registers)
        for place in np.ndindex(registers.shape):
            two = llvm.bitcast(word, x.registers[place])
            parts = arith.shli(two, mgpu.c(16, word)), arith.andi(two, mgpu.c(-65536, word))
            registers[place] = _together([llvm.bitcast(number, part) for part in parts])
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    result: Array = made(x)
    return result


def _at(x: Any, i: int) -> Any:
    """An element of a vector."""
    place = ir.DenseI64ArrayAttr.get([i])
    return vector.extract(x, dynamic_position=[], static_position=place)


def _together(numbers: list[Any]) -> Any:
    """The vector of these float32."""
    made = llvm.mlir_undef(ir.VectorType.get((len(numbers),), ir.F32Type.get()))
    for i, number in enumerate(numbers):
        place = ir.DenseI64ArrayAttr.get([i])
        made = vector.insert(number, made, dynamic_position=[], static_position=place)
    return made


def _each(text: str, constraints: str, *of: Any) -> Any:
    """The same, a float32, of each of the elements that a thread holds together."""
    own = [[_at(each, i) for each in of] for i in range(of[0].type.shape[0])]
    return _together([llvm.inline_asm(ir.F32Type.get(), x, text, constraints) for x in own])
