"""The gradient of a bias that rows or heads share, summed in registers by a kernel of its own."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.call.arguments import attention_call
from pallas_kernels.hopper.sum_tiles import choose_sum_tiles, partial_bytes
from tests.cases import Case, first
from tests.hopper.calls import Half
from tests.hopper.exact import FLASH, INTERPRETED, check, hopper

__all__ = ["hopper"]

Shared = partial(Half, batch=2, queries=136, keys=200, heads=2, kv_heads=1, head_dim=64,
    bias="1NTS")  # fmt: skip
CASES = [
    Shared("shared_causal", queries=72, keys=80, causal=True, bias_dtype="float32"),
    # Several tiles, of which some are all hidden, some clear.
    Shared("shared_tiles", queries=300, keys=530, head_dim=128, causal=True),
    Shared("shared_by_heads", bias="B1TS", bias_dtype="float32", heads=4, kv_heads=2),
    Shared("shared_by_all", batch=3, bias="11TS", segments="sorted"),
    Shared("shared_lengths", query_lengths=(100, 0), key_lengths=(200, 70), causal=True),
    Shared("shared_soft_cap", soft_cap=3.0, sinks=True, window=(30, 20)),
    Shared("shared_offsets", offset=(40, 3), causal=True),
    Shared("shared_ragged", head_dim=96, queries=67, keys=131),
    Shared("shared_query", queries=1),
    Shared("shared_key", keys=1),
    Shared("shared_in_parts", batch=9, queries=70, keys=64),
    # Of so many keys that dQ's float32 sums have room where the bias's gradient will be.
    Shared("shared_lends", keys=530),
    Shared("shared_lends_fragments", queries=250, keys=300, head_dim=128, causal=True,
        bias_dtype="float32"),
    Shared("shared_lends_segments", keys=330, head_dim=64, segments="sorted",
        bias_dtype="float32"),
    Shared("shared_lends_window", queries=250, keys=333, head_dim=96, window=(90, 40),
        bias_dtype="float32"),
    Shared("shared_lends_lengths", queries=250, keys=300, head_dim=128, bias_dtype="float32",
        query_lengths=(100, 0), key_lengths=(300, 70)),
    Shared("shared_float16", dtype="float16", bias_dtype="float16", keys=256),
]  # fmt: skip


@pytest.mark.parametrize("case", first(0, CASES), ids=str)
def test_interpreted_as_exact_as_the_formula(case: Case, seed: int) -> None:
    check(INTERPRETED, case, seed)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_exact_as_the_formula(case: Case, seed: int) -> None:
    check(FLASH, case, seed)


@pytest.mark.parametrize("sizes", [(2, 4096, 16, 128), (512, 512, 16, 64), (256, 256, 4, 64)])
@pytest.mark.parametrize("bias_dtype", ["bfloat16", "float32"])
def test_sums_apart_are_few_and_counted(sizes: tuple[int, ...], bias_dtype: str) -> None:
    batch, length, heads, head_dim = sizes
    x = jax.ShapeDtypeStruct((batch, length, heads, head_dim), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((1, heads, length, length), jnp.dtype(bias_dtype))
    specs = []
    jax.eval_shape(lambda x, b: specs.append(attention_call(x, x, x, bias=b).spec), x, bias)
    (spec,) = specs
    held = partial_bytes(spec)
    parts = choose_sum_tiles(spec).parts
    assert held == (0 if parts == 1 else parts * heads * length * length * 4)
    assert held <= 8 << 20
    assert (parts > 1) == (heads == 4)  # whose tiles are fewer than multiprocessors
    explained = jattn.explain(x, x, x, bias=bias, device="H100")
    (own,) = (report for report in explained.reports if report.name == "flash")
    dq = batch * length * heads * head_dim * 4  # its sums, where the bias's gradient will be or not
    rows = batch * length * heads * 4 * 5
    assert own.gradient_bytes == held + rows + dq
    assert explained.kernel == "Pallas Mosaic GPU, Hopper"


def of_mapped_rows(attend: Any, *, shares: bool) -> None:
    """A bias under vmap, of its own in each mapped row or shared by them, as without vmap."""
    rng = np.random.default_rng(7)
    q, k, v, d_out = (
        jnp.asarray(rng.standard_normal((3, 2, 72, 2, 64)), jnp.bfloat16) for _ in range(4)
    )
    bias = jnp.asarray(rng.standard_normal((1 if shares else 3, 1, 2, 72, 72)), jnp.float32)

    def gradient(bias: Any, q: Any, k: Any, v: Any, d_out: Any) -> Any:
        return jax.vjp(lambda bias: attend(q, k, v, bias=bias), bias)[1](d_out)[0]

    def mapped(bias: Any) -> Any:
        axis = None if shares else 0
        over = jax.vmap(lambda b, *x: attend(*x, bias=b), (axis, 0, 0, 0))
        own = bias[0] if shares else bias
        return jax.vjp(lambda b: over(b, q, k, v), own)[1](d_out)[0]

    found = np.asarray(mapped(bias))
    each = [np.asarray(gradient(bias[0 if shares else i], *(x[i] for x in (q, k, v, d_out))))
            for i in range(3)]  # fmt: skip
    wanted = np.sum(each, axis=0) if shares else np.stack(each)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("shares", [False, True])
def test_rows_of_a_map_are_summed_or_apart(shares: bool) -> None:
    of_mapped_rows(jattn.flash_attention, shares=shares)
