"""Ragged sequences of head dim 128, in backward: read and written in place, and exact."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jattn
from jattn.backends.flash import interpreted
from pallas_kernels.hopper.backward_tiles import choose_backward_tiles
from tests.cases import Case
from tests.hopper.calls import SMALL, Bottom, Half, spec_of
from tests.hopper.exact import FLASH, INTERPRETED, check, hopper
from tests.shapes import arguments

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
]  # fmt: skip


def test_one_that_is_always_interpreted_is_in_halves() -> None:
    """By tests/hopper/test_exact.py: ragged, of grouped heads, causal."""
    (case,) = (case for case in SMALL if case.name == "dq_in_fragments")
    assert choose_backward_tiles(spec_of(case), deterministic=False).halves


@pytest.mark.thorough
@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_interpreted_as_exact(case: Case, seed: int) -> None:
    assert choose_backward_tiles(spec_of(case), deterministic=False).halves
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


@pytest.mark.parametrize(("length", "halves"), [(577, True), (12345, False), (1024, False)])
def test_short_ones_alone_are_in_halves(length: int, *, halves: bool) -> None:
    spec = spec_of(Half("", 1, length, length, 16, 16, 128))
    assert choose_backward_tiles(spec, deterministic=False).halves == halves


def test_no_operand_is_padded() -> None:
    """Of what is traced of the gradient; vectors of one number a row are."""
    floats, rest, static = arguments(Half("", 2, 197, 197, 2, 2, 128))

    def gradient(floats: Any) -> Any:
        def total(floats: Any) -> Any:
            with interpreted():
                out = jattn.flash_attention(**floats, **rest, **static)
            return out.astype(jnp.float32).sum()

        return jax.grad(total)(floats)

    text = str(jax.make_jaxpr(gradient)(floats))
    assert re.findall(r"bf16\[[\d,]*\] = pad\[", text) == []
