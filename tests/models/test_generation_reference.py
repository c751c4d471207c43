"""32 greedy tokens of every checkpoint are those that Transformers chose."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from models.generation import generate
from tests.cases import thorough
from tests.models.reference import NAMES, expected, loaded

FIRST = ("gemma2",)
_EACH = [*FIRST, *thorough(*((name,) for name in NAMES if name not in FIRST))]

pytestmark = pytest.mark.filterwarnings("ignore:prompt and max_new_tokens come to")


def check(name: str, **options: Any) -> None:
    """Two rows of unlike length in one batch, the shorter one padded on the left."""
    tokens, lengths = expected(name)["tokens"], expected(name)["prompts"]
    longest = max(lengths)
    mask = np.arange(longest)[None] >= longest - lengths[:, None]
    rows = np.zeros((2, longest), np.int32)
    for row, length in enumerate(lengths):
        rows[row, longest - length :] = tokens[row, :length]
    with jax.default_matmul_precision("highest"):
        found = generate(
            loaded(name, **options),
            rows,
            attention_mask=mask,
            max_new_tokens=32,
            stop=(),
            prefill_chunk=16,
        )
    np.testing.assert_array_equal(found, expected(name)["greedy"])


@pytest.mark.parametrize("name", _EACH)
def test_greedy_tokens_are_the_reference_s(name: str) -> None:
    check(name)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["sdpa", "flash", "memory_efficient"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_on_a_gpu_are_the_reference_s(name: str, implementation: str) -> None:
    check(name, attn_implementation=implementation)
