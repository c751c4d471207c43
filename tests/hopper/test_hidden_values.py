"""The largest values where nothing sees them: dO Vᵀ is infinite or NaN there, and changes nothing.

P is 0 of such a key, but 0 times infinity is not.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests import reference, tolerance
from tests.backends import EAGER, Backend, quick_jit
from tests.cases import thorough
from tests.hopper.exact import FLASH, INTERPRETED, hopper

__all__ = ["hopper"]

QUERIES, KEYS = 70, 150
LAST_SEEN = 100  # by segments
IDS: dict[str, Any] = {
    "query_segment_ids": np.zeros((1, QUERIES), np.int32),
    "key_value_segment_ids": (np.arange(KEYS)[None] > LAST_SEEN).astype(np.int32),
}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "causal": ({"is_causal": True}, {"causal": True}),
    "window": ({"local_window_size": (3, 20)}, {"window": (3, 20)}),
    "segments": (
        IDS,
        dict(zip(("query_segments", "key_segments"), IDS.values(), strict=True)),
    ),
}
# One kernel; dQ by one of its own; that of wide heads.
KINDS = {"narrow": (64, False), "deterministic": (64, True), "wide": (136, False)}


def check(backend: Backend, way: str, kind: str) -> None:
    options, as_mask = WAYS[way]
    head_dim, deterministic = KINDS[kind]
    seen = reference.visible(1, QUERIES, KEYS, **as_mask)
    rng = np.random.default_rng(3)

    def normal(rows: int) -> Any:
        return rng.standard_normal((1, rows, 1, head_dim)).astype(jnp.bfloat16)

    q, k, v, d_out = normal(QUERIES), normal(KEYS), normal(KEYS), normal(QUERIES)
    hidden = ~seen[0, 0].any(axis=0)
    assert hidden.sum() >= 40
    v[:, hidden] = np.copysign(float(jnp.finfo(jnp.bfloat16).max), v[:, hidden])

    def gradients(backend: Backend) -> dict[str, Any]:
        def run(*arrays: jax.Array) -> dict[str, Any]:
            out, vjp = jax.vjp(lambda *x: backend(*x, **options), *arrays)
            return {"out": out, **dict(zip("qkv", vjp(jnp.asarray(d_out)), strict=True))}

        run = run if backend is INTERPRETED else quick_jit(run)
        return run(*map(jnp.asarray, (q, k, v)))

    with jattn.deterministic_gradients() if deterministic else nullcontext():
        found = gradients(backend)
    expected = reference.attention(q, k, v, seen=seen)
    zero = np.zeros((1, QUERIES, 1))
    exact = {"out": expected.out, **expected.gradients(d_out, zero)}
    magnitudes = expected.magnitudes(d_out, zero)
    for name, got in found.items():
        peer = partial(lambda name: gradients(EAGER)[name], name)
        tolerance.check_against_peer(name, got, peer, exact[name], magnitudes[name], jnp.bfloat16)
    for name in "kv":
        assert (np.asarray(found[name])[:, hidden] == 0).all()


@pytest.mark.parametrize(
    ("way", "kind"),
    [
        ("window", "narrow"),
        *thorough(("segments", "deterministic"), ("causal", "wide")),
    ],
)
def test_the_largest_value_stays_hidden_from_interpreted_kernels(way: str, kind: str) -> None:
    check(INTERPRETED, way, kind)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_the_largest_value_stays_hidden(way: str, kind: str) -> None:
    check(FLASH, way, kind)
