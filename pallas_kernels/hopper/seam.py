"""Where the kernel's text differs between a GPU and the interpreter on a CPU.

The interpreter runs threads, barriers and copies, but has no wgmma with a register operand, and no
PTX. That is met here; all else is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.hopper import assembly, instructions, wide_products
from pallas_kernels.hopper.copies import copyable, swizzle_of

__all__ = ["Ref", "Seam", "copyable", "matrix", "ring", "swizzle_of", "transforms"]

type Ref = Any

_OUT_OF_TURN = -(2**30)  # where interpreting, of what was put then


@dataclass(frozen=True)
class Seam:
    """The instructions of a GPU, or what stands for them when interpreting."""

    interpret: bool

    def matmul_into(self, acc: Ref, a: Array | Ref, b: Ref, *, in_registers: bool = True) -> None:
        """acc += a @ b, started; `a` is in registers or shared memory, `b` in shared memory.

        in_registers: whether `a` is, which matters where b is in pieces (`plain.py`).
        """
        if len(b.shape) == 3:
            self._multiply(acc, a, b, in_registers=in_registers)
        elif self.interpret:
            acc[...] += jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
        else:
            plgpu.wgmma(acc, a, b)

    def inner_into(self, acc: Ref, a: Ref, b: Ref) -> None:
        """acc += a @ b.T, started, of matrices in shared memory, or both in pieces there."""
        if len(b.shape) == 3:
            self._multiply(acc, a, b, turns_b=True)
        else:
            self.matmul_into(acc, a, b.T)

    def turned_into(self, acc: Ref, a: Ref, b: Ref) -> None:
        """acc += a.T @ b, started, of matrices in shared memory; b may be in pieces there."""
        if len(b.shape) == 3:
            self._multiply(acc, a, b, turns_a=True)
        else:
            self.matmul_into(acc, a.T, b)

    def _multiply(
        self,
        acc: Ref,
        a: Array | Ref,
        b: Ref,
        *,
        in_registers: bool = False,
        turns_a: bool = False,
        turns_b: bool = False,
    ) -> None:
        if not self.interpret:
            turns = {"turns_a": turns_a, "turns_b": turns_b}
            before = plgpu.wgmma_accumulator_load(acc, wait_n=None)
            acc[...] = instructions.multiplied(before, a, b, in_registers=in_registers, **turns)
            return
        x, y = (jnp.concatenate(list(z[...]), axis=1) if z.ndim == 3 else z[...] for z in (a, b))
        acc[...] += jnp.dot(
            x.T if turns_a else x, y.T if turns_b else y, preferred_element_type=jnp.float32
        )

    def keys_into(self, acc: Ref, q: Ref, k: Ref, *, columns: int) -> None:
        """acc += Q Kᵀ, started, of matrices in shared memory that have this many columns, or more.

        Of the columns after the last, which are zero, no more than 15 are summed.
        """
        if self.interpret or columns > k.shape[-1] - wide_products.STEP:
            self.matmul_into(acc, q, k.T)
            return
        before = plgpu.wgmma_accumulator_load(acc, wait_n=None)
        acc[...] = wide_products.multiply_keys(before, q, k, columns)

    def values_into(self, acc: Ref, p: Array, v: Ref) -> None:
        """acc += P V, started; V in shared memory, in tiles or pieces (`wide_products.py`)."""
        if len(v.shape) == 2 and (self.interpret or wide_products.is_whole(v)):
            self.matmul_into(acc, p, v)
        elif self.interpret:
            whole = jnp.concatenate(list(v[...]), axis=1)[:, : acc.shape[-1]]
            acc[...] += jnp.dot(p, whole, preferred_element_type=jnp.float32)
        else:
            before = plgpu.wgmma_accumulator_load(acc, wait_n=None)
            acc[...] = wide_products.multiply_values(before, p, v)

    def powers_into(self, acc: Ref, x: Array, v: Ref) -> tuple[Array, int]:
        """P = 2^x (64, keys), and how many products were started: acc += P V, a part for each."""
        if self.interpret:
            p = jnp.exp2(x)
            self.values_into(acc, p.astype(v.dtype), v)
            return p, 1
        before = plgpu.wgmma_accumulator_load(acc, wait_n=None)
        acc[...], p = wide_products.multiply_powers(before, x, v)
        return p, v.shape[-2] // wide_products.STEP

    def padded(self, x: Array, columns: int) -> Array:
        """x (64, n) with zeros behind."""
        if not self.interpret:
            return wide_products.padded(x, columns)
        return jnp.concatenate([x, jnp.zeros((x.shape[0], columns - x.shape[1]), x.dtype)], axis=1)

    def wait(self, acc: Ref, *, in_flight: int) -> Array:
        """The accumulator's value once at most `in_flight` younger products are running."""
        if self.interpret:
            value: Array = acc[...]
            return value
        return plgpu.wgmma_accumulator_load(acc, wait_n=in_flight)  # type: ignore[no-any-return]

    def drain(self, in_flight: int) -> None:
        """Waits until at most `in_flight` products are running."""
        if not self.interpret:
            plgpu.wgmma_wait(in_flight)

    def stand_ins(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """Shared memory that stands for accumulators, by name; none on a GPU."""
        if not self.interpret:
            return {}
        return {f"{x}_stand_in": plgpu.SMEM(shape, jnp.float32) for x, shape in shapes.items()}

    def with_accumulator(
        self, body: Callable[[Ref], Any], shape: tuple[int, int], stand_in: Ref
    ) -> Any:
        """body(accumulator), a float32 one that is zero at first.

        `stand_in` is what is used when interpreting: shared memory of the warpgroup's own.
        """
        if self.interpret:
            stand_in[...] = jnp.zeros(shape, jnp.float32)
            return body(stand_in)
        return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))  # type: ignore[attr-defined]

    def store(self, x: Array, gmem: Ref) -> None:
        """gmem = x, from registers, whether or not its rows are whole lines of memory."""
        if self.interpret or not hasattr(plgpu, "store"):  # jax 0.11.2 asks for nothing
            gmem[...] = x
        else:
            plgpu.store(gmem, x, optimized=False)

    def add(self, smem: Ref, gmem: Ref) -> None:
        """gmem += smem, float32, started; rows past the array's end are left out."""
        if not self.interpret:
            plgpu.copy_smem_to_gmem(smem, gmem, reduction_op="add")
            return
        gmem[...] += smem[...]

    def add_fragment(self, x: Array, gmem: Ref, row: Array, first: int = 0) -> None:
        """gmem[row, first:] += x, (64, columns) float32 in registers, there in fragment order."""
        if self.interpret:
            gmem[row, pl.ds(first, x.size)] += instructions.to_fragment(x)
        else:
            instructions.add_fragment(x, gmem, row, first)

    def store_fragment(self, x: Array, gmem: Ref, row: Array, first: int = 0) -> None:
        """gmem[row, first:] = x; as above."""
        if self.interpret:
            gmem[row, pl.ds(first, x.size)] = instructions.to_fragment(x)
        else:
            instructions.store_fragment(x, gmem, row, first)

    def load_fragment(self, gmem: Ref, row: Array, columns: int, first: int = 0) -> Array:
        """gmem[row, first:], (64, columns); as above."""
        if not self.interpret:
            return instructions.load_fragment(gmem, row, columns, first)
        x = gmem[row, pl.ds(first, 64 * columns)]
        return instructions.from_fragments(x[None], columns)[0]

    def arrive(self, words: Ref, index: Array, notes: Ref, slot: Array) -> None:
        """notes[slot] = how many arrived at words[index] before, for the whole warpgroup."""
        if self.interpret:  # where thread blocks run one after another
            before = words[index]
            words[index] = before + 1
            notes[slot] = before
        else:
            instructions.arrive(words, index, notes, slot)

    def leave(self, words: Ref, index: Array, *, first: bool) -> None:
        """What the warpgroup put is there for those that wait for it."""
        if not self.interpret:
            instructions.leave(words, index, first=first)

    def await_first(self, words: Ref, index: Array) -> None:
        """Waits for what the first that arrived put."""
        if not self.interpret:
            instructions.await_first(words, index)

    def await_all(self, words: Ref, index: Array, count: Array | int) -> None:
        """Waits for what so many put."""
        if not self.interpret:
            instructions.await_all(words, index, count)

    def put_fragment(
        self,
        x: Array,
        gmem: Ref,
        row: Array,
        claimed: Array,
        first: int = 0,
        *,
        parts: int = 0,
        at_once: bool = False,
    ) -> None:
        """gmem[row, first:] = x where this thread block claimed it, else += x; as above.

        claimed: what is in the claim's slot.
        parts: if not 0, the row is one of so many of the word that `take_turn` was given.
        """
        if self.interpret:
            if parts:
                row = jnp.where(claimed < 0, ~claimed, claimed) * parts + row
            x, own = instructions.to_fragment(x), pl.ds(first, x.size)
            x = jnp.where(claimed >= 0, x, gmem[row, own] + x)
            gmem[row, own] = jnp.where(claimed == _OUT_OF_TURN, jnp.nan, x)
        else:
            instructions.put_fragment(x, gmem, row, claimed, first, parts=parts, at_once=at_once)

    def number_at(self, smem: Ref, slot: Array) -> Array:
        """smem[slot], int32, read here and not later."""
        if self.interpret:
            return smem[slot].astype(jnp.int32)  # type: ignore[no-any-return]
        return instructions.number_at(smem, slot)

    def claims_none(self, claimed: Ref, count: int) -> None:
        """claimed[:count] = -1."""
        if not self.interpret:
            instructions.claims_none(claimed, count)
            plgpu.commit_smem()

    def claim(self, words: Ref, index: Array, claimed: Ref, slot: Array) -> None:
        """claimed[slot] = index if this is the first claim to words[index], else -1.

        Then what the first one put there has been published, and is there for those that see this
        warpgroup's next arrival at a barrier.
        """
        if self.interpret:  # where thread blocks run one after another
            begun = words[index]
            words[index] = begun + instructions.BEGUN
            claimed[slot] = jnp.where(begun == 0, index, -1).astype(claimed.dtype)
        else:
            instructions.claim(words, index, claimed, slot)

    def tell_claim(self, slot: Array, warpgroups: int) -> None:
        """The claim in this slot is there, for each compute warpgroup that waits for it."""
        instructions.tell_claim(slot, _own_barriers(warpgroups), warpgroups)

    def await_claim(self, slot: Array, warpgroups: int) -> None:
        """Waits for the claim in this slot."""
        instructions.await_claim(slot, _own_barriers(warpgroups))

    def ends_none(self, claimed: Ref, count: int) -> None:
        """claimed[:count] = what `end_turn` leaves."""
        if not self.interpret:
            instructions.claims_none(claimed, count, instructions.NO_TURN)
            plgpu.commit_smem()

    def take_turn(
        self, words: Ref, index: Array, rank: Array, claimed: Ref, slot: Array, before: Array
    ) -> None:
        """claimed[slot] = index if the rank is 0, else ~index, once so many turns have ended.

        And once claimed[before] is what `end_turn` leaves. Then what those before put there is
        there for those that see this warpgroup's next arrival at a barrier.
        """
        if self.interpret:  # where thread blocks run one after another
            ended = words[index]
            words[index] = ended + 1
            put = jnp.where(ended == 0, index, ~index)
            claimed[slot] = jnp.where(ended == rank, put, _OUT_OF_TURN).astype(claimed.dtype)
        else:
            instructions.take_turn(words, index, rank, claimed, slot, before)

    def end_turn(self, words: Ref, claimed: Ref, slot: Array) -> None:
        """What those put that this warpgroup waited for is there for the next in turn."""
        if not self.interpret:
            instructions.end_turn(words, claimed, slot)

    def publish(self, words: Ref, claimed: Ref, slot: Array) -> None:
        """What those put that this warpgroup waited for is there for all that claim it later."""
        if not self.interpret:
            instructions.publish(words, claimed, slot)

    def take(self, counter: Ref, notes: Ref, slot: Array, first: int) -> None:
        """notes[slot] = first + how often this was done before, for the whole warpgroup."""
        if self.interpret:  # where thread blocks run one after another
            taken = counter[0]
            counter[0] = taken + 1
            notes[slot] = taken + np.int32(first)
        else:
            instructions.take(counter, notes, slot, first)

    def together(self) -> None:
        """The warpgroup's threads have all come here."""
        if not self.interpret:
            instructions.together()

    def tell(self, notes: Ref, slot: Array, numbers: list[Array]) -> None:
        """notes[slot : slot + 4] = numbers, for those that see this warpgroup's next arrival."""
        if not self.interpret:
            instructions.tell(notes, slot, numbers)
            return
        for i, number in enumerate(numbers):
            notes[slot + np.int32(i)] = number

    def meet(self, warpgroups: int, barrier: Ref) -> None:
        """Waits until as many have written to shared memory what products are to read.

        barrier: what is waited at when interpreting.
        """
        if not self.interpret:
            instructions.meet(_own_barriers(warpgroups) - 1, 128 * warpgroups)
            return
        plgpu.commit_smem()
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)

    def hold(self, x: Array, never: Array) -> None:
        """No wait for a product that follows is moved before the making of x (64, columns).

        never: a zero that the compiler cannot know.
        """
        if not self.interpret:
            instructions.hold(x, never)

    def hold_rows(self, x: Array, never: Array) -> None:
        """The same of one number a row."""
        if not self.interpret:
            instructions.hold_rows(x, never)

    def load(self, ref: Ref, layout: Any) -> Array:
        """What shared memory holds, in this register layout."""
        return ref[...] if self.interpret else plgpu.load(ref, layout=layout)

    def multiply_add(self, x: Array, y: Array, z: Array) -> Array:
        """x y + z, float32 numbers of rows, rounded once."""
        return x * y + z if self.interpret else assembly.multiply_add(x, y, z)

    def banded(
        self, x: Array, ahead: Array, lower: int | None, upper: int | None, none: float
    ) -> Array:
        """x (64, columns), `none` where row + ahead - column is under lower or over upper."""
        if not self.interpret:
            return assembly.banded(x, ahead, lower, upper, none)
        row, column = (lax.broadcasted_iota(jnp.int32, x.shape, i) for i in range(2))
        if upper is not None:
            x = jnp.where(row + ahead - column <= upper, x, none)
        if lower is not None:
            x = jnp.where(row + ahead - column >= lower, x, none)
        return x

    def hidden_by_band(self, x: Array, ahead: Array, lower: int | None, upper: int | None) -> Array:
        """x (64, columns) of exponents, so low that their powers are 0 where `banded` has `none`.

        Where some are under `lower` no other may be over `upper`.
        """
        # Over upper: 2^99 (2 upper + 1 - 2 (row + ahead - column)); under lower its negative.
        bounds = [0 if end is None else 2 * end + more for end, more in ((upper, 1), (lower, -1))]
        bound, side = jnp.int32(bounds[lower is not None]), jnp.float32(2.0**99)
        if lower is not None and upper is not None:
            over = ahead > np.int32(upper + 1 - x.shape[0])
            bound = jnp.where(over, *map(np.int32, bounds))
            side = jnp.where(over, side, -side)
        elif lower is not None:
            side = -side
        ahead = bound - 2 * ahead
        if not self.interpret:
            return assembly.at_most(x, ahead, side)
        row, column = (lax.broadcasted_iota(jnp.int32, x.shape, i) for i in range(2))
        most = side * (ahead - 2 * (row - column)).astype(jnp.float32)
        return jnp.fmin(x, most)  # of a number and none the number, as the instruction

    def zero_below(self, x: Array, bits: Array, limit: int) -> Array:
        """x, float32, with zeros where `bits`, uint32, are below the limit."""
        if self.interpret:
            return jnp.where(bits < jnp.uint32(limit), 0.0, x)
        return assembly.zero_below(x, bits, limit)

    def mask_of(self, bits: Array, first: int, dtype: Any) -> Array:
        """For `masked`: what is 0 where the upper half of `bits`, uint32, is in first .. 0xFC00."""
        if self.interpret:
            half = bits >> 16
            return jnp.where((half >= first) & (half <= 0xFC00), 0, 1).astype(dtype)
        return assembly.mask_of(bits, first, dtype)

    def made_before(self, mask: Array, never: Array) -> None:
        """No wait for a product that follows is moved before the making of the mask.

        never: a zero that the compiler cannot know.
        """
        if not self.interpret:
            assembly.made_before(mask, never)

    def masked(self, x: Array, mask: Array) -> Array:
        """x, of two bytes or float32, with zeros where `mask_of` says so."""
        if self.interpret:
            return jnp.where(mask == 0, jnp.zeros((), x.dtype), x)
        return assembly.masked(x, mask)

    def widened(self, x: Array) -> Array:
        """x in wgmma's layout, as float32."""
        if self.interpret or x.dtype != jnp.bfloat16:
            return x.astype(jnp.float32)
        return assembly.widened(x)

    def load_gmem(self, ref: Ref, layout: Any) -> Array:
        """What global memory holds, in this register layout."""
        if self.interpret:
            return ref[...]  # type: ignore[no-any-return]
        return plgpu.load(ref, layout=layout, optimized=False)

    def layout(self, x: Array, layout: Any) -> Array:
        """The array in this register layout."""
        return x if self.interpret else plgpu.layout_cast(x, layout)


def matrix(dtype: Any, *shape: int, swizzle: int | None = None) -> Any:
    """A matrix in shared memory, or several; the last axis is of columns of an array."""
    return plgpu.SMEM(shape, dtype, transforms=transforms(shape[-1], dtype, swizzle))


def ring(slots: int, arrivals: int) -> Any:
    """A barrier for each slot of a ring."""
    return plgpu.Barrier(num_arrivals=arrivals, num_barriers=slots)


def transforms(columns: int, dtype: Any, swizzle: int | None = None) -> tuple[Any, ...]:
    """Tiling and swizzle of a shared-memory matrix that holds this many columns of an array.

    swizzle: its bytes, where they are not to be the most that there can be.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = swizzle or swizzle_of(columns, size)
    tiling = plgpu.TilingTransform((8, swizzle // size))  # type: ignore[abstract]
    return tiling, plgpu.SwizzleTransform(swizzle)  # type: ignore[abstract]


def _own_barriers(warpgroups: int) -> int:
    """The first named barrier that is a kernel's own, behind that of `meet`."""
    # 0 is for all threads, 1 and so on for one warpgroup's, the loading one among them.
    return warpgroups + 3
