"""Forward of which each half of queries and keys is in an array of its own: as of whole arrays."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jattn.call.halves import Halves, joined
from jattn.call.spec import Operands
from pallas_kernels.hopper.forward import forward, takes_halves
from pallas_kernels.hopper.plan import make_plan
from tests.cases import Case, thorough
from tests.hopper.calls import spec_of


@pytest.mark.parametrize(
    ("queries", "kv_heads", "second", "is_causal", "head_dim"),
    [(256, 2, 0, False, 128), *thorough((512, 1, 1, True, 128), (512, 2, 0, False, 192))],
)
def test_halves_are_read_where_they_are(
    queries: int, kv_heads: int, second: int, is_causal: bool, head_dim: int
) -> None:
    case = Case(
        "halves", queries=queries, keys=queries, heads=2, kv_heads=kv_heads, head_dim=head_dim,
        value_dim=128, dtype="bfloat16", causal=is_causal, segments="sorted" if is_causal else None,
    )  # fmt: skip
    spec = spec_of(case)
    assert takes_halves(spec)
    rng = np.random.default_rng(0)

    def drawn(heads: int, columns: int = head_dim) -> Any:
        return jnp.asarray(rng.standard_normal((2, queries // 2, heads, columns)), jnp.bfloat16)

    # The first query head is 3, the first key head 2.
    heads = jnp.asarray([1, 2, 2, 0] if second else [7, 3, 7, 2], jnp.int32)
    own = Halves(drawn(6), drawn(5), drawn(5, 128), jnp.asarray([second], jnp.int32), heads)
    operands = Operands(drawn(2), drawn(kv_heads), drawn(kv_heads, 128), halves=own)
    if is_causal:
        ids = jnp.sort(jnp.asarray(rng.integers(0, 5, (2, queries)), jnp.int32), axis=1)
        operands = operands._replace(query_segments=ids, key_segments=ids)
    whole = joined(operands)
    parts = [own.query[:, :, 3:5], operands.query]
    assert (whole.query == jnp.concatenate(parts[:: -1 if second else 1], axis=1)).all()
    counted = make_plan(spec, multiprocessors=2) if is_causal else None  # of documents
    assert counted is None or counted.counted
    for found, expected in zip(
        forward(spec, operands, plan=counted, interpret=True),
        forward(spec, whole, interpret=True),
        strict=True,
    ):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
