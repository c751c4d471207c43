"""Programs that compile for absent GPUs, each in a process of its own.

They run with jax's CUDA plugin and ptxas, which `make compile` puts in .compilers for each version
of jax: they do not belong in an environment without CUDA's libraries.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

__all__ = ["VERSIONS", "environment", "of_a_user", "printed"]

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMPILERS = ROOT / ".compilers"
VERSIONS = (ROOT / "tests" / "hopper" / "jax_versions.txt").read_text().split()


def environment(version: str) -> dict[str, str]:
    """That of a process in which jax has this version and compiles for an absent GPU."""
    if sys.platform != "linux":
        pytest.skip("jax's CUDA plugin is for Linux")
    if not (COMPILERS / "ready").exists():
        missing = "no .compilers, which scripts/compilers.sh makes"
        pytest.fail(missing) if os.environ.get("JATTN_COMPILERS") else pytest.skip(missing)
    return of_a_user() | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(COMPILERS / version)}


def of_a_user() -> dict[str, str]:
    """The environment without what conftest.py asks of the tests' own programs on a CPU."""
    of_the_tests = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
    return {key: value for key, value in os.environ.items() if key not in of_the_tests}


def printed(version: str, program: pathlib.Path, *arguments: object) -> list[dict[str, Any]]:
    """The JSON lines of a program that is run with a version of jax."""
    run = subprocess.run(
        [sys.executable, program, *map(str, arguments)],
        env=environment(version),
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert found
    assert all(call["jax"] == version for call in found if "jax" in call)
    return found
