"""Instructions that Pallas has no name for, by inline PTX; the interpreter has none of them.

A warpgroup's registers hold a (64, columns) matrix as a product leaves it (PTX ISA, "Register
fragments for wgmma.mma_async.m64nNk16"): of 8 columns a thread has two neighbours in a row, and the
same two 8 rows below. In fragment order these four numbers of each thread follow each other, then
the threads, then the next 8 columns, so that all its accesses to memory are whole and in a row.
"""

from __future__ import annotations

from typing import Any

import jax.experimental.mosaic.gpu as mgpu
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

__all__ = [
    "add_fragment",
    "arrive",
    "await_all",
    "await_claim",
    "await_first",
    "claim",
    "claims_none",
    "end_turn",
    "from_fragments",
    "hold",
    "hold_rows",
    "leave",
    "load_fragment",
    "meet",
    "multiplied",
    "number_at",
    "publish",
    "put_fragment",
    "store_fragment",
    "store_pairs",
    "take",
    "take_turn",
    "tell",
    "tell_claim",
    "to_fragment",
    "together",
]

WGMMA = plgpu.Layout.WGMMA
_ROW = WGMMA.reduce(1)
_NUMBER = plgpu.Layout.WG_SPLAT(())
_REF = plgpu.RefType()
_GROUP = 4 * 4 * 128  # bytes of 8 columns

# Of a word that says how far a block of dQ is: four times the visits that began, and what is added
# once the first one's numbers are there.
BEGUN, STORED = 4, 2

NO_TURN = -(2**31)  # neither an index nor the complement of one

# Of a word that says how far a tile's sums are: what is added when the first one's numbers are
# there, and each one's. Below the former it counts who arrived.
FIRST_THERE, ONE_THERE = 1 << 15, 1 << 16

# A thread's number in its warpgroup, for one use: as an operand it would be kept in a register.
_THREAD = ".reg .u32 thread; mov.u32 thread, %tid.x; and.b32 thread, thread, 127;\n"

type _Value = ir.Value[Any]


def meet(number: int, threads: int) -> None:
    """Waits for this many threads of the block at a named barrier of this number.

    What each wrote to shared memory before is there for all, products and copies included. Numbers
    up to that of the warpgroups are Mosaic's.
    """

    @plgpu.inline_mgpu()  # type: ignore[untyped-decorator]
    def emit(_: mgpu.LaunchContext) -> None:
        _asm("fence.proxy.async.shared::cta;")
        _asm(f"bar.sync {number}, {threads};")

    emit()


def multiplied(
    acc: Array, a: Any, b: Any, *, in_registers: bool, turns_a: bool, turns_b: bool
) -> Array:
    """acc + a @ b, started, where b is in pieces; or of a.T or b.T where it turns them.

    In pieces are (pieces, rows, columns) in shared memory: each is one tile wide, so that its tiles
    are its rows. To wgmma they are tiles in an order that Pallas has no name for.

    a: in registers; in pieces; or a matrix in tiles of b's width.
    """
    width = b.shape[-1]
    swizzle = width * jnp.dtype(b.dtype).itemsize
    form = plgpu.RefType(
        transforms=(plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(swizzle))  # type: ignore[abstract]
    )

    def in_order(x: _Value) -> _Value:
        """Tiles of rows, tiles of columns, 8, width."""
        if ir.MemRefType(x.type).rank == 4:
            return x
        return mgpu.memref_transpose(mgpu.memref_fold(x, 1, 2), (1, 0, 2, 3))

    def turned(x: _Value) -> _Value:
        return mgpu.memref_transpose(x, (1, 0, 3, 2))

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(WGMMA, WGMMA if in_registers else form, form),
        return_type=plgpu.ShapeDtypeStruct(acc.shape, jnp.float32, layout=WGMMA),
    )
    def emit(
        _: mgpu.LaunchContext, acc: mgpu.FragmentedArray, a_own: Any, b_own: _Value
    ) -> mgpu.FragmentedArray:
        if not in_registers:
            a_own = turned(in_order(a_own)) if turns_a else in_order(a_own)
        b_own = turned(in_order(b_own)) if turns_b else in_order(b_own)
        made = mgpu.WGMMAAccumulator.from_registers(acc, sync=False)
        made = mgpu.wgmma(made, a_own, b_own, swizzle=swizzle)
        _asm("wgmma.commit_group.sync.aligned;")
        value: mgpu.FragmentedArray = made.value
        return value

    found: Array = emit(acc, a, b)
    return found


