"""What the trainer compiles: one kernel for all its programs, which are kept for later starts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.experimental.mosaic.gpu import core
from jax.sharding import AbstractDevice, AbstractMesh

import jattn
from training import compiler, kernel_text


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """jax's store of programs, for short compilations too; afterwards as it is in other tests."""
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    monkeypatch.undo()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


def test_programs_for_a_gpu_are_kept_in_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgetful: None
) -> None:
    numbers = jnp.arange(3.0)
    compiler.keep_programs(tmp_path / "cpu")
    jax.jit(jnp.cumprod)(numbers)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    compiler.keep_programs(tmp_path / "kept")
    compiler.keep_programs(tmp_path / "another")  # the first one is as good as the user's own
    jax.jit(jax.lax.cummax)(numbers)
    assert list((tmp_path / "kept").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_kernels_are_left_out_only_of_what_does_not_run() -> None:
    left_out = "xla_gpu_mock_custom_calls"
    only_analysed, runs = (compiler.options(is_gpu=True, runs=runs) for runs in (False, True))
    assert only_analysed is not None
    assert only_analysed[left_out] is True
    assert runs is not None
    assert left_out not in runs


def test_copy_engines_are_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    mode = "xla_gpu_collective_permute_mode"
    alone = compiler.options(is_gpu=True)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    beside_others = compiler.options(is_gpu=True)
    assert alone is not None
    assert beside_others is not None
    assert mode in alone
    assert mode not in beside_others


@pytest.mark.compile
def test_a_kernel_of_two_programs_is_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "_run_serde_pass", core._run_serde_pass)  # restored afterwards
    kernel_text.leave_out_counts()
    query = jax.ShapeDtypeStruct((1, 128, 1, 64), jnp.bfloat16)
    hashes = []
    h200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="cuda")
    for scale in (1.0, 2.0):  # of what comes after the kernel

        def scaled(q: jax.Array, scale: float = scale) -> jax.Array:
            return scale * jnp.asarray(jattn.flash_attention(q, q, q))

        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=h200)):
            traced = jax.jit(scaled).trace(query)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        hashes += re.findall(r'kernel_hash = "((?:[^"\\]|\\.)*)"', text)
    assert len(hashes) == 2
    assert hashes[0] == hashes[1]
