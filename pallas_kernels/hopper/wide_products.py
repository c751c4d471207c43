"""Products of matrices in pieces, of just as many columns as there are.

In shared memory a matrix is (pieces, rows, width), each piece plain rows of up to 64 columns
(`plain.py`), the last one with columns past the matrix's. wgmma takes a step of 16 of what it sums
over at a time, and as many columns as it is told, a multiple of 8; Mosaic's `wgmma` asks for whole
tiles of both:

    O += P V    176 columns of three pieces of 64: N = 176; V's rows by 16
    S += Q Kᵀ   of the last piece 48 columns: three steps, not four
    O += 2^x V  a product for each 16 of V's rows, started once their powers are made

So a block may be of any multiple of 16 keys in the widest swizzle, also of V in tiles.
"""

from __future__ import annotations

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.mosaic.gpu.wgmma import wgmma_fence, wgmma_m64
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.hopper.copies import swizzle_of

__all__ = ["STEP", "is_whole", "multiply_keys", "multiply_powers", "multiply_values", "padded"]

WGMMA = plgpu.Layout.WGMMA
STEP = 16  # what a wgmma of 16-bit numbers sums over
TILE = 8  # rows of a swizzle's pattern

type _Value = ir.Value[Any]


def is_whole(v: Any) -> bool:
    """Whether Mosaic multiplies by V (keys, columns) in tiles: it takes as many rows as columns."""
    return v.shape[0] % _width(v) == 0  # type: ignore[no-any-return]