def hold(x: Array, never: Array) -> None:
    """Keeps all waits behind this after the making of x, by a store of it that is never done.

    ptxas moves a wait for a product up before all that can do without, which then has no product
    to run beside.

    never: a zero that the compiler cannot know.
    """

    @plgpu.inline_mgpu(arg_types=(WGMMA, _NUMBER))  # type: ignore[untyped-decorator]
    def emit(_: mgpu.LaunchContext, x: mgpu.FragmentedArray, never: mgpu.FragmentedArray) -> None:
        numbers = [number for four in _fours(x) for number in four]
        stores = "".join(
            f"@p st.shared.v4.f32 [$0], {{${i}, ${i + 1}, ${i + 2}, ${i + 3}}};\n"
            for i in range(1, len(numbers), 4)
        )
        text = "{ .reg .pred p; setp.ne.u32 p, $0, 0;\n" + stores + "}"
        _asm(text, never.registers.item(), *numbers, constraints="r" + ",f" * len(numbers))

    emit(x, never)


def hold_rows(x: Array, never: Array) -> None:
    """The same of one number a row: `hold` of what all of the row was needed for."""

    @plgpu.inline_mgpu(arg_types=(_ROW, _NUMBER))  # type: ignore[untyped-decorator]
    def emit(_: mgpu.LaunchContext, x: mgpu.FragmentedArray, never: mgpu.FragmentedArray) -> None:
        numbers = list(x.registers.flat)
        stores = "".join(f"@p st.shared.f32 [$0], ${i + 1};\n" for i in range(len(numbers)))
        text = "{ .reg .pred p; setp.ne.u32 p, $0, 0;\n" + stores + "}"
        _asm(text, never.registers.item(), *numbers, constraints="r" + ",f" * len(numbers))

    emit(x, never)


def add_fragment(x: Array, gmem: Any, row: Array, first: int = 0) -> None:
    """gmem[row, first:] += x, (64, columns) to (rows, ..) float32 in fragment order."""

    @plgpu.inline_mgpu(arg_types=(_REF, WGMMA, _NUMBER))  # type: ignore[untyped-decorator]
    def emit(
        _: mgpu.LaunchContext, gmem: _Value, x: mgpu.FragmentedArray, row: mgpu.FragmentedArray
    ) -> None:
        place = _place(gmem, row.registers.item())
        for i, four in enumerate(_fours(x)):
            at = 4 * first + _GROUP * i
            add = f"red.relaxed.gpu.global.add.v4.f32 [$0 + {at}], {{$1, $2, $3, $4}};"
            _asm(add, place, *four, constraints="l,f,f,f,f")
        # The compiler has one zero for all accumulators. If x, which began as one, were its last
        # use, it would become x's first register, and be in the way from the first product on.
        _asm("// $0", mgpu.c(0, ir.IntegerType.get_signless(32)), constraints="r")

    emit(gmem, x, row)


def number_at(smem: Any, slot: Array) -> Array:
    """smem[slot], int32, read here and not later."""

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(_REF, _NUMBER),
        return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=_NUMBER),
    )
    def emit(
        _: mgpu.LaunchContext, smem: _Value, slot: mgpu.FragmentedArray
    ) -> mgpu.FragmentedArray:
        registers = np.empty((), object)
        registers[()] = llvm.inline_asm(
            ir.IntegerType.get_signless(32),
            [_shared(smem, slot.registers.item())],
            "ld.volatile.shared.s32 $0, [$1];",
            "=r,r,~{memory}",
            has_side_effects=True,
        )
        return mgpu.FragmentedArray(_registers=registers, _layout=slot.layout, _is_signed=True)

    found: Array = emit(smem, slot)
    return found


