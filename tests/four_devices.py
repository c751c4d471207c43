"""Programs that need four devices, which a process has from its start or not at all."""

from __future__ import annotations

import os
import subprocess
import sys


def run(program: str) -> None:
    """Runs Python text in a process whose CPU is four devices; fails with what it printed."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
