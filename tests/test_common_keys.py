"""Tangents where all keys of a row have much in common, in two-byte floats: it gives nothing."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests import formula
from tests.backends import quick_jit
from tests.cases import first

CHUNKED = partial(jattn.memory_efficient_attention, query_chunk_size=16, key_chunk_size=64)


def pushed(attention: Any, q: Any, k: Any, v: Any, tq: Any) -> Any:
    def attend(q: Any) -> Any:
        return attention(q, k, v, is_causal=True, causal_alignment="bottom_right")

    return jax.jvp(attend, (q,), (tq,))[1]


@pytest.mark.parametrize("dtype", first(1, ["bfloat16", "float16"]))
def test_rounded_products_cancel(dtype: str, seed: int) -> None:
    """P tS V and mu O, each as large as the keys' mean, would differ by 30 times eager's error."""
    rng = np.random.default_rng([seed, 1])
    q, k, v, tq = (
        rng.standard_normal((1, length, heads, 16))
        for length, heads in ((40, 2), (300, 1), (300, 1), (40, 2))
    )
    arrays = [jnp.asarray(x, dtype) for x in (q / 16, k + 30, v, tq)]
    formula.check(quick_jit(partial(pushed, CHUNKED))(*arrays), pushed, *arrays)
