"""The plan of a launch: each tile is computed once, work is shared evenly, memory suffices."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.call.spec import AttentionSpec
from pallas_kernels.hopper import (
    backward_kernel,
    backward_queries,
    backward_wide,
    folded_bias,
    forward,
)
from pallas_kernels.hopper import plan as plan_module
from pallas_kernels.hopper.backward_tiles import choose_backward_tiles
from pallas_kernels.hopper.copies import backward_width, padded_width
from pallas_kernels.hopper.plan import make_plan
from pallas_kernels.hopper.tiles import Tiles
from tests.cases import Case, thorough
from tests.hopper.calls import Half, spec_of


def test_columns_as_those_of_keys_are_as_large_as_is_said() -> None:
    plan = make_plan(spec_of(Half("", 9, 1000, 1001, 8, 2, 128, bias="1N1S")))
    columns = jax.ShapeDtypeStruct((1, 8, 8 * plan.tiles.keys), jnp.float32)
    made = jax.eval_shape(lambda x: folded_bias.arrays(plan, x), columns)["folded"]
    assert plan.folded_bytes == made.size * made.dtype.itemsize


@pytest.mark.parametrize("length", [1024, 1030, 4096])
def test_each_tile_is_in_one_list(length: int) -> None:
    case = Half("", 16384 // length, length, length, 16, 16, 128, causal=True)
    plan = make_plan(spec_of(case))
    lists = plan.schedule()
    found = np.concatenate([row[1 : 1 + row[0]] for row in lists])
    np.testing.assert_array_equal(np.sort(found), np.arange(plan.works))


def test_causal_lists_are_within_three_per_cent_of_even() -> None:
    plan = make_plan(spec_of(Half("", 4, 4096, 4096, 16, 16, 128, causal=True)))
    together = plan.heads_together
    loads = [
        sum(
            plan.query_tiles - w % (plan.query_tiles * together) // together
            for w in row[1 : 1 + row[0]]
        )
        for row in plan.schedule()
    ]
    assert max(loads) <= 1.03 * np.mean(loads)


@pytest.mark.parametrize("keys", [64, 128])
def test_a_block_of_a_window_needs_the_mask_of_its_end_alone(keys: int) -> None:
    found = set()
    for queries, length, window in product((420, 640), (333, 700), ((90, 0), (300, 0), (400, 80))):
        spec = spec_of(Half("", 1, queries, length, 1, 1, 64, window=window))
        plan = make_plan(spec, Tiles(2, keys, 2, query_slots=2))
        row, key = np.arange(queries)[:, None], np.arange(length)[None]
        cut = {"left": key < row - window[0], "right": key > row + window[1]}
        apart = True
        for tile, ((first, stop), (clear, clear_stop)) in enumerate(plan.ranges()):
            rows = slice(tile * plan.queries, (tile + 1) * plan.queries)
            middle = clear if clear < clear_stop else first
            apart &= not cut["left"][rows, middle * keys : stop * keys].any()
            apart &= not cut["right"][rows, first * keys : middle * keys].any()
        assert plan.ends_apart == apart
        found.add(apart)
    assert found == {True, False}


def test_what_tiles_visit_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    worked_out = Counter[tuple[int, ...]]()
    key_blocks = plan_module.key_blocks

    def counted(intervals: Any, *ends: int) -> Any:
        worked_out[ends] += 1
        return key_blocks(intervals, *ends)

    monkeypatch.setattr(plan_module, "key_blocks", counted)
    for _ in range(2):
        plan = make_plan(spec_of(Half("", 8, 4997, 4997, 2, 2, 128, window=(700, 30))))
        assert plan.ends_apart
        assert plan.masked_later
    assert len(worked_out) > 1
    assert set(worked_out.values()) == {1}


def test_few_tiles_are_lower_where_the_last_one_then_ends_before() -> None:
    def rows(length: int, heads: int, head_dim: int = 64, **mask: Any) -> int:
        case = Half("", 1, length, length, heads, heads, head_dim, **mask)
        return make_plan(spec_of(case), multiprocessors=132).rows

    for length in (640, 768, 1024):
        assert rows(length, 16, causal=True) == rows(length, 16, 128, causal=True) == 64
    assert rows(768, 32, causal=True) == rows(1024, 32, causal=True) == 128
    assert rows(768, 16) == 128  # all as long: two rounds of lower ones
    assert rows(4096, 32) == rows(16384, 32, window=(2047, 0)) == 192
    assert rows(16384, 32, window=(1023, 0)) == 128


def test_few_queries_split_the_keys_and_share_a_tile() -> None:
    plan = make_plan(spec_of(Half("", 1, 1, 8192, 32, 8, 128)))
    assert plan.pack == 4
    assert plan.works == 8 * plan.splits
    assert 100 <= plan.works <= 132


SHARED_MEMORY = 227 << 10  # bytes a thread block may have, of the 228 KiB of a multiprocessor


def shared_bytes(scratch: dict[str, Any]) -> int:
    """What scratch takes: matrices and vectors from one kibibyte's start to another's, barriers."""
    arrays = [x for x in scratch.values() if hasattr(x, "dtype") and hasattr(x, "shape")]
    barriers = [x for x in scratch.values() if hasattr(x, "num_barriers")]
    assert len(arrays) + len(barriers) == len(scratch)
    sizes = [prod(x.shape) * np.dtype(x.dtype).itemsize for x in arrays]
    return sum(-(-size // 1024) * 1024 for size in sizes) + 8 * sum(
        int(np.prod(x.num_barriers)) for x in barriers
    )


# Few tiles, which are shared out, and so many that to choose shares takes no time.
@pytest.mark.parametrize("segments", [None, "sorted"])
@pytest.mark.parametrize(("batch", "queries"), [(2, 5), (64, 2048), *thorough((2, 100), (2, 2048))])
def test_every_pair_of_head_dims_fits_shared_memory(
    batch: int, queries: int, segments: str | None
) -> None:
    def spec_with(head: int, value: int) -> AttentionSpec:
        sizes = batch, queries, queries, 12, 3, head, value
        return spec_of(Case("", *sizes, "bfloat16", causal=True, segments=segments))

    spec = spec_with(64, 64)
    for head, value in product(range(8, 257, 8), repeat=2):
        # To trace a call of each pair would take most of the time.
        each = replace(spec, head_dim=head, value_dim=value, scale=head**-0.5)
        found = {name: shared_bytes(x) for name, x in every_scratch(each).items()}
        assert max(found.values()) <= SHARED_MEMORY, (head, value, found)
    assert each == spec_with(256, 256)


def every_scratch(spec: AttentionSpec) -> dict[str, dict[str, Any]]:
    """That of each kernel of the call, forward and backward."""
    plan = make_plan(spec)
    out_dtype = np.float32 if plan.in_parts else spec.dtype
    found = {"forward": forward._scratch(plan, out_dtype, padded_width(spec.value_dim))}
    for deterministic in (False, True):
        tiles = choose_backward_tiles(spec, deterministic=deterministic)
        dims = [backward_width(dim) for dim in (spec.head_dim, spec.value_dim)]
        if tiles.warpgroups == 1:
            found["wide"] = backward_wide._scratch(spec, tiles, *dims)
        else:
            narrow = backward_kernel._scratch(spec, tiles, *dims, makes_dq=not tiles.apart)
            found[f"narrow {deterministic}"] = narrow
        if tiles.apart:
            query_tiles = backward_queries.choose_query_tiles(spec, *dims)
            its_plan = backward_queries.plan_of(spec, query_tiles)
            found["queries"] = backward_queries._scratch(its_plan, query_tiles, *dims)
    return found


@pytest.mark.parametrize(
    ("keys", "head_dim", "found"),
    [
        (77, 64, 80), (197, 64, 112), (257, 128, 96), (577, 128, 128), (1000, 128, 128),
        (1000, 96, 144),
        (1024, 128, 128), (4096, 128, 128), (16384, 128, 176), (16384, 64, 128),
        (1024, 176, 96), (4096, 192, 112), (4096, 224, 96), (1024, 256, 80),
    ],
)  # fmt: skip
def test_blocks_of_a_full_call_have_as_many_keys_as_are_visited_soonest(
    keys: int, head_dim: int, found: int
) -> None:
    assert make_plan(spec_of(Half("", 16, 1024, keys, 16, 16, head_dim))).tiles.keys == found


def test_keys_are_split_where_that_saves_more_than_it_costs() -> None:
    def splits(queries: int, keys: int, heads: int, kv_heads: int) -> int:
        return make_plan(
            spec_of(Case("", 1, queries, keys, heads, kv_heads, 64, 64, "bfloat16"))
        ).splits

    assert splits(512, 512, 8, 8) == 1
    assert splits(1, 128, 32, 8) == 1
    assert splits(1, 512, 32, 8) > 1
    assert splits(1, 32768, 32, 8) > splits(1, 512, 32, 8)


def test_few_queries_leave_few_multiprocessors_idle_whatever_the_batch() -> None:
    for batch in range(1, 41):
        plan = make_plan(spec_of(Half("", batch, 1, 32768, 32, 8, 128)), multiprocessors=132)
        busy = plan.blocks if plan.share else plan.works
        rounds = -(-busy // 132)
        assert busy / (132 * rounds) > 0.6
        # One whose last round is nearly full holds less of the keys at a time.
        assert plan.tiles.keys == (64 if busy / 132 - rounds + 1 >= 0.8 else 128)
        assert plan.tiles.stages == 2


def test_keys_are_split_whatever_their_number() -> None:
    def splits(batch: int, keys: int, head_dim: int = 128) -> int:
        return make_plan(spec_of(Half("", batch, 1, keys, 32, 8, head_dim))).splits

    for batch in (1, 5, 12, 17):
        assert splits(batch, 32767) == splits(batch, 32768) > 1
        assert splits(batch, 32768, 72) == splits(batch, 32768, 80) > 1


def test_few_queries_in_a_window_are_not_split_for_keys_that_they_do_not_see() -> None:
    def splits(window: tuple[int, int] | None) -> int:
        mask: dict[str, Any] = {"causal": True, "alignment": "bottom_right", "window": window}
        return make_plan(spec_of(Half("", 1, 1, 32768, 32, 8, 128, **mask))).splits

    assert splits((511, 0)) < splits((2047, 0)) == splits(None) == 16
