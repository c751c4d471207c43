"""No kernel reads or writes outside its arrays, by CUDA's memory checker."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

from tests.hopper.exact import hopper

__all__ = ["hopper"]

HERE = pathlib.Path(__file__).parent
MOSAIC = ("--kernel-name", "kernel_substring=mosaic_gpu")
ERRORS = 86  # an exit status that nothing else gives


def checker() -> str:
    packages = sysconfig.get_path("purelib")
    places = [os.environ.get("PATH", ""), f"{packages}/nvidia/cu13/bin", "/usr/local/cuda/bin"]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(places))
    if found is None:
        pytest.skip(
            "no compute-sanitizer: CUDA's toolkit has it, or pip's nvidia-cuda-sanitizer-api"
        )
    return found


def check(folder: pathlib.Path, what: str, *filters: str) -> subprocess.CompletedProcess[str]:
    """Runs a folder's memcheck.py under the checker, which is slow; filters choose kernels."""
    command = [
        *(checker(), "--tool", "memcheck", "--error-exitcode", str(ERRORS)),
        *("--target-processes", "application-only", "--report-api-errors", "no"),
        *filters,
        *(sys.executable, str(folder / "memcheck.py"), what),
    ]
    # Each array is an allocation of its own, or the checker would see one that all of them share.
    env = os.environ | {"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240, check=False)
    if "Device not supported" in run.stdout + run.stderr:
        pytest.skip("compute-sanitizer says: Device not supported")
    return run


def assert_found(run: subprocess.CompletedProcess[str]) -> None:
    assert run.returncode == ERRORS, run.stdout[-2000:] + run.stderr[-2000:]
    assert "Invalid __global__ write" in run.stdout, run.stdout[-2000:]


def assert_clean(run: subprocess.CompletedProcess[str]) -> None:
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "ERROR SUMMARY: 0 errors" in run.stdout, run.stdout[-2000:]


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_the_checker_finds_a_write_past_the_end() -> None:
    assert_found(check(HERE, "overrun", *MOSAIC))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_the_kernels_stay_inside_their_arrays() -> None:
    assert_clean(check(HERE, "calls", *MOSAIC))
