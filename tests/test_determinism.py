"""The switch for bitwise repeatable gradients: what turns it on, and that jit sees it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jattn
from jattn.call.determinism import is_deterministic


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", False),
        ("--xla_gpu_deterministic_ops", True),
        ("--xla_dump_to=/tmp --xla_gpu_deterministic_ops=true", True),
        ("--xla_gpu_deterministic_ops=true --xla_gpu_deterministic_ops=false", False),
    ],
)
def test_xla_flag_decides_outside_the_context(
    monkeypatch: pytest.MonkeyPatch, flags: str, expected: bool
) -> None:
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert is_deterministic() is expected
    with jattn.deterministic_gradients():
        assert is_deterministic()
        with jattn.deterministic_gradients(on=False):
            assert not is_deterministic()
    assert is_deterministic() is expected


def test_jit_compiles_again_where_it_changes() -> None:
    seen = []

    @jax.jit
    def traced(x: jax.Array) -> jax.Array:
        seen.append(is_deterministic())
        return x

    traced(jnp.ones(1))
    with jattn.deterministic_gradients():
        traced(jnp.ones(1))
    traced(jnp.ones(1))
    assert seen == [False, True]
