"""What the trainer compiles: one kernel for all its programs."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.mosaic.gpu import core
from jax.sharding import AbstractDevice, AbstractMesh

import jattn
from training import kernel_text


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
