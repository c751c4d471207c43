"""Arrays that are committed to a device decide what runs, not the default device alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from jattn.call import target
from tests import formula
from tests.cases import thorough

GPU = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
attend = partial(jattn.dot_product_attention, is_causal=True)


@pytest.fixture
def beside_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine whose default device is a GPU."""
    monkeypatch.setattr(target, "_default_device", lambda: GPU)


def drawn(device: jax.Device | None) -> jax.Array:
    x = np.random.default_rng(3).standard_normal((2, 20, 2, 8)).astype(np.float32)
    return jnp.asarray(x) if device is None else jax.device_put(x, device)


def on_cpu() -> jax.Array:
    return drawn(jax.devices("cpu")[0])


def gradient(x: jax.Array) -> jax.Array:
    return jax.grad(lambda x: jnp.sin(attend(x, x, x)).sum())(x)


CALLS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "call": lambda x: attend(x, x, x),
    "gradient": gradient,
    "vmap": jax.vmap(lambda x: attend(x, x, x)),
    "vmap of gradient": lambda x: jax.vmap(gradient)(x[:, None]),
    "chunks": lambda x: jattn.memory_efficient_attention(x, x, x, query_chunk_size=8),
}


def by_formula(name: str, attention: Any, x: jax.Array) -> jax.Array:
    """The same call by `eager_attention`."""
    if name == "chunks":
        return attention(x, x, x)
    with jattn.attention_backend("eager"):
        return CALLS[name](x)


@pytest.mark.usefixtures("beside_a_gpu")
@pytest.mark.parametrize(
    "name", ["call", "vmap of gradient", *thorough(("gradient",), ("vmap",), ("chunks",))]
)
def test_committed_to_the_cpu(name: str) -> None:
    formula.check(CALLS[name](on_cpu()), partial(by_formula, name), on_cpu())


@pytest.mark.usefixtures("beside_a_gpu")
def test_explain_looks_where_the_arrays_are() -> None:
    x, anywhere = on_cpu(), drawn(None)
    assert jattn.explain(x, x, x).chosen == "memory_efficient"
    assert jattn.explain(anywhere, anywhere, anywhere).target.startswith("NVIDIA H200")
    assert jattn.explain(x, x, x, device="H200").target.startswith("NVIDIA H200")


@pytest.mark.usefixtures("beside_a_gpu")
def test_a_gpu_backend_refuses_what_is_on_the_cpu() -> None:
    x = on_cpu()
    with pytest.raises(jattn.UnsupportedAttentionError, match="the target is cpu"):
        jattn.flash_attention(x, x, x)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_arrays_on_the_cpu_of_a_machine_with_a_gpu_run_there(name: str, dtype: Any) -> None:
    cpu = jax.devices("cpu")[0]
    x = on_cpu().astype(dtype)
    expected = formula.expected(partial(by_formula, name), x)
    for function in (CALLS[name], jax.jit(CALLS[name])):
        found = [function(x)]
        with jax.default_device(cpu):
            found.append(function(x))
        for one in found:
            assert one.devices() == {cpu}
            formula.compare(one, expected)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_arrays_on_the_gpu_still_take_its_kernels(dtype: Any) -> None:
    x = drawn(jax.devices("gpu")[0]).astype(dtype)
    assert jattn.explain(x, x, x).chosen == "flash"
    for function in (CALLS["call"], gradient):
        compiled = jax.jit(function).lower(x).compile()
        assert re.search("custom_call_target=.*(triton|mosaic)", compiled.as_text())
        assert {device.platform for device in compiled(x).devices()} == {"gpu"}
