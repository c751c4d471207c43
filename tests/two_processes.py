"""Two processes of JAX on this machine, each with two devices of its CPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from tests.four_devices import REPOSITORY, STRICTLY

__all__ = ["run"]


def run(program: str, timeout: int = 240) -> None:
    """Runs Python text in both at once; fails unless both end well.

    The text finds the address of the first in ADDRESS and its own process in NUMBER.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    both = [
        subprocess.Popen(
            [sys.executable, "-c", f"ADDRESS, NUMBER = {address!r}, {i}\n{STRICTLY}{program}"],
            cwd=REPOSITORY,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        said = [process.communicate(timeout=timeout)[1] for process in both]
    finally:
        for process in both:
            process.kill()
    failed = [f"process {i}: {said[i][-3000:]}" for i in range(2) if both[i].returncode]
    assert not failed, "\n".join(failed)
