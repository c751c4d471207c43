"""The Hopper kernels' dropout, interpreted on a CPU: bit for bit the mask of all backends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jattn.call.arguments import attention_call
from jattn.call.row_arrays import BackwardRows
from jattn.call.spec import AttentionSpec, Operands
from pallas_kernels.hopper.backward import backward
from pallas_kernels.hopper.forward import forward
from tests.backends import keep_mask
from tests.cases import first
from tests.hopper.calls import Half
from tests.hopper.exact import FLASH, INTERPRETED, check, hopper
from tests.reference import Bools

__all__ = ["hopper"]

thorough = pytest.mark.thorough
B, N = 2, 2


def traced(queries: int, keys: int, rate: float, *, shared: bool) -> tuple[AttentionSpec, Operands]:
    """A call with even weights whose keys and values name themselves: both are unit vectors."""
    names = jnp.broadcast_to(jnp.eye(keys, dtype=jnp.bfloat16)[None, :, None], (B, keys, N, keys))
    query = jnp.zeros((B, queries, N, keys), jnp.bfloat16)
    call = attention_call(
        query, names, names, dropout_rate=rate, dropout_rng=jax.random.key(7),
        broadcast_dropout=shared,
    )  # fmt: skip
    return call.spec, call.operands


def masks(
    spec: AttentionSpec, operands: Operands, *, deterministic: bool = False, interpret: bool = True
) -> dict[str, Bools]:
    """The mask (B, N, T, S) that forward, dV and dQ show."""
    out, top, rest = forward(spec, operands, interpret=interpret)
    queries, keys = spec.queries, spec.keys
    of_queries = jnp.eye(queries, keys, dtype=spec.dtype)[None, :, None]
    d_out = jnp.broadcast_to(of_queries, (B, queries, N, keys))
    found = {"forward": np.asarray(out).transpose(0, 2, 1, 3) > 0}
    # Each query's gradient is its own unit vector: dV names the queries of a key. All values alike,
    # dQ is the weights that stay.
    alike = operands._replace(value=jnp.ones_like(operands.value))
    rows = BackwardRows(top, rest, jnp.zeros_like(top), d_out)
    dq, _, dv = backward(spec, alike, rows, deterministic=deterministic, interpret=interpret)
    found["dv"] = np.asarray(dv)[..., :queries].transpose(0, 2, 3, 1) > 0
    found["dq"] = np.asarray(dq).transpose(0, 2, 1, 3) > 0
    return found


def check_masks(found: dict[str, Bools], expected: Bools) -> None:
    assert 0.4 < expected.mean() < 0.95
    for name, mask in found.items():
        np.testing.assert_array_equal(mask, expected, name)


def parts(spec: AttentionSpec, operands: Operands, start: tuple[int, int], kind: Any) -> Any:
    return replace(spec, dropout_from=kind), operands._replace(
        dropout_start=jnp.array(start, jnp.int32)
    )


SIZES = first(1, [(72, 128), (40, 144), (128, 128), (64, 64), (1, 64)])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_interpreted_the_mask_is_that_of_eager(sizes: tuple[int, int]) -> None:
    rate = 0.1 if sizes[1] == 64 else 0.4
    expected = keep_mask(rate, B, N, *sizes)
    check_masks(masks(*traced(*sizes, rate, shared=False)), expected)


@thorough
@pytest.mark.parametrize("shared", [False, True])
def test_interpreted_deterministic_gradients_have_the_same_mask(shared: bool) -> None:
    expected = keep_mask(0.4, B, N, 40, 128, shared=shared)
    found = masks(*traced(40, 128, 0.4, shared=shared), deterministic=True)
    check_masks(found, expected)


@thorough
@pytest.mark.parametrize("keys", [64, 144])
def test_interpreted_a_part_of_a_longer_call_has_its_part_of_the_mask(keys: int) -> None:
    start = (5, 13)
    expected = keep_mask(0.4, B, N, 70, 180)[:, :, start[0] :, start[1] :][:, :, :30, :keys]
    call = parts(*traced(30, keys, 0.4, shared=False), start, "anywhere")
    for deterministic in (False, True):
        check_masks(masks(*call, deterministic=deterministic), expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("keys", [64, 128, 256])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_mask_is_that_of_eager(keys: int, deterministic: bool) -> None:
    queries, rate = keys - 3, 0.3
    for shared in (False, True):
        expected = keep_mask(rate, B, N, queries, keys, shared=shared)
        call = traced(queries, keys, rate, shared=shared)
        check_masks(masks(*call, deterministic=deterministic, interpret=False), expected)
        start = (33, 13)
        whole = keep_mask(rate, B, N, queries + 33, keys + 13, shared=shared)
        found = masks(*parts(*call, start, "anywhere"), interpret=False)
        check_masks(found, whole[:, :, 33:, 13:])


Dropped = [
    Half("dropout_segments", 2, 100, 140, 2, 1, 128, dropout=0.2, segments="sorted"),
    Half("dropout_causal", 1, 200, 200, 2, 1, 64, dropout=0.3, causal=True),
    Half("dropout_latent", 1, 70, 150, 2, 1, 192, 128, dropout=0.2, causal=True),
    Half("dropout_soft_cap", 1, 130, 130, 2, 2, 64, sinks=True, soft_cap=5.0, dropout=0.5),
    Half(
        "dropout_split_keys", 2, 5, 300, 4, 1, 64, dropout=0.3, sinks=True, shared_dropout=True,
        key_lengths=(3, 290),
    ),
]  # fmt: skip
WIDTHS = (64, 128)
LARGE = [
    *(Half(f"dropout_{h}", 2, 520, 700, 4, 2, h, dropout=0.1) for h in (40, 64, 128, 256)),
    *(Half(f"dropout_causal_{h}", 2, 900, 900, 4, 2, h, causal=True, dropout=0.3) for h in WIDTHS),
    Half("dropout_many_tiles", 4, 1030, 1030, 8, 8, 128, causal=True, dropout=0.1),
    Half("dropout_few_queries", 2, 5, 3000, 8, 2, 128, dropout=0.5, shared_dropout=True),
    Half("dropout_window", 1, 1000, 1000, 2, 2, 64, window=(200, 70), dropout=0.3),
    Half("dropout_float16", 1, 300, 300, 2, 2, 128, dtype="float16", dropout=0.9),
]  # fmt: skip


@thorough
@pytest.mark.parametrize("case", Dropped, ids=str)
def test_interpreted_as_exact_as_the_formula(case: Any, seed: int) -> None:
    check(INTERPRETED, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", [*Dropped, *LARGE], ids=str)
def test_as_exact_as_the_formula(case: Any, seed: int) -> None:
    check(FLASH, case, seed)
