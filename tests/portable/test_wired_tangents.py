"""Which calls' tangents are made by the portable kernels, of Hopper's forward too."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.backends.kernels import Kernels, only
from jattn.call.row_arrays import TangentRows
from tests import formula
from tests.backends import quick_jit
from tests.cases import Case
from tests.portable.exact import FLASH, ON_GPU, spec_of
from tests.portable.tangents import arrays_of, attend
from tests.test_transforms import normal


@pytest.mark.parametrize(("head_dim", "by"), [(16, "Pallas, portable"), (160, "XLA")])
def test_explain_says_what_makes_them(head_dim: int, by: str) -> None:
    x = jax.ShapeDtypeStruct((1, 32, 2, head_dim), jnp.float32)
    with only("portable", interpret=not ON_GPU), jattn.attention_backend("flash"):
        (report,) = [r for r in jattn.explain(x, x, x).reports if r.name == "flash"]
    assert report.tangents == by


def test_a_hopper_kernels_log_sum_exp_is_the_portable_ones() -> None:
    """Its maxima are of base 2; those of a row that sees no key and of large logits too."""
    case = Case("units", scale=0.07, dtype="bfloat16")
    spec = spec_of(case)
    hopper = Kernels("hopper", "flash", False, True)
    natural = np.array([-3.5, 0.0, 700.25, 1e6, -np.inf])
    top = jnp.asarray(natural / np.log(2), jnp.float32)
    rest = jnp.linspace(0, 2, 5, dtype=jnp.float32)
    found, more, *_ = hopper._in_portable_unit(spec, TangentRows(top, rest, top, None))
    unit = Kernels("portable", "flash", False, True).unit(spec)
    seen = slice(0, 4)
    expected = np.float64(top[seen]) * np.log(2) + np.float64(rest[seen])
    both = np.float64(found[seen]) * unit + np.float64(more[seen])
    # The units are float32 too, and `more`, which takes up what `found` loses, is rounded.
    eps = float(jnp.finfo(jnp.float32).eps)
    assert (np.abs(both - expected) <= eps * (np.abs(expected) + np.float64(more[seen]))).all()
    assert found[4] == -jnp.inf
    assert more[4] == rest[4]


@pytest.mark.gpu
def test_on_a_gpu_a_hessian_vector_product_runs_no_loop_in_xla() -> None:
    case = Case("wired", 1, 256, 256, 2, 2, 64, dtype="bfloat16", causal=True)
    arrays = arrays_of(case, 0)

    def gradient(arrays: Any) -> Any:
        return jax.grad(
            lambda x: attend(jattn.flash_attention, case, 0, x)[0].astype(jnp.float32).sum()
        )(arrays)

    def lowered() -> str:
        return jax.jit(lambda x: jax.jvp(gradient, (x,), (x,))).lower(arrays).as_text()

    assert "stablehlo.while" not in lowered()
    with only("portable", interpret=False):
        text = lowered()
    assert "stablehlo.while" not in text
    for name in ("key_gradient_tangents", "query_gradient_tangents"):
        assert name in text


@pytest.mark.thorough
def test_a_bias_for_all_may_have_tangents_of_its_own_for_each_mapped_row() -> None:
    rows = [normal(name, 2, 24, 1, 8) for name in ("q", "k", "v")]
    arrays = (*rows, normal("bias", 1, 1, 24, 24), normal("tangents", 3, 1, 1, 24, 24))

    def function(attention: Any, arrays: Any) -> Any:
        q, k, v, bias, tangents = arrays

        def gradient(bias: Any) -> Any:
            def loss(bias: Any) -> Any:
                out = attention(q, k, v, bias, is_causal=True)
                return (out * jnp.cos(out)).sum()

            return jax.grad(loss)(bias)

        return jax.vmap(lambda t: jax.jvp(gradient, (bias,), (t,))[1])(tangents)

    found = quick_jit(lambda arrays: function(FLASH, arrays))(arrays)
    formula.check(found, function, arrays)
