"""Head dims that are no multiple of 64: exact, and read in place wherever they can be."""

from __future__ import annotations

import pytest

import jattn
from pallas_kernels.hopper.backward_tiles import choose_backward_tiles, dq_columns, dq_swizzle
from pallas_kernels.hopper.piece_widths import piece_columns
from tests.cases import Case, chosen
from tests.hopper.calls import Half, spec_of
from tests.hopper.exact import FLASH, INTERPRETED, check, hopper
from tests.hopper.padding import pads

__all__ = ["hopper"]

# Sizes that fit no tile; dQ's columns shared evenly and not, added and written once.
CASES = [
    Half("ragged", 1, 67, 131, 2, 1, 72, causal=True),
    Half("narrow_lengths", 2, 67, 131, 2, 1, 40, causal=True, key_lengths=(131, 3)),
    Half("even", 1, 130, 200, 1, 1, 80),
    Half("uneven", 1, 70, 150, 1, 1, 96, causal=True),
    Half("most_uneven", 1, 70, 100, 1, 1, 112),
    Half("wider_values", 1, 70, 150, 1, 1, 64, 96, causal=True),
    Half("packed", 2, 131, 131, 1, 1, 80, 104, segments="sorted"),
    Half("one_tile_of_keys", 1, 150, 77, 2, 1, 80, causal=True),
    Half("window", 1, 300, 300, 1, 1, 48, window=(70, 20)),
    Half("wide", 1, 70, 150, 2, 1, 160, causal=True),
    Half("wide_pieces", 2, 9, 131, 4, 1, 176),
    Half("ragged_128", 1, 131, 77, 1, 1, 128),
    Half("ragged_latent", 1, 67, 131, 1, 1, 192, 128),
    Case("float16", 1, 40, 100, 4, 2, 88, dtype="float16", scale=-0.2),
]


@pytest.mark.parametrize("case", chosen(CASES, "ragged"), ids=str)
def test_interpreted_as_exact(case: Case, seed: int) -> None:
    check(INTERPRETED, case, seed)


# Values in pieces of 64 columns or of 32, the last of them filled or not.
VALUES = [
    Half("of_64", 2, 9, 131, 1, 1, 128),
    Half("ragged", 2, 131, 203, 2, 1, 128, causal=True),
    Half("lengths", 2, 67, 261, 1, 1, 128, key_lengths=(131, 3)),
    Half("half_filled", 2, 67, 131, 1, 1, 96),
    Half("ragged_latent", 1, 67, 131, 1, 1, 192, 128),
    Half("latent", 2, 192, 264, 2, 1, 192, 128, causal=True, key_lengths=(264, 200)),
    Half("filled_to_48", 1, 130, 136, 2, 1, 112, causal=True),
    Half("filled_to_16", 2, 67, 203, 2, 1, 80, segments="unsorted"),
    Half("filled_to_8", 1, 67, 136, 1, 1, 136, causal=True),
    Half("three", 1, 67, 136, 1, 1, 176, causal=True),
    Half("of_32", 2, 67, 131, 1, 1, 208, key_lengths=(131, 3)),
    Half("four", 1, 130, 129, 1, 1, 256, window=(70, 20)),
]


@pytest.mark.parametrize("case", chosen(VALUES, "three"), ids=str)
def test_interpreted_with_values_in_pieces(case: Case, seed: int) -> None:
    check(INTERPRETED, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("head_dim", [80, 112, 128, 144, 176, 192, 256])
@pytest.mark.parametrize("length", [2049, 2055, 2176])
def test_values_in_pieces_on_a_gpu(length: int, head_dim: int, seed: int) -> None:
    check(FLASH, Half("", 2, length, length, 2, 1, head_dim, causal=True), seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("head_dim", [24, 32, 40, 48, 56, *range(72, 128, 8)])
@pytest.mark.parametrize("causal", [False, True])
def test_dq_from_registers_on_a_gpu(head_dim: int, seed: int, *, causal: bool) -> None:
    case = Half("", 1, 2049, 2051, 4, 2, head_dim, causal=causal)
    found = choose_backward_tiles(spec_of(case), deterministic=False).in_fragments
    assert found == (head_dim > 64 or not causal)
    check(FLASH, case, seed)


@pytest.mark.thorough
@pytest.mark.parametrize("head_dim", [72, 96])
def test_deterministic_as_exact(head_dim: int, seed: int) -> None:
    with jattn.deterministic_gradients():
        check(INTERPRETED, Half("", 1, 70, 150, 1, 1, head_dim, causal=True), seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_on_a_gpu_as_exact(case: Case, seed: int, *, deterministic: bool) -> None:
    with jattn.deterministic_gradients(deterministic):
        check(FLASH, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("head_dim", range(8, 257, 8))
@pytest.mark.parametrize("length", [200, 331])
def test_every_head_dim_on_a_gpu(head_dim: int, length: int, seed: int) -> None:
    check(FLASH, Half("", 3, length, length, 4, 2, head_dim, causal=True), seed)


@pytest.mark.parametrize("head_dim", [40, 72, 80, 128, 176])
def test_forward_pads_no_operand(head_dim: int) -> None:
    assert pads(Half("", 40, 197, 203, 2, 2, head_dim), gradient=False) == []


@pytest.mark.parametrize("head_dim", [40, 72, 80, 128, 176])
@pytest.mark.parametrize("deterministic", [False, True])
def test_backward_pads_no_operand(head_dim: int, *, deterministic: bool) -> None:
    with jattn.deterministic_gradients(deterministic):
        assert pads(Half("", 2, 197, 203, 2, 2, head_dim), gradient=True) == []


def test_backward_pads_beside_a_mask_and_it_is_seen() -> None:
    assert pads(Half("", 2, 197, 203, 2, 2, 128, mask="11TS"), gradient=True) != []


def test_pieces_hold_all_columns_and_few_more() -> None:
    for columns in range(8, 257, 8):
        found = piece_columns(columns)
        assert set(found) <= {16, 32, 64}
        assert 0 <= sum(found) - columns <= 24, columns
    assert [piece_columns(x) for x in (40, 72, 96, 112)] == [
        (32, 16), (64, 16), (64, 32), (64, 32, 16),
    ]  # fmt: skip


def test_columns_of_dq_are_shared_in_whole_tiles() -> None:
    for columns in range(64, 129, 16):
        tile, shares = dq_swizzle(columns) // 2, dq_columns(columns)
        assert sum(shares) == columns
        assert all(share > 0 and share % tile == 0 for share in shares)
        assert shares[0] - shares[1] in (0, tile)