def multiply_values(acc: Array, p: Array, v: Any) -> Array:
    """acc (64, n) + P (64, keys) V[:, :n], started.

    V is in shared memory: (pieces, keys, width), or (keys, columns) in tiles.
    """
    keys, width = v.shape[-2], _width(v)
    swizzle = width * jnp.dtype(v.dtype).itemsize
    across, down = keys * swizzle, TILE * swizzle  # from a tile to the one beside, and below
    if len(v.shape) == 2:
        across, down = down, down * (v.shape[1] // width)

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(WGMMA, WGMMA, _form(v)), return_type=_like(acc)
    )
    def emit(
        _: mgpu.LaunchContext, acc: mgpu.FragmentedArray, p: mgpu.FragmentedArray, v: _Value
    ) -> mgpu.FragmentedArray:
        p = wgmma_fence(p)
        start = _descriptor(v, swizzle, leading=across, stride=down)
        step_bytes = STEP // TILE * down

        def product(registers: Any, step: int) -> Any:
            return wgmma_m64(
                registers,
                p[:, step * STEP : (step + 1) * STEP],
                _past(start, step * step_bytes),
                a_transpose=None, b_transpose=True, a_k_stride=None, b_k_stride=step_bytes,
                **_sizes(acc, v),
            )  # fmt: skip

        return _summed(acc, product, keys // STEP)

    found: Array = emit(acc, p, v)
    return found


def multiply_powers(acc: Array, x: Array, v: Any) -> tuple[Array, Array]:
    """acc (64, n) + P V[:, :n], started, and P = 2^x (64, keys), float32; V as above.

    A product for each `STEP` of keys, started once their powers are made.
    """
    keys, width = v.shape[-2], _width(v)
    swizzle = width * jnp.dtype(v.dtype).itemsize
    across, down = keys * swizzle, TILE * swizzle
    if len(v.shape) == 2:
        across, down = down, down * (v.shape[1] // width)

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(WGMMA, WGMMA, _form(v)), return_type=(_like(acc), _like(x))
    )
    def emit(
        _: mgpu.LaunchContext, acc: mgpu.FragmentedArray, x: mgpu.FragmentedArray, v: _Value
    ) -> tuple[mgpu.FragmentedArray, mgpu.FragmentedArray]:
        start = _descriptor(v, swizzle, leading=across, stride=down)
        step_bytes = STEP // TILE * down
        sizes = _sizes(acc, v)
        made = mgpu.WGMMAAccumulator.from_registers(acc, sync=False)
        registers, powers = made._value.registers, []
        for step in range(keys // STEP):
            p = _power(x[:, step * STEP : (step + 1) * STEP])
            powers.append(p.registers)
            registers = wgmma_m64(
                registers, wgmma_fence(p.astype(sizes["b_element_type"])),
                _past(start, step * step_bytes),
                a_transpose=None, b_transpose=True, a_k_stride=None, b_k_stride=step_bytes,
                **sizes,
            )  # fmt: skip
            _commit()
        whole = np.concatenate(powers, axis=1)
        return (
            _with_registers(made._value, registers).to_layout(acc.layout),
            _with_registers(x, whole.reshape(x.registers.shape)),
        )

    found: tuple[Array, Array] = emit(acc, x, v)
    return found


def multiply_keys(acc: Array, q: Any, k: Any, depth: int) -> Array:
    """acc (64, keys) + (Q Kᵀ of the first `depth` columns), started; both in shared memory.

    Q (64, width) and K (keys, width) are one piece each.
    """
    size = jnp.dtype(k.dtype).itemsize
    swizzle = k.shape[-1] * size

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(WGMMA, _form(q), _form(k)), return_type=_like(acc)
    )
    def emit(
        _: mgpu.LaunchContext, acc: mgpu.FragmentedArray, q: _Value, k: _Value
    ) -> mgpu.FragmentedArray:
        start_q, start_k = (
            _descriptor(x, swizzle, leading=0, stride=TILE * swizzle) for x in (q, k)
        )

        def product(registers: Any, step: int) -> Any:
            at = step * STEP * size
            return wgmma_m64(
                registers, _past(start_q, at), _past(start_k, at),
                a_transpose=False, b_transpose=False, a_k_stride=STEP * size,
                b_k_stride=STEP * size, **_sizes(acc, k),
            )  # fmt: skip

        return _summed(acc, product, -(-depth // STEP))

    found: Array = emit(acc, q, k)
    return found


def padded(x: Array, columns: int) -> Array:
    """x (64, n) with zeros behind, n and `columns` being multiples of 8."""
    if x.shape[1] == columns:
        return x

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(WGMMA,),
        return_type=plgpu.ShapeDtypeStruct((x.shape[0], columns), x.dtype, layout=WGMMA),
    )
    def emit(_: mgpu.LaunchContext, x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        own = list(x.registers.flat)
        count = len(own) * columns // x.shape[1]
        zero = llvm.mlir_zero(own[0].type)
        registers = np.empty(count, object)
        registers[:] = own + [zero] * (count - len(own))
        return mgpu.FragmentedArray(
            _registers=registers.reshape(x.layout.registers_shape((x.shape[0], columns))),
            _layout=x.layout,
            _is_signed=x.is_signed,
        )

    found: Array = emit(x)
    return found


def _form(x: Any) -> Any:
    """How a matrix's pieces are in shared memory."""
    width = _width(x)
    swizzle = plgpu.SwizzleTransform(width * jnp.dtype(x.dtype).itemsize)  # type: ignore[abstract]
    return plgpu.RefType(transforms=(plgpu.TilingTransform((TILE, width)), swizzle))  # type: ignore[abstract]


def _width(x: Any) -> int:
    """Columns of a piece, or of a tile of the widest swizzle."""
    size = jnp.dtype(x.dtype).itemsize
    width: int = swizzle_of(x.shape[-1], size) // size
    return width


def _like(acc: Array) -> Any:
    return plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=WGMMA)


def _descriptor(x: _Value, swizzle: int, *, leading: int, stride: int) -> _Value:
    """Of a matrix that starts there; bytes from a tile to the one beside it, and to that below."""
    found: _Value = mma_utils.encode_descriptor(
        x, leading_byte_offset=leading, stride_byte_offset=stride, swizzle=swizzle
    )
    return found


def _past(descriptor: _Value, offset: int) -> _Value:
    if offset == 0:
        return descriptor
    more = mgpu.c(mma_utils.encode_addr(offset), ir.IntegerType.get_signless(64))
    found: _Value = llvm.add(descriptor, more, overflow_flags=llvm.IntegerOverflowFlags.none)
    return found


def _sizes(acc: mgpu.FragmentedArray, b: _Value) -> dict[str, Any]:
    """What all steps have in common; Mosaic makes as many as a swizzle of this many bytes has."""
    element = ir.MemRefType(b.type).element_type
    sizes = {"n": acc.shape[1], "swizzle": STEP * mgpu.bytewidth(element)}
    return sizes | {"a_element_type": element, "b_element_type": element}


def _summed(acc: mgpu.FragmentedArray, product: Any, steps: int) -> mgpu.FragmentedArray:
    """acc with so many products added, started as one group."""
    made = mgpu.WGMMAAccumulator.from_registers(acc, sync=False)
    registers = made._value.registers
    for step in range(steps):
        registers = product(registers, step)
    _commit()
    return _with_registers(made._value, registers).to_layout(acc.layout)


def _commit() -> None:
    """What was started since the last one is a group."""
    void = ir.Type.parse("!llvm.void")
    commit = "wgmma.commit_group.sync.aligned;"
    llvm.inline_asm(void, [], commit, "~{memory}", has_side_effects=True)


def _power(x: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
    """2^x, by instructions that stay in this order."""
    i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
    registers = np.empty_like(x.registers)
    for place in np.ndindex(registers.shape):
        pair: Any = x.registers[place]
        made = llvm.mlir_undef(pair.type)
        for i in range(2):
            number = llvm.extractelement(pair, mgpu.c(i, i32))
            power = "ex2.approx.ftz.f32 $0, $1;"
            number = llvm.inline_asm(f32, [number], power, "=f,f", has_side_effects=True)
            made = llvm.insertelement(made, number, mgpu.c(i, i32))
        registers[place] = made
    return _with_registers(x, registers)


def _with_registers(x: mgpu.FragmentedArray, registers: Any) -> mgpu.FragmentedArray:
    """An array as x is, of these registers."""
    return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=x.is_signed)