def put_fragment(
    x: Array,
    gmem: Any,
    row: Array,
    claimed: Array,
    first: int = 0,
    *,
    parts: int = 0,
    at_once: bool = False,
) -> None:
    """gmem[row, first:] = x where `claimed` is not negative, else += x.

    x: (64, columns), there (64 columns,) float32 in fragment order.
    at_once: behind one branch; else each store or add is chosen, for which ptxas makes a branch.
    parts: if not 0, the row is the row-th of so many behind parts i, where i is `claimed`, or
      ~claimed if that is negative.
    """

    @plgpu.inline_mgpu(arg_types=(_REF, WGMMA, _NUMBER, _NUMBER))  # type: ignore[untyped-decorator]
    def emit(
        _: mgpu.LaunchContext,
        gmem: _Value,
        x: mgpu.FragmentedArray,
        row: mgpu.FragmentedArray,
        claim: mgpu.FragmentedArray,
    ) -> None:
        i32 = ir.IntegerType.get_signless(32)
        claimed, own = claim.registers.item(), row.registers.item()
        if parts:
            index = arith.xori(claimed, arith.shrsi(claimed, mgpu.c(31, i32)))
            own = arith.addi(arith.muli(index, mgpu.c(parts, i32)), own)
        place, fours = _place(gmem, own), list(_fours(x))
        each = [fours] if at_once else [[four] for four in fours]
        at = 4 * first
        for some in each:
            store, add = (
                "".join(
                    f"{put} [$0 + {at + _GROUP * i}],"
                    f" {{{', '.join(f'${4 * i + j}' for j in range(2, 6))}}};\n"
                    for i in range(len(some))
                )
                for put in ("st.global.v4.f32", "red.relaxed.gpu.global.add.v4.f32")
            )
            text = f"@p {store}@!p {add}"
            if at_once:
                text = f"@p bra FIRST;\n{add}bra.uni DONE;\nFIRST:\n{store}DONE:"
            text = f"{{ .reg .pred p; setp.ge.s32 p, $1, 0;\n{text} }}"
            numbers = [number for four in some for number in four]
            _asm(text, place, claimed, *numbers, constraints="l,r" + ",f" * len(numbers))
            at += _GROUP * len(some)
        _asm("// $0", mgpu.c(0, i32), constraints="r")  # as in add_fragment

    emit(gmem, x, row, claimed)


def store_fragment(x: Array, gmem: Any, row: Array, first: int = 0) -> None:
    """gmem[row, first:] = x, (64, columns) to (rows, ..) float32 in fragment order."""

    @plgpu.inline_mgpu(arg_types=(_REF, WGMMA, _NUMBER))  # type: ignore[untyped-decorator]
    def emit(
        _: mgpu.LaunchContext, gmem: _Value, x: mgpu.FragmentedArray, row: mgpu.FragmentedArray
    ) -> None:
        place = _place(gmem, row.registers.item())
        for i, four in enumerate(_fours(x)):
            at = 4 * first + _GROUP * i
            store = f"st.global.v4.f32 [$0 + {at}], {{$1, $2, $3, $4}};"
            _asm(store, place, *four, constraints="l,f,f,f,f")

    emit(gmem, x, row)


def arrive(gmem: Any, index: Array, smem: Any, slot: Array) -> None:
    """smem[slot] = how many arrived at the word gmem[index] before; the warpgroup meets."""

    @plgpu.inline_mgpu(arg_types=(_REF, _NUMBER, _REF, _NUMBER))  # type: ignore[untyped-decorator]
    def emit(
        _: mgpu.LaunchContext,
        gmem: _Value,
        index: mgpu.FragmentedArray,
        smem: _Value,
        slot: mgpu.FragmentedArray,
    ) -> None:
        text = (
            "{ .reg .pred p; .reg .u32 word; .reg .u64 place;\n"
            f"{_THREAD}"
            "setp.eq.u32 p, thread, 0;\n"
            "mad.wide.u32 place, $1, 4, $0;\n"
            "@p atom.acq_rel.gpu.global.add.u32 word, [place], 1;\n"
            f"@p and.b32 word, word, {FIRST_THERE - 1};\n"
            "@p st.shared.u32 [$2], word; }"
        )
        words, own = mgpu.utils.memref_ptr(gmem), _shared(smem, slot.registers.item())
        _asm(text, words, index.registers.item(), own, constraints="l,r,r")
        mgpu.warpgroup_barrier()

    emit(gmem, index, smem, slot)


