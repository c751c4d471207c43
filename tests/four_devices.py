"""Programs that need several devices, which a process has from its start or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
STRICTLY = "from tests.promotion import be_strict; be_strict()\n"


def run(program: str, *, devices: int = 4, timeout: int = 300) -> None:
    """Runs Python text in a process whose CPU is so many devices; fails with what it printed."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "NPROC": "64",  # interpreted kernels of each wait for each other on XLA's threads
    }
    ended = subprocess.run(
        [sys.executable, "-c", STRICTLY + program],
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
