"""Kernels that other processes lower: the same ones, and none where those fail."""

from __future__ import annotations

import os
import pathlib
import sys
import time
from types import SimpleNamespace

import pytest

from tests.programs import VERSIONS, printed
from training import kernels_beside
from training.kernels_beside import Beside, Layer, Lowered

LAYER = Layer("NVIDIA H100 80GB HBM3", (1, 128, 2, 64), (1, 128, 1, 64), "bfloat16", False, "flash")


@pytest.mark.parametrize("program", ["/bin/false", "/bin/echo"])
def test_a_process_that_fails_or_says_something_else_has_no_kernels(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    beside = Beside()
    found: list[Lowered] = []
    beside.ask(LAYER, found.append)
    assert beside.find("a kernel") is None
    assert not found


def test_processes_that_are_not_asked_end(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "import sys; sys.stdin.read()"
    with monkeypatch.context() as patch:
        patch.setattr(kernels_beside, "_COMMAND", ("-c", program))
        beside = Beside(1)
    (process,) = beside._processes
    assert process.poll() is None
    beside.close()
    assert process.wait(timeout=60) == 0
    while process.stdout is not None and not process.stdout.closed:  # by the thread that waits too
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("argv", "cores", "started"),
    [([], 8, 1), ([], 7, 0), (["--target", "h100"], 8, 0), (["--report", "step"], 8, 0)],
)
def test_they_start_where_cores_are_free_and_the_device_is_asked_for(
    argv: list[str], cores: int, started: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels_beside, "Beside", SimpleNamespace)
    monkeypatch.setattr(kernels_beside, "_started", [])
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setattr(pathlib.Path, "glob", lambda path, pattern: iter(["/dev/nvidia0"]))
    monkeypatch.setattr("sys.argv", ["train.py", *argv])
    kernels_beside.start()
    assert (kernels_beside.take() is not None) == bool(started)
    assert kernels_beside.take() is None


@pytest.mark.compile
@pytest.mark.parametrize("version", VERSIONS)
def test_the_program_is_the_same_and_its_kernels_lowered_elsewhere(version: str) -> None:
    (found,) = printed(version, pathlib.Path(__file__).parent / "lower_kernels_beside.py")
    alone, also_beside = found["lowered"]
    assert found["same"]
    assert alone > 1
    assert also_beside == alone
    assert found["compiled"] == alone