def leave(gmem: Any, index: Array, *, first: bool) -> None:
    """Says at the word gmem[index] that what the warpgroup, which meets, has put there is there."""
    amount = ONE_THERE + FIRST_THERE * first

    @plgpu.inline_mgpu(arg_types=(_REF, _NUMBER))  # type: ignore[untyped-decorator]
    def emit(_: mgpu.LaunchContext, gmem: _Value, index: mgpu.FragmentedArray) -> None:
        mgpu.warpgroup_barrier()
        text = (
            "{ .reg .pred p; .reg .u64 place;\n"
            f"{_THREAD}"
            "setp.eq.u32 p, thread, 0;\n"
            "mad.wide.u32 place, $1, 4, $0;\n"
            "@p fence.acq_rel.gpu;\n"
            f"@p red.relaxed.gpu.global.add.u32 [place], {amount}; }}"
        )
        words = mgpu.utils.memref_ptr(gmem)
        _asm(text, words, index.registers.item(), constraints="l,r")

    emit(gmem, index)


def await_first(gmem: Any, index: Array) -> None:
    """Waits at the word gmem[index] for the first that arrived to leave; the warpgroup meets."""
    _await(gmem, index, FIRST_THERE, FIRST_THERE)


def await_all(gmem: Any, index: Array, count: Array | int) -> None:
    """The same for so many to leave."""
    least = ONE_THERE * count if isinstance(count, int) else count * np.int32(ONE_THERE)
    _await(gmem, index, -ONE_THERE % 2**32, least)


def _await(gmem: Any, index: Array, mask: int, least: Array | int) -> None:
    """Waits until the word gmem[index], masked, is as much; the warpgroup meets."""
    known = None if isinstance(least, Array) else str(least)
    numbers = (index,) if known else (index, least)

    @plgpu.inline_mgpu(arg_types=(_REF, *[_NUMBER] * len(numbers)))  # type: ignore[untyped-decorator]
    def emit(_: mgpu.LaunchContext, gmem: _Value, *numbers: mgpu.FragmentedArray) -> None:
        text = (
            "{ .reg .pred p; .reg .u32 word; .reg .u64 place;\n"
            f"{_THREAD}"
            "setp.ne.u32 p, thread, 0;\n"
            "@p bra THERE;\n"
            "mad.wide.u32 place, $1, 4, $0;\n"
            "WAITING:\n"
            "ld.acquire.gpu.global.u32 word, [place];\n"
            f"and.b32 word, word, {mask};\n"
            f"setp.lt.u32 p, word, {known or '$2'};\n"
            "@p bra WAITING;\n"
            "THERE: }"
        )
        given = (x.registers.item() for x in numbers)
        constraints = ",".join(["l", *["r"] * len(numbers)])
        _asm(text, mgpu.utils.memref_ptr(gmem), *given, constraints=constraints)
        mgpu.warpgroup_barrier()

    emit(gmem, *numbers)


def claims_none(smem: Any, count: int, none: int = -1) -> None:
    """smem[:count] = none, int32, by a thread each; for the warpgroup once it has met."""

    @plgpu.inline_mgpu(arg_types=(_REF,))  # type: ignore[untyped-decorator]
    def emit(_: mgpu.LaunchContext, smem: _Value) -> None:
        text = f"{{ .reg .pred p; setp.lt.u32 p, $1, {count};\n@p st.shared.s32 [$0], {none}; }}"
        _asm(text, _shared(smem, _thread()), _thread(), constraints="r,r")

    emit(smem)


