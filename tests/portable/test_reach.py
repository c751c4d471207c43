"""Masks whose elements 32 bits cannot count: they are read in a copy that is counted with 64."""

from __future__ import annotations

from math import prod

import jax
import jax.numpy as jnp
import pytest

import jattn
from pallas_kernels.portable import reach
from tests.cases import Case, first
from tests.portable.exact import BOTH, check

GIB = 1 << 30
FAR = [(1, 1, 46_341, 46_341), (1, 1, 65_536, 65_536), (4, 16, 8192, 4096), (3, 1, 1, 1 << 30)]
NEAR = [(1, 1, 46_340, 46_340), (1, 1, 65_537, 65_536), (2, 1, 1, 9)]


@pytest.mark.parametrize("shape", [*FAR, *NEAR], ids=str)
def test_what_lies_between_has_more_than_four_gib_and_the_same_rows_of_keys(
    shape: tuple[int, ...],
) -> None:
    found = jax.eval_shape(reach.in_reach, jax.ShapeDtypeStruct(shape, jnp.bool_)).shape
    assert found[:2] + found[3:] == shape[:2] + shape[3:]
    if shape in NEAR:
        assert found == shape
        assert reach.copied_bytes(shape) == 0
    else:  # no more than a query of each head too many
        assert 0 < prod(found) - 4 * GIB <= prod(shape) // shape[2]
        assert reach.copied_bytes(shape) == prod(found)


@pytest.mark.parametrize("backend", first(1, BOTH), ids=str)
def test_the_copy_is_as_good_as_the_mask(monkeypatch: pytest.MonkeyPatch, backend: object) -> None:
    case = Case("mask_far", queries=19, keys=37, mask="1NTS", sinks=True)
    size = prod(case.shape_of("1NTS"))
    monkeypatch.setattr(reach, "SIGNED", size)
    monkeypatch.setattr(reach, "UNSIGNED", 2 * size)
    assert reach.copied_bytes(case.shape_of("1NTS")) > 2 * size
    check(backend, case, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("device", "kernel"), [("H100", "Hopper"), ("A100", "portable")])
def test_no_such_mask_is_refused_and_the_copy_is_counted(device: str, kernel: str) -> None:
    of = jax.ShapeDtypeStruct
    x = of((1, 49_152, 4, 128), jnp.bfloat16)
    mask = of((1, 1, 49_152, 49_152), jnp.bool_)
    explained = jattn.explain(x, x, x, mask=mask, device=device)
    assert explained.chosen == "flash"
    assert kernel in str(explained.kernel)
    (own,) = (report for report in explained.reports if report.name == "flash")
    bits = 49_152**2 // 8  # held once, and of each query's row of dQ 128 float32 numbers
    copies, rows = (4 * GIB, 0) if device == "A100" else (bits, 49_152 * 4 * 128 * 4)
    assert own.gradient_bytes is not None
    assert copies + rows < own.gradient_bytes < 1.01 * (copies + 1.04 * rows)
