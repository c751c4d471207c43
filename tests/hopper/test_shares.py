"""A tile's work shared by thread blocks, and dQ written by the only one that sees its keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.backends.flash import hopper_gradient_bytes
from jattn.call.spec import Operands
from jattn.call.target import Target
from pallas_kernels.hopper import backward
from pallas_kernels.hopper.backward_block import grid_of, key_gradients, share_at
from pallas_kernels.hopper.backward_sums import row_of_sums
from pallas_kernels.hopper.backward_tiles import choose_backward_tiles
from pallas_kernels.hopper.shares import WHOLE, Shares, choose_shares
from pallas_kernels.hopper.visits import visits
from tests.cases import Case, chosen, first
from tests.hopper.calls import Half, spec_of
from tests.hopper.exact import FLASH, INTERPRETED, check, hopper
from tests.shapes import arguments

__all__ = ["hopper"]

H100 = Target("gpu", "NVIDIA H100", (9, 0))
# Sizes that fit no tile, each with the shares that it is computed in.
SHARED = {
    Half("one_key_head", 2, 70, 150, 2, 1, 64, causal=True): Shares(2),
    Half("window", 2, 300, 140, 2, 1, 64, window=(70, 20)): Shares(2, 3),
    Half("lengths", 2, 300, 270, 1, 1, 72, query_lengths=(290, 70), key_lengths=(0, 200)): Shares(
        1, 3
    ),
    Half("packed", 1, 300, 200, 2, 2, 40, segments="sorted", causal=True): Shares(1, 2),
    Half("soft_cap_sinks", 1, 130, 150, 4, 2, 64, sinks=True, soft_cap=5.0): Shares(2, 2),
    Half("wide", 1, 70, 150, 4, 1, 192, 128, causal=True): Shares(4),
    Half("a_head_a_share", 1, 300, 300, 3, 1, 128, causal=True): Shares(3),
    Half("window_of_heads", 2, 300, 300, 4, 2, 128, window=(150, 0)): Shares(2),
}  # fmt: skip
# Keys of one tile. What no query or no key of a block sees must be zero all the same.
ONE_TILE = [
    Half("text", 1, 300, 77, 2, 2, 64),
    Half("text_one_key_head", 1, 150, 128, 2, 1, 128, causal=True),
    Half("text_no_keys", 2, 130, 77, 1, 1, 64, query_lengths=(70, 130), key_lengths=(0, 60)),
    Half("text_window", 1, 300, 77, 1, 1, 64, window=(20, 30)),
    Half("text_lengths", 2, 140, 77, 1, 1, 64, query_lengths=(140, 0), key_lengths=(70, 77)),
    Half("offsets", 2, 150, 100, 1, 1, 64, 96, causal=True, offset=(-170, 60)),
    Half("text_packed", 1, 200, 100, 1, 1, 64, segments="unsorted"),
    Case("float16", 1, 70, 5, 2, 2, 40, dtype="float16", scale=-0.2),
]


@pytest.fixture
def sharing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Shares], None]:
    """Has backward computed in these shares, whatever would be chosen.

    In a ring of sums, where it may be one: of one tile, or of a head's.
    """

    def force(shares: Shares) -> None:
        def forced(spec: Any, **options: bool) -> Any:
            tiles = choose_backward_tiles(spec, **options)
            adds = not options["deterministic"]
            tiles = replace(tiles, shares=shares, adds=adds, places=0, listed=0)
            if not adds or shares.heads == 1 or shares.queries > 1:
                return tiles
            in_turn = {"tiles_outer": False, "tiles_first": spec.band.lower is not None}
            rows = spec.batch if spec.kv_heads == 1 else 1  # side by side
            together = 0 if in_turn["tiles_first"] else shares.heads * rows
            places = -(-spec.keys // tiles.keys) if in_turn["tiles_first"] else 1
            return replace(tiles, **in_turn, heads_together=together, places=places)

        monkeypatch.setattr(backward, "choose_backward_tiles", forced)

    return force


@pytest.mark.parametrize("case", chosen(list(SHARED), "one_key_head"), ids=str)
def test_shares_are_as_exact_as_the_whole(
    case: Case, sharing: Callable[[Shares], None], seed: int
) -> None:
    sharing(SHARED[case])
    check(INTERPRETED, case, seed)


@pytest.mark.thorough
def test_deterministic_shares_are_as_exact(sharing: Callable[[Shares], None], seed: int) -> None:
    sharing(Shares(2, 2))
    with jattn.deterministic_gradients():
        check(INTERPRETED, Half("", 1, 140, 150, 2, 1, 64, causal=True), seed)


@pytest.mark.parametrize("case", chosen(ONE_TILE, "text_lengths"), ids=str)
def test_gradients_of_few_keys_are_as_exact(case: Case, seed: int) -> None:
    assert choose_backward_tiles(spec_of(case), deterministic=False).once
    check(INTERPRETED, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", [*SHARED, *ONE_TILE], ids=str)
def test_on_a_gpu_as_exact(case: Case, sharing: Callable[[Shares], None], seed: int) -> None:
    if case in SHARED:
        sharing(SHARED[case])
    check(FLASH, case, seed)


@pytest.mark.parametrize("case", first(3, [*SHARED, *ONE_TILE]), ids=str)
def test_parts_of_the_visits_are_the_visits(case: Case) -> None:
    """Each block once, and masked where it is masked in the whole."""
    spec, tables = spec_of(case), {}
    for parts in (1, 3, 5):
        options = {"queries": 64, "keys": 128, "parts": parts}
        found = np.asarray(visits(spec, _operands(case), **options))
        tables[parts] = found.reshape(found.shape[0], parts, -1, found.shape[2])
    for parts in (3, 5):
        for of in np.ndindex(tables[1].shape[0], tables[1].shape[2]):
            row, tile = of
            one = _blocks(tables[1][row, 0, tile])
            together = [x for part in range(parts) for x in _blocks(tables[parts][row, part, tile])]
            assert together == one


def _blocks(visit: Any) -> list[tuple[int, bool]]:
    """(block, whether it needs no mask) of each visit."""
    start, count, clear_from, clear_to = map(int, visit[:4])
    return [(start + i, clear_from <= i < clear_to) for i in range(count)]


def _operands(case: Case) -> Operands:
    _, rest, _ = arguments(case)
    rng = np.random.default_rng(0)
    made = {
        name: jnp.asarray(np.sort(rng.integers(0, 5, x.shape), axis=-1), jnp.int32)
        for name, x in rest.items()
    }
    empty = jnp.zeros(())
    return Operands(
        query=empty,
        key=empty,
        value=empty,
        query_lengths=None if not case.query_lengths else jnp.asarray(case.query_lengths),
        key_lengths=None if not case.key_lengths else jnp.asarray(case.key_lengths),
        query_offset=None if not isinstance(case.offset, tuple) else jnp.asarray(case.offset),
        query_segments=made.get("query_segment_ids"),
        key_segments=made.get("key_value_segment_ids"),
    )


def shares_of(case: Case) -> Shares:
    return choose_backward_tiles(spec_of(case), deterministic=False).shares


def test_few_tiles_are_shared_and_many_are_not() -> None:
    one_key_head = Half("", 2, 4096, 4096, 32, 1, 128, causal=True)
    assert shares_of(one_key_head) == Shares(16)
    assert choose_backward_tiles(spec_of(one_key_head), deterministic=True).shares == Shares(32)
    full = spec_of(replace(one_key_head, causal=False))
    assert not choose_backward_tiles(full, deterministic=True).adds
    assert shares_of(replace(one_key_head, head_dim=256)).heads >= 2
    grouped = Half("", 2, 8192, 8192, 32, 8, 128, causal=True)
    assert shares_of(grouped) == Shares(2)
    assert shares_of(replace(grouped, window=(4095, 0))) == Shares(4)
    assert shares_of(replace(grouped, window=(1023, 0))) == WHOLE
    assert shares_of(replace(grouped, causal=False)) == WHOLE
    assert shares_of(replace(grouped, heads=56)) == Shares(7)
    assert shares_of(replace(grouped, heads=24)) == Shares(3)
    assert shares_of(replace(grouped, heads=24, queries=4096, keys=4096)) == WHOLE
    assert shares_of(replace(grouped, heads=16)) == WHOLE
    short = replace(grouped, batch=4, queries=2048, keys=2048)
    for batch in (4, 1):
        spec = spec_of(replace(short, batch=batch))
        assert choose_backward_tiles(spec, deterministic=False).adds == (batch == 4)
    assert shares_of(replace(grouped, queries=12345, keys=12345)) == Shares(2)
    assert shares_of(replace(grouped, queries=10000, keys=10000)).heads >= 2
    assert shares_of(Half("", 8, 4096, 77, 10, 10, 64)).queries > 1
    assert shares_of(Half("", 1, 128, 128, 8, 8, 64)) == WHOLE


def test_no_more_shares_are_added_than_a_word_counts() -> None:
    for window, deterministic in product((None, (4095, 0)), (False, True)):
        case = Half("", 1, 8192, 8192, 32_768, 1, 128, causal=True, window=window)
        assert not choose_backward_tiles(spec_of(case), deterministic=deterministic).adds
        less = replace(case, heads=32)
        assert choose_backward_tiles(spec_of(less), deterministic=deterministic).adds


LAUNCHED = [
    Half("grouped", 2, 8192, 8192, 32, 8, 128, causal=True),
    Half("grouped_long", 1, 32768, 32768, 8, 2, 128, causal=True),
    Half("two_key_heads_together", 4, 4096, 4096, 32, 8, 128, causal=True),
    Half("of_six", 2, 8192, 8192, 48, 8, 128, causal=True),
    Half("of_seven", 1, 16384, 16384, 28, 4, 128, causal=True),
    Half("large_groups", 1, 16384, 16384, 32, 4, 128, causal=True),
    Half("window", 1, 16384, 16384, 32, 8, 128, causal=True, window=(4095, 0)),
    Half("long_window", 2, 40960, 40960, 8, 2, 128, causal=True, window=(4095, 0)),
]
TWO_ROWS = Half("two_rows_together", 4, 4096, 4096, 12, 2, 128, causal=True)


@pytest.mark.parametrize(
    ("case", "deterministic"),
    [*((case, same) for case in LAUNCHED for same in (False, True)), (TWO_ROWS, False)],
    ids=str,
)
def test_sums_lie_where_those_of_a_tile_that_was_launched_before_were(
    case: Case, *, deterministic: bool
) -> None:
    spec = spec_of(case)
    tiles = choose_backward_tiles(spec, deterministic=deterministic)
    sizes = dict(grid_of(spec, tiles).axes)
    at = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
    place = {name: jnp.asarray(x, jnp.int32) for name, x in zip(sizes, at, strict=True)}
    batch, tile, head, _ = share_at(spec, tiles, place)
    if tiles.upward:
        tile = sizes["tile"] - 1 - tile
    number = np.asarray(row_of_sums(spec, tiles, batch, head, tile * tiles.keys))
    _, first = np.unique(number, return_index=True)
    last = len(number) - 1 - np.unique(number[::-1], return_index=True)[1]
    assert 0 < tiles.places < len(first)
    assert len(number) == tiles.shares.count * len(first)
    assert np.all(last[: -tiles.places] < first[tiles.places :])


def test_gradients_that_are_added_are_as_wide_as_their_operands() -> None:
    spec = spec_of(Half("", 1, 8192, 8192, 16, 2, 72, 88, causal=True))
    tiles = choose_backward_tiles(spec, deterministic=False)
    assert tiles.adds
    assert tiles.pieces
    inputs = {
        name: jax.ShapeDtypeStruct((1, 8192, 2, columns), spec.dtype)
        for name, columns in (("k", 72), ("v", 88))
    }
    found = key_gradients(spec, tiles, inputs)  # type: ignore[arg-type]
    assert [x.shape for x in found] == [x.shape for x in inputs.values()]


def test_sums_are_no_more_of_a_longer_call() -> None:
    def beside_dq(length: int) -> int:
        case = Half("", 1, length, length, 32, 8, 128, causal=True)
        shared = hopper_gradient_bytes(spec_of(case), H100)
        return shared - hopper_gradient_bytes(spec_of(replace(case, kv_heads=32)), H100)

    assert beside_dq(16384) == beside_dq(131072) == 128 * 128 * 2 * 128 * 4


def test_shares_are_never_more_than_there_is_to_share() -> None:
    visits_of = np.array([3, 1, 0])
    found = choose_shares(
        visits_of, 1, 6, visit_operations=1e9, output_bytes=1.0, splits_queries=True
    )
    assert 6 % found.heads == 0
    assert found.queries == 1
    nothing = choose_shares(
        visits_of[:0], 1, 1, visit_operations=1.0, output_bytes=1.0, splits_queries=True
    )
    assert nothing == WHOLE


def test_explained_memory_has_no_float32_where_one_tile_sees_all_keys() -> None:
    def memory(keys: int) -> int:
        spec = spec_of(Half("", 1, 512, keys, 2, 2, 64))
        return hopper_gradient_bytes(spec, H100)

    assert memory(136) - memory(128) == 512 * 2 * 64 * 4