def claim(gmem: Any, index: Array, smem: Any, slot: Array) -> None:
    """smem[slot] = index if nobody was at the word gmem[index] before, else -1.

    Then what the first one stores there is waited for. By the warpgroup's first thread alone: all
    is for those that see its next arrival at a barrier.
    """

    @plgpu.inline_mgpu(arg_types=(_REF, _NUMBER, _REF, _NUMBER))  # type: ignore[untyped-decorator]
    def emit(
        _: mgpu.LaunchContext,
        gmem: _Value,
        index: mgpu.FragmentedArray,
        smem: _Value,
        slot: mgpu.FragmentedArray,
    ) -> None:
        text = (
            "{ .reg .pred p; .reg .u32 word, bits; .reg .u64 place;\n"
            f"{_THREAD}"
            "setp.ne.u32 p, thread, 0;\n"
            "@p bra CLAIMED;\n"
            "mad.wide.u32 place, $1, 4, $0;\n"
            f"atom.acquire.gpu.global.add.u32 word, [place], {BEGUN};\n"
            f"setp.lt.u32 p, word, {BEGUN};\n"
            "selp.b32 bits, $1, -1, p;\n"
            "st.shared.u32 [$2], bits;\n"
            "@p bra CLAIMED;\n"
            "WAITING:\n"
            f"and.b32 bits, word, {STORED};\n"
            "setp.ne.u32 p, bits, 0;\n"
            "@p bra CLAIMED;\n"
            "ld.acquire.gpu.global.u32 word, [place];\n"
            "bra WAITING;\n"
            "CLAIMED: }"
        )
        words, own = mgpu.utils.memref_ptr(gmem), _shared(smem, slot.registers.item())
        _asm(text, words, index.registers.item(), own, constraints="l,r,r")

    emit(gmem, index, smem, slot)


def tell_claim(slot: Array, first: int, warpgroups: int) -> None:
    """What `claim` put into this slot is there, for `await_claim` of each of so many warpgroups.

    first: the number of the first of their named barriers, two for each.
    """

    @plgpu.inline_mgpu(arg_types=(_NUMBER,))  # type: ignore[untyped-decorator]
    def emit(_: mgpu.LaunchContext, slot: mgpu.FragmentedArray) -> None:
        arrivals = "add.u32 number, number, 2;\n".join(["bar.arrive number, 160;\n"] * warpgroups)
        text = (
            "{ .reg .pred p; .reg .u32 number;\n"
            f"{_THREAD}"
            "setp.ge.u32 p, thread, 32;\n"
            "@p bra TOLD;\n"
            "bar.warp.sync 0xffffffff;\n"
            "and.b32 number, $0, 1;\n"
            f"add.u32 number, number, {first};\n"
            f"{arrivals}"
            "TOLD: }"
        )
        _asm(text, slot.registers.item(), constraints="r")

    emit(slot)


def await_claim(slot: Array, first: int) -> None:
    """Waits for what is told of this slot, once each time; first as above."""

    @plgpu.inline_mgpu(arg_types=(_NUMBER,))  # type: ignore[untyped-decorator]
    def emit(_: mgpu.LaunchContext, slot: mgpu.FragmentedArray) -> None:
        text = (
            "{ .reg .u32 number, own;\n"
            "mov.u32 own, %tid.x; shr.u32 own, own, 7;\n"
            "and.b32 number, $0, 1;\n"
            "mad.lo.u32 number, own, 2, number;\n"
            f"add.u32 number, number, {first};\n"
            "bar.sync number, 160; }"
        )
        _asm(text, slot.registers.item(), constraints="r")

    emit(slot)


def publish(gmem: Any, smem: Any, slot: Array) -> None:
    """Says at the word gmem[smem[slot]] that what was stored by those now waited for is there.

    Nothing if smem[slot] is negative, which it is afterwards. By a thread of the warpgroup's second
    warp, so that none that waits in `claim` keeps others waiting.
    """

    @plgpu.inline_mgpu(arg_types=(_REF, _REF, _NUMBER))  # type: ignore[untyped-decorator]
    def emit(_: mgpu.LaunchContext, gmem: _Value, smem: _Value, slot: mgpu.FragmentedArray) -> None:
        text = (
            "{ .reg .pred p; .reg .s32 index; .reg .u64 word;\n"
            f"{_THREAD}"
            "setp.ne.u32 p, thread, 32;\n"
            "@p bra PUBLISHED;\n"
            "ld.shared.s32 index, [$1];\n"
            "setp.lt.s32 p, index, 0;\n"
            "@p bra PUBLISHED;\n"
            "mad.wide.s32 word, index, 4, $0;\n"
            "fence.acq_rel.gpu;\n"
            f"red.relaxed.gpu.global.add.u32 [word], {STORED};\n"
            "st.shared.s32 [$1], -1;\n"
            "PUBLISHED: }"
        )
        words = mgpu.utils.memref_ptr(gmem)
        _asm(text, words, _shared(smem, slot.registers.item()), constraints="l,r")

    emit(gmem, smem, slot)


