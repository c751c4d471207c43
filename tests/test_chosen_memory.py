"""What is chosen unnamed for a bias or mask holds memory linear in T and S for the gradients.

A bias and a mask are given in every form that broadcasts, and are read in place; Hopper's kernels
read a bit for each element of a mask, and add to dQ in float32.
"""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jattn

GPUS = ("A100", "H100", "B200")
FORMS = list(product((False, True), repeat=4))  # which axes of (B, N, T, S) are of size 1
NAMED = [("bias", jnp.float32), ("bias", jnp.bfloat16), ("mask", jnp.bool)]


def explained(
    name: str, dtype: Any, form: tuple[bool, ...], length: int, gpu: str, head_dim: int = 128
) -> tuple[jattn.Explanation, tuple[int, ...]]:
    """What is said of a call with a bias or mask, and this one's shape."""
    query = jax.ShapeDtypeStruct((4, length, 16, head_dim), jnp.bfloat16)
    key = jax.ShapeDtypeStruct((4, length, 4, head_dim), jnp.bfloat16)
    sizes = zip((4, 16, length, length), form, strict=True)
    array = jax.ShapeDtypeStruct(tuple(1 if one else size for size, one in sizes), dtype)
    return jattn.explain(query, key, key, **{name: array}, device=gpu), array.shape


@pytest.mark.parametrize(("gpu", "head_dim"), [*product(GPUS, [128]), ("H100", 256)])
@pytest.mark.parametrize(("name", "dtype"), NAMED)
def test_twice_the_length_takes_twice_the_memory(
    name: str, dtype: Any, gpu: str, head_dim: int
) -> None:
    for form in FORMS:
        held = []
        for length in (2048, 4096):
            found, shape = explained(name, dtype, form, length, gpu, head_dim)
            (runs,) = (report for report in found.reports if report.name == found.chosen)
            assert runs.gradient_bytes is not None
            bits = prod(shape) // 8 if (name, gpu) == ("mask", "H100") else 0
            held.append(runs.gradient_bytes - bits)
        query_gradient = 4 * 2048 * 16 * 128 * 4 if (gpu, head_dim) == ("H100", 128) else 0
        assert held[1] <= 2 * max(held[0], query_gradient + (4 << 20)), form
        # T x S of one head, in 16 bits, is 8 MiB at 2k.
        assert held[0] <= query_gradient + (4 << 20), form


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(("name", "dtype"), NAMED)
def test_cudnn_is_refused_by_the_shape(name: str, dtype: Any, gpu: str) -> None:
    """It writes the gradient of a bias that batch rows share for each of them."""
    for form in FORMS:
        found, shape = explained(name, dtype, form, 64, gpu)
        (cudnn,) = (report for report in found.reports if report.name == "cudnn")
        assert any(f"{name} {shape}" in reason for reason in cudnn.refusals), form
