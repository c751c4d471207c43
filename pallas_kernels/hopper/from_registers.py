"""Rows of a product's result from registers to global memory, with no way through shared memory.

Of 8 columns in a row of wgmma's layout four threads have two neighbours each: 4 bytes of two-byte
numbers, where memory wants 32 at a time. They exchange four such groups, so that each has one
whole, and a row's four groups leave as 64 bytes:

    thread            0        1        2        3                   0    1    2    3
    columns  0..7     a0       a1       a2       a3                  a0   b0   c0   d0
             8..15    b0       b1       b2       b3       becomes    a1   b1   c1   d1
            16..23    c0       c1       c2       c3                  a2   b2   c2   d2
            24..31    d0       d1       d2       d3                  a3   b3   c3   d3
"""

from __future__ import annotations

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
from jax import Array
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

__all__ = ["store_rows"]

WGMMA = plgpu.Layout.WGMMA
_NUMBER = plgpu.Layout.WG_SPLAT(())
_REF = plgpu.RefType()

type _Value = ir.Value[Any]


def store_rows(x: Array, gmem: Any, limit: Array | None) -> None:
    """gmem = x, (64, columns) numbers of two bytes; columns are a multiple of 8.

    limit: how many of the rows there are in gmem, if not all.
    """
    given = [] if limit is None else [limit]

    @plgpu.inline_mgpu(arg_types=(_REF, WGMMA, *[_NUMBER] * len(given)))  # type: ignore[untyped-decorator]
    def emit(
        _: mgpu.LaunchContext, gmem: _Value, x: mgpu.FragmentedArray, *limit: mgpu.FragmentedArray
    ) -> None:
        words = [llvm.bitcast(_int(32), pair) for pair in x.registers.flat]
        most = limit[0].registers.item() if limit else None
        thread = arith.andi(mgpu.thread_idx(), _c(127))
        column = arith.andi(thread, _c(3))
        (stride, _one), _offset = ir.MemRefType(gmem.type).get_strides_and_offset()
        for lower in (0, 1):  # a thread has two rows, 8 apart
            row = arith.addi(_row(thread), _c(8 * lower))
            inside = None if most is None else arith.cmpi(arith.CmpIPredicate.slt, row, most)
            start = _past(mgpu.utils.memref_ptr(gmem), row, 2 * stride)
            own = words[lower::2]  # by 8 columns
            whole = len(own) // 4 * 4
            for i in range(0, whole, 4):
                place = _past(_past(start, column, 16), _c(i), 16)
                _put(place, _exchanged(own[i : i + 4], thread), inside)
            for i in range(whole, len(own)):
                _put(_past(_past(start, column, 4), _c(i), 16), own[i : i + 1], inside)

    emit(gmem, x, *given)


def _exchanged(words: list[_Value], thread: _Value) -> list[_Value]:
    """Of four threads' four words the i-th thread's i-th words, in the order of the threads."""
    a, b, c, d = words
    odd, upper = (
        arith.cmpi(arith.CmpIPredicate.ne, arith.andi(thread, _c(bit)), _c(0)) for bit in (1, 2)
    )
    (a, b), (c, d) = _swapped(a, b, odd, 1), _swapped(c, d, odd, 1)
    (a, c), (b, d) = _swapped(a, c, upper, 2), _swapped(b, d, upper, 2)
    return [a, b, c, d]


def _swapped(a: _Value, b: _Value, is_second: _Value, distance: int) -> tuple[_Value, _Value]:
    """Of two threads so far apart: both a to the first, both b to the second."""
    got = llvm.inline_asm(
        _int(32),
        [arith.select(is_second, a, b)],
        f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;",
        "=r,r",
        has_side_effects=True,
    )
    return arith.select(is_second, got, a), arith.select(is_second, b, got)


def _row(thread: _Value) -> _Value:
    """The upper one of a thread's two rows: of each 16 rows of a warp."""
    warp, lane = arith.shrui(thread, _c(5)), arith.andi(thread, _c(31))
    row: _Value = arith.addi(arith.muli(warp, _c(16)), arith.shrui(lane, _c(2)))
    return row


def _past(place: _Value, count: _Value, size: int) -> _Value:
    """The address so many things of `size` bytes further."""
    offset = arith.muli(arith.extui(_int(64), count), mgpu.c(size, _int(64)))
    found: _Value = mgpu.utils.getelementptr(place, [offset], _int(8))
    return found


def _put(place: _Value, words: list[_Value], inside: _Value | None) -> None:
    """One word or four to global memory, if the row is inside."""
    names = ", ".join(f"${i + 1}" for i in range(len(words)))
    text = "st.global.b32 [$0], $1;" if len(words) == 1 else f"st.global.v4.b32 [$0], {{{names}}};"
    given, constraints = [place, *words], "l" + ",r" * len(words)
    if inside is not None:
        given.append(arith.extui(_int(32), inside))
        constraints += ",r"
        text = f"{{ .reg .pred p; setp.ne.u32 p, ${len(given) - 1}, 0; @p {text} }}"
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, given, text, constraints + ",~{memory}", has_side_effects=True)


def _int(bits: int) -> Any:
    return ir.IntegerType.get_signless(bits)


def _c(x: int) -> _Value:
    found: _Value = mgpu.c(x, _int(32))
    return found
