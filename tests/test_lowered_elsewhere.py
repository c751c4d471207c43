"""Calls traced for a GPU, whose program is then lowered for the platform where it runs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

import jattn
from tests import formula
from tests.backends import Backend, quick_jit
from tests.cases import CASES, Case, thorough
from tests.test_large_logits import CASES as LARGE
from tests.test_large_logits import weight_sums
from tests.test_semantics import check_errors, check_what_sees_nothing_is_zero

KERNEL = re.compile(r"custom_call @(?:__gpu\$xla\.gpu\.triton|mosaic_gpu)")
BY_NAME = {case.name: case for case in CASES}


@dataclass(frozen=True)
class For:
    """A function whose calls are traced for a GPU that is not here."""

    gpu: str
    function: Callable[..., Any]

    def __call__(self, *args: Any, **options: Any) -> Any:
        device = AbstractDevice(device_kind=self.gpu, num_cores=None, platform="cuda")
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            return self.function(*args, **options)


HOPPER = Backend("hopper", For("NVIDIA H200", jattn.flash_attention))
FLASH = Backend("portable flash", For("NVIDIA A100", jattn.flash_attention))
CHUNKED = Backend("portable chunked", For("NVIDIA A100", jattn.memory_efficient_attention))


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        (HOPPER, "one_query-float16"),
        (FLASH, "bias_keys-bfloat16"),
        *thorough(
            (FLASH, "everything-bfloat16"),
            (CHUNKED, "everything"),
            (FLASH, "negative_scale"),
            (HOPPER, "window-bfloat16"),
            (HOPPER, "sinks_soft_cap-float16"),
        ),
    ],
    ids=str,
)
def test_run_on_a_cpu_they_are_as_exact(backend: Backend, name: str, seed: int) -> None:
    case: Case = BY_NAME[name]
    check_errors(backend, case, seed)
    check_what_sees_nothing_is_zero(backend, case, seed)


def test_weights_sum_to_1_beside_large_logits() -> None:
    """The rows' maxima are saved in another unit than the loops', where a float32 is another one.

    In steps of 256, by one of which weights would be all or nothing.
    """
    arrays = LARGE["uneven products"](dtype=jnp.bfloat16)
    arrays["query"] = arrays["query"] * (1 + np.arange(64) / 64).astype(jnp.bfloat16)[:, None, None]
    np.testing.assert_allclose(weight_sums(HOPPER, arrays), 1, atol=0.01)


def drawn(seed: int) -> jax.Array:
    x = np.random.default_rng(seed).standard_normal((2, 40, 2, 16))
    return jnp.asarray(x, jnp.bfloat16)


def gradient_on(gpu: str) -> Callable[[jax.Array], jax.Array]:
    attend = For(gpu, partial(jattn.flash_attention, is_causal=True))
    return quick_jit(jax.grad(lambda x: attend(x, x, x).astype(jnp.float32).sum()))


def check_gradient(x: jax.Array, found: jax.Array) -> None:
    def gradient(attention: Callable[..., Any], x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: attention(x, x, x, is_causal=True).sum())(x)

    formula.check(found, gradient, x)


@pytest.mark.parametrize("gpu", ["NVIDIA A100", *thorough(("NVIDIA H200",))])
def test_the_platform_lowered_for_decides(gpu: str, seed: int) -> None:
    traced = gradient_on(gpu).trace(drawn(seed))
    on_cpu, on_gpu = (traced.lower(lowering_platforms=(p,)) for p in ("cpu", "cuda"))
    assert not KERNEL.search(on_cpu.as_text())
    assert len(KERNEL.findall(on_gpu.as_text())) >= 2
    check_gradient(drawn(seed), on_cpu.compile()(drawn(seed)))


def test_exported_for_both(seed: int) -> None:
    x = drawn(seed)
    unchecked = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    made = export.export(
        gradient_on("NVIDIA A100"), platforms=("cpu", "cuda"), disabled_checks=(unchecked,)
    )(x)
    assert KERNEL.search(made.mlir_module())
    check_gradient(x, made.call(x))