def take_turn(gmem: Any, index: Array, rank: Array, smem: Any, slot: Array, before: Array) -> None:
    """Waits until the word gmem[index] is the rank; smem[slot] = index if that is 0, else ~index.

    And until `end_turn` has seen to smem[before]. By the warpgroup's first thread alone: all is for
    those that see its next arrival at a barrier.
    """

    @plgpu.inline_mgpu(arg_types=(_REF, _REF, *[_NUMBER] * 4))  # type: ignore[untyped-decorator]
    def emit(
        _: mgpu.LaunchContext, gmem: _Value, smem: _Value, *numbers: mgpu.FragmentedArray
    ) -> None:
        text = (
            "{ .reg .pred p; .reg .u32 word, other; .reg .u64 place;\n"
            f"{_THREAD}"
            "setp.ne.u32 p, thread, 0;\n"
            "@p bra TURN;\n"
            "BEFORE:\n"
            "ld.acquire.cta.shared.u32 word, [$4];\n"
            f"setp.ne.s32 p, word, {NO_TURN};\n"
            "@p bra BEFORE;\n"
            "mad.wide.u32 place, $1, 4, $0;\n"
            "setp.eq.u32 p, $2, 0;\n"
            "@p bra THERE;\n"
            "WAITING:\n"
            "ld.acquire.gpu.global.u32 word, [place];\n"
            "setp.lt.u32 p, word, $2;\n"
            "@p bra WAITING;\n"
            "THERE:\n"
            "setp.eq.u32 p, $2, 0;\n"
            "not.b32 other, $1;\n"
            "selp.b32 word, $1, other, p;\n"
            "st.shared.u32 [$3], word;\n"
            "TURN: }"
        )
        index, rank, slot, before = (x.registers.item() for x in numbers)
        own = (_shared(smem, x) for x in (slot, before))
        _asm(text, mgpu.utils.memref_ptr(gmem), index, rank, *own, constraints="l,r,r,r,r")

    emit(gmem, smem, index, rank, slot, before)


def end_turn(gmem: Any, smem: Any, slot: Array) -> None:
    """Adds one to the word of which smem[slot] has the index, as `take_turn` does; once.

    What those put that are now waited for is there for who sees it. By a thread of the warpgroup's
    second warp, so that none that waits in `take_turn` keeps others waiting.
    """

    @plgpu.inline_mgpu(arg_types=(_REF, _REF, _NUMBER))  # type: ignore[untyped-decorator]
    def emit(_: mgpu.LaunchContext, gmem: _Value, smem: _Value, slot: mgpu.FragmentedArray) -> None:
        text = (
            "{ .reg .pred p; .reg .s32 index, sign; .reg .u64 word;\n"
            f"{_THREAD}"
            "setp.ne.u32 p, thread, 32;\n"
            "@p bra ENDED;\n"
            "ld.shared.s32 index, [$1];\n"
            f"setp.eq.s32 p, index, {NO_TURN};\n"
            "@p bra ENDED;\n"
            "shr.s32 sign, index, 31;\n"
            "xor.b32 index, index, sign;\n"
            "mad.wide.s32 word, index, 4, $0;\n"
            "fence.acq_rel.gpu;\n"
            "red.relaxed.gpu.global.add.u32 [word], 1;\n"
            f"st.release.cta.shared.s32 [$1], {NO_TURN};\n"
            "ENDED: }"
        )
        words = mgpu.utils.memref_ptr(gmem)
        _asm(text, words, _shared(smem, slot.registers.item()), constraints="l,r")

    emit(gmem, smem, slot)


