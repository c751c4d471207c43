"""Parts of calls whose keys were split are joined in one launch."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from jattn.call.arguments import attention_call
from pallas_kernels.combine import combine
from pallas_kernels.portable.triton import load


class Join(NamedTuple):
    """A call's output, and its parts; more: queries and columns of the parts that it has not."""

    splits: int
    batch: int
    queries: int
    heads: int
    value_dim: int
    sinks: int = 0
    more: tuple[int, int] = (0, 0)


JOINS = [
    Join(16, 1, 1, 32, 128),
    Join(1, 2, 3, 4, 16, sinks=2),
    Join(5, 7, 3, 11, 24, sinks=1, more=(5, 8)),
    Join(77, 1, 2, 3, 200),  # in several turns
]


@pytest.mark.parametrize("join", JOINS, ids=str)
def test_parts_are_joined_as_one_softmax(join: Join, seed: int) -> None:
    splits, batch, queries, heads, dim, sinks, (rows, columns) = join
    rng = np.random.default_rng(seed)
    shape = (splits, batch, queries, heads)
    top = rng.normal(size=shape).astype(np.float32) * 20
    rest = rng.uniform(0, 5, size=shape).astype(np.float32)
    hidden = rng.random(shape) < 0.3
    hidden[:, 0, 0, 0] = True  # a row that sees no key
    top, rest = np.where(hidden, -np.inf, top), np.where(hidden, 0, rest)
    parts = np.full((splits, batch, queries + rows, heads, dim + columns), np.nan, np.float32)
    parts[:, :, :queries, :, :dim] = np.where(hidden[..., None], 0, rng.normal(size=(*shape, dim)))
    sink = rng.normal(size=(sinks, heads)).astype(np.float32) if sinks else None

    q, k, v = (jnp.zeros((batch, n, heads, dim), jnp.float32) for n in (queries, 9, 9))
    found = combine(
        attention_call(q, k, v).spec, jnp.asarray(parts),
        {"top": jnp.asarray(top), "rest": jnp.asarray(rest)}, _ends,
        unit=0.5, sinks=None if sink is None else jnp.asarray(sink), interpret=True,
    )  # fmt: skip
    assert all(np.isfinite(x).all() for x in (found[0], found[2]))

    logits = np.float64(top) * 0.5 + rest
    sums = np.exp(logits)
    total = sums.sum(axis=0)
    divisor = total + (0 if sink is None else np.exp(np.float64(sink))[:, None])
    out = (sums[..., None] * np.float64(parts[:, :, :queries, :, :dim])).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.where(total[..., None] == 0, 0, out / divisor[..., None])
        lse = np.log(total)
    np.testing.assert_allclose(found[0], wanted, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(found[1] * 0.5 + found[2], lse, rtol=1e-6, atol=2e-6)


def _ends(refs: Any, at: Any, there: Any) -> Any:
    return load(refs.top, at, there, -np.inf), load(refs.rest, at, there)
