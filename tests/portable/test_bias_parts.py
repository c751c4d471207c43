"""Rows that share a small bias are given out to several programs, whose sums are added."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jattn.call.arguments import attention_call
from pallas_kernels.portable.bias_parts import MOST_PARTIAL, PROGRAMS, part_count
from pallas_kernels.portable.tiles import bias_tiles
from tests.backends import Backend
from tests.cases import Case, first
from tests.portable.exact import BOTH, check

CASES = [
    Case("bias_in_parts", batch=16, queries=9, keys=13, head_dim=8, bias="1NTS"),
    Case("bias_in_parts_offsets", batch=24, queries=9, keys=13, head_dim=8, bias="11TS",
         causal=True, offset=tuple(range(-4, 20))),
]  # fmt: skip


@pytest.mark.parametrize("backend", first(1, BOTH), ids=str)
@pytest.mark.parametrize("case", first(1, CASES), ids=str)
def test_sums_of_parts_are_as_exact_as_the_formula(case: Case, backend: Backend) -> None:
    assert parts_of(case.batch, case.heads, case.queries, case.head_dim) > 1
    check(backend, case, seed=0)


def parts_of(batch: int, heads: int, length: int, head_dim: int) -> int:
    """Of a bias (1, heads, length, length)."""
    x = jax.ShapeDtypeStruct((batch, length, heads, head_dim), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((1, heads, length, length), jnp.bfloat16)
    specs = []
    jax.eval_shape(lambda x, b: specs.append(attention_call(x, x, x, bias=b).spec), x, bias)
    (spec,) = specs
    return part_count(spec, bias_tiles(spec))


@pytest.mark.parametrize(
    ("batch", "heads", "length", "parts"),
    [(256, 4, 256, 8), (384, 4, 384, 3), (7, 4, 256, 1), (4, 16, 4096, 1), (8, 1, 2048, 1)],
)
def test_parts_fill_the_chip_and_hold_little(
    batch: int, heads: int, length: int, parts: int
) -> None:
    assert parts_of(batch, heads, length, 32) == parts
    assert parts * heads * length**2 * 4 <= MOST_PARTIAL or parts == 1
    assert parts <= PROGRAMS