def load_fragment(gmem: Any, row: Array, columns: int, first: int = 0) -> Array:
    """gmem[row, first:], (64, columns), of (rows, ..) float32 in fragment order."""

    @plgpu.inline_mgpu(  # type: ignore[untyped-decorator]
        arg_types=(_REF, _NUMBER),
        return_type=plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=WGMMA),
    )
    def emit(
        _: mgpu.LaunchContext, gmem: _Value, row: mgpu.FragmentedArray
    ) -> mgpu.FragmentedArray:
        place, number = _place(gmem, row.registers.item()), ir.F32Type.get()
        i32 = ir.IntegerType.get_signless(32)
        pairs = []
        for i in range(columns // 8):
            at = 4 * first + _GROUP * i
            load = f"ld.global.L1::no_allocate.v4.f32 {{$0, $1, $2, $3}}, [$4 + {at}];"
            four = llvm.inline_asm(
                llvm.StructType.get_literal([number] * 4),
                [place],
                load,
                "=f,=f,=f,=f,l",
                has_side_effects=True,
            )
            for half in (0, 2):
                pair = llvm.mlir_undef(ir.VectorType.get((2,), number))
                for k in range(2):
                    one = llvm.extractvalue(number, four, [half + k])
                    pair = llvm.insertelement(pair, one, mgpu.c(k, i32))
                pairs.append(pair)
        registers = np.empty(len(pairs), object)
        registers[:] = pairs
        shape = mgpu.WGMMA_LAYOUT.registers_shape((64, columns))
        return mgpu.FragmentedArray(
            _registers=registers.reshape(shape), _layout=mgpu.WGMMA_LAYOUT, _is_signed=None
        )

    found: Array = emit(gmem, row)
    return found


def store_pairs(
    first: Array, second: Array, gmem: Any, *, rows: int, parts: int, step: int, between: int
) -> None:
    """Two numbers (64,) of each row to global memory, where the first row's first number is.

    The four threads that hold two rows store one number each.

    rows: of a part, which lie next to each other; those past the last part are left out.
    step: numbers from a part's first row to the next one's.
    between: numbers from a row's first to its second.
    """

    @plgpu.inline_mgpu(arg_types=(_ROW, _ROW, _REF))  # type: ignore[untyped-decorator]
    def emit(
        _: mgpu.LaunchContext,
        first: mgpu.FragmentedArray,
        second: mgpu.FragmentedArray,
        gmem: _Value,
    ) -> None:
        i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))

        def c(x: int) -> _Value:
            found: _Value = mgpu.c(x, i32)
            return found

        def below(x: _Value, limit: int) -> _Value:
            found: _Value = arith.cmpi(arith.CmpIPredicate.ult, x, c(limit))
            return found

        thread = mgpu.thread_idx()
        lane = arith.andi(thread, c(31))
        # Of a warp's 16 rows a thread has the one of its four, and the one 8 below.
        lower = arith.andi(lane, c(1))
        warp = arith.andi(arith.shrui(thread, c(5)), c(3))
        row = arith.addi(arith.muli(warp, c(16)), arith.shrui(lane, c(2)))
        row = arith.addi(row, arith.muli(lower, c(8)))
        is_first, is_upper = below(arith.andi(lane, c(3)), 2), below(lower, 1)
        numbers = [
            arith.select(is_upper, *(llvm.extractelement(two, c(0)) for two in x.registers.flat))
            for x in (first, second)
        ]
        at = row
        if rows < 64:
            part, at = arith.divui(row, c(rows)), arith.remui(row, c(rows))
            at = arith.addi(at, arith.muli(part, c(step)))
        at = arith.addi(at, arith.select(is_first, c(0), c(between)))
        place = mgpu.utils.getelementptr(
            mgpu.utils.memref_ptr(gmem), [arith.extui(i64, at)], ir.F32Type.get()
        )
        number = arith.select(is_first, *numbers)
        if rows * parts < 64:
            some = arith.extui(i32, below(row, rows * parts))
            text = "{ .reg .pred p; setp.ne.u32 p, $2, 0; @p st.global.f32 [$0], $1; }"
            _asm(text, place, number, some, constraints="l,f,r")
        else:
            _asm("st.global.f32 [$0], $1;", place, number, constraints="l,f")

    emit(first, second, gmem)


