"""Backward in pieces, where copies in tiles would need padded arrays: exact."""

from __future__ import annotations

import pytest

import jattn
from pallas_kernels.hopper.backward_tiles import choose_backward_tiles
from tests.cases import Case
from tests.hopper.calls import SMALL, Bottom, Half, spec_of
from tests.hopper.exact import FLASH, INTERPRETED, check, hopper

__all__ = ["hopper"]

RAGGED = [
    Half("full", 2, 67, 131, 2, 2, 128),
    Half("grouped", 1, 131, 203, 4, 2, 128, causal=True),
    Half("lengths", 2, 67, 131, 1, 1, 128, query_lengths=(60, 67), key_lengths=(131, 3)),
    Half("packed", 1, 131, 131, 1, 1, 128, segments="sorted", causal=True),
    Half("window", 1, 231, 235, 2, 1, 128, window=(70, 20), sinks=True),
    Half("shared", 1, 333, 203, 4, 1, 128, causal=True),
    Bottom("bottom_right", 1, 65, 201, 1, 1, 128),
    Case("float16", 1, 3, 133, 2, 2, 128, dtype="float16", scale=-0.2),
    Half("soft_cap", 1, 67, 131, 1, 1, 128, soft_cap=5.0, causal=True),
    Half("wide", 1, 131, 203, 4, 2, 256, causal=True),
    Half("wide_lengths", 2, 67, 131, 1, 1, 256, query_lengths=(60, 67), key_lengths=(131, 3)),
    Half("wide_packed", 1, 131, 131, 1, 1, 192, segments="sorted", causal=True),
    Half("wide_values", 1, 67, 150, 1, 1, 64, 192),
    Half("of_32", 1, 131, 203, 2, 1, 96, causal=True),
    Half("of_32_wide", 1, 131, 203, 1, 1, 160, causal=True),
    Half("of_16_not_filled", 2, 136, 200, 1, 1, 72),
    Half("narrower_values", 1, 131, 203, 1, 1, 128, 72),
    Half("one_not_filled", 1, 131, 203, 2, 1, 40, causal=True),
    Half("dropout", 1, 67, 131, 2, 1, 96, dropout=0.2, causal=True),
]  # fmt: skip


@pytest.mark.parametrize("name", ["dq_in_fragments", "latent_window"])
def test_some_that_are_always_interpreted_are_in_pieces(name: str) -> None:
    """By tests/hopper/test_exact.py: ragged, where one kernel makes all three, and where two do."""
    (case,) = (case for case in SMALL if case.name == name)
    assert choose_backward_tiles(spec_of(case), deterministic=False).pieces


@pytest.mark.thorough
@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_interpreted_as_exact(case: Case, seed: int) -> None:
    assert choose_backward_tiles(spec_of(case), deterministic=False).pieces
    check(INTERPRETED, case, seed)


@pytest.mark.thorough
@pytest.mark.parametrize("case", RAGGED[:2], ids=str)
def test_deterministic_interpreted_as_exact(case: Case, seed: int) -> None:
    with jattn.deterministic_gradients(True):
        check(INTERPRETED, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", RAGGED, ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_on_a_gpu_as_exact(case: Case, seed: int, *, deterministic: bool) -> None:
    with jattn.deterministic_gradients(deterministic):
        check(FLASH, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("length", [197, 257, 577, 1001])
def test_lengths_of_vision_on_a_gpu(length: int, seed: int) -> None:
    check(FLASH, Half("", 7, length, length, 5, 5, 128), seed)


@pytest.mark.parametrize(
    ("length", "head_dim", "pieces"),
    [(577, 128, True), (12345, 128, True), (1024, 128, False), (4097, 256, True), (1024, 72, True)],
)
def test_those_that_would_be_padded_are_in_pieces(
    length: int, head_dim: int, *, pieces: bool
) -> None:
    spec = spec_of(Half("", 1, length, length, 16, 16, head_dim))
    for deterministic in (False, True):
        tiles = choose_backward_tiles(spec, deterministic=deterministic)
        assert tiles.pieces == pieces
