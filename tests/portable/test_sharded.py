"""Sharded over rows and heads the kernels give the same, and gather nothing."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

from tests.cases import first


@pytest.mark.parametrize(
    "program", first(1, ["jit 0", "jit 1", "jit 2", "jit 3", "explicit", "shard_map"])
)
def test_interpreted_on_four_devices(program: str) -> None:
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4",
    }
    path = pathlib.Path(__file__).with_name("sharded.py")
    command = [sys.executable, str(path), *program.split()]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