def to_fragment(x: Array) -> Array:
    """(64, columns) in fragment order, (64 columns,)."""
    x = x.reshape(4, 2, 8, x.shape[1] // 8, 4, 2)
    return x.transpose(3, 0, 2, 4, 1, 5).reshape(-1)


def from_fragments(x: Array, columns: int) -> Array:
    """(rows, 64 columns) in fragment order as (rows, 64, columns)."""
    x = x.reshape(-1, columns // 8, 4, 8, 4, 2, 2)
    return x.transpose(0, 2, 5, 3, 1, 4, 6).reshape(-1, 64, columns)


def _fours(x: mgpu.FragmentedArray) -> list[list[_Value]]:
    """A thread's numbers, by 8 columns."""
    i32 = ir.IntegerType.get_signless(32)
    pairs = list(x.registers.flat)
    numbers = [llvm.extractelement(pair, mgpu.c(k, i32)) for pair in pairs for k in range(2)]
    return [numbers[i : i + 4] for i in range(0, len(numbers), 4)]


def _place(gmem: _Value, row: _Value) -> _Value:
    """The address of a thread's first four numbers of a row."""
    i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
    row_bytes = mgpu.c(4 * ir.MemRefType(gmem.type).shape[-1], i64)
    own = arith.extui(i64, arith.muli(_thread(), mgpu.c(16, i32)))
    offset = arith.addi(arith.muli(arith.extui(i64, row), row_bytes), own)
    place: _Value = mgpu.utils.getelementptr(
        mgpu.utils.memref_ptr(gmem), [offset], ir.IntegerType.get_signless(8)
    )
    return place


def take(gmem: Any, smem: Any, slot: Array, first: int) -> None:
    """smem[slot] = first + how often this was done before with the word gmem[0], which counts it.

    For all of the warpgroup, which meets.
    """

    @plgpu.inline_mgpu(arg_types=(_REF, _REF, _NUMBER))  # type: ignore[untyped-decorator]
    def emit(_: mgpu.LaunchContext, gmem: _Value, smem: _Value, slot: mgpu.FragmentedArray) -> None:
        text = (
            "{ .reg .pred p; .reg .u32 n;\n"
            f"{_THREAD}"
            "setp.eq.u32 p, thread, 0;\n"
            "@p atom.relaxed.gpu.global.add.u32 n, [$0], 1;\n"
            f"@p add.u32 n, n, {first};\n"
            "@p st.shared.u32 [$1], n; }"
        )
        own = _shared(smem, slot.registers.item())
        _asm(text, mgpu.utils.memref_ptr(gmem), own, constraints="l,r")
        mgpu.warpgroup_barrier()

    emit(gmem, smem, slot)


def tell(smem: Any, slot: Array, numbers: list[Array]) -> None:
    """smem[slot :] = four numbers, by the warpgroup's first thread; slot is a multiple of four."""

    @plgpu.inline_mgpu(arg_types=(_REF, *[_NUMBER] * 5))  # type: ignore[untyped-decorator]
    def emit(
        _: mgpu.LaunchContext, smem: _Value, slot: mgpu.FragmentedArray, *x: mgpu.FragmentedArray
    ) -> None:
        text = (
            "{ .reg .pred p;\n"
            f"{_THREAD}"
            "setp.eq.u32 p, thread, 0;\n"
            "@p st.shared.v4.u32 [$0], {$1, $2, $3, $4}; }"
        )
        own = _shared(smem, slot.registers.item())
        _asm(text, own, *(n.registers.item() for n in x), constraints="r,r,r,r,r")

    emit(smem, slot, *numbers)


def together() -> None:
    """The warpgroup's threads meet."""

    @plgpu.inline_mgpu()  # type: ignore[untyped-decorator]
    def emit(_: mgpu.LaunchContext) -> None:
        mgpu.warpgroup_barrier()

    emit()


def _thread() -> _Value:
    """A thread's number in its warpgroup."""
    thread: _Value = arith.andi(mgpu.thread_idx(), mgpu.c(127, ir.IntegerType.get_signless(32)))
    return thread


def _shared(smem: _Value, index: _Value) -> _Value:
    """The address of one of a vector's numbers of four bytes."""
    i8, i32 = (ir.IntegerType.get_signless(bits) for bits in (8, 32))
    offset = arith.muli(index, mgpu.c(4, i32))
    own = mgpu.utils.memref_ptr(smem)
    place: _Value = mgpu.utils.getelementptr(own, [offset], i8)
    return place


def _asm(text: str, *operands: _Value, constraints: str = "") -> None:
    memory = ",".join(filter(None, [constraints, "~{memory}"]))
    void = ir.Type.parse("!llvm.void")
    llvm.inline_asm(void, list(operands), text, memory, has_side_effects=True)
