"""The benchmark program's jobs: calls take turns, are checked, and no peer can spoil a run."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import jax_calls
from benchmarks.cells import Cell
from benchmarks.jobs import Job, Measuring, interleave
from benchmarks.pool import BrokenFamilyError, Pool, Worker
from benchmarks.results import Measurement
from benchmarks.row_check import rows_to_check
from tests.benchmark_cells import SMALL, cell


def test_calls_take_turns_and_one_that_raises_is_left_out() -> None:
    order: list[str] = []

    def failing() -> None:
        order.append("b")
        raise OSError("no more")

    calls = {"a": lambda: order.append("a"), "b": failing, "c": lambda: order.append("c")}
    times = interleave(calls, 3)
    assert order == ["a", "b", "c", "c", "a", "c", "a"]
    assert times["b"] == "OSError: no more"
    assert len(times["a"]) == len(times["c"]) == 3


@pytest.mark.parametrize(
    ("peer", "mask"),
    [
        ("jattn/eager", "full"),
        ("jattn/eager", "causal"),
        ("jattn/eager", "window:5"),
        ("jattn/eager", "packed:3"),
        ("jattn/memory_efficient-xla", "causal"),
        ("jax.nn/xla", "window:5"),
        ("jax.nn/xla", "packed:3"),
    ],
)
def test_the_row_check_passes_right_rows_alone(peer: str, mask: str) -> None:
    shown = cell(mask, bias=mask == "causal")
    with jax.default_matmul_precision("highest"):
        call = jax_calls.prepare(peer, shown, "forward")
    out = np.array(call())
    error = call.error(out)
    assert error is not None
    assert error < 1e-5
    b, t, n = rows_to_check(shown)[-1]
    out[b, t, n] *= 1.1
    assert call.error(out) == pytest.approx(0.1, rel=1e-3)


class FakeCall:
    """A call that takes no time."""

    compile_s, temp_bytes = 0.25, 2**20

    def __init__(self, peer: str) -> None:
        self._peer = peer

    def __call__(self) -> None:
        if self._peer == "breaks":
            raise OSError("illegal access")

    def too_large(self) -> None: ...

    def error(self, result: object) -> float:
        return {"wrong": 0.5, "NaN": float("nan")}.get(self._peer, 1e-7)

    def device_times(self, repeats: int) -> tuple[list[float], str]:
        return [float(i) for i in range(1, repeats + 1)], "fake"


class FakeFamily:
    """Peers named after what they do."""

    def facts(self) -> dict[str, Any]:
        return {}

    def refusal(self, peer: str, shown: Cell) -> str | None:
        return "cannot" if peer == "refuses" else None

    def prepare(self, peer: str, shown: Cell, which: str) -> FakeCall:
        if peer == "raises":
            raise NotImplementedError("not\n this")
        return FakeCall(peer)


class Collected:
    """Keeps what a worker would send."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], Measurement] = {}
        self.stages: list[str] = []

    def stage(self, peer: str, stage: str) -> None:
        self.stages.append(stage)

    @contextlib.contextmanager
    def device(self, *, alone: bool) -> Generator[None]:
        """What a worker would wait for."""
        self.stages.append("alone" if alone else "shared")
        yield

    def result(self, measurement: Measurement) -> None:
        self.found[measurement.peer, measurement.which] = measurement


@pytest.mark.parametrize("on_gpu", [False, True])
def test_peers_that_refuse_raise_or_err_are_reported_and_the_rest_timed(on_gpu: bool) -> None:
    peers = ("refuses", "raises", "breaks", "wrong", "NaN", "works")
    told = Collected()
    job = Job(SMALL, peers, ("forward", "gradient"), timed=True, repeats=3, on_gpu=on_gpu)
    measuring = Measuring(job, FakeFamily(), told, told.device)
    measuring.run()
    for which in job.passes:
        reasons = {peer: told.found[peer, which].reason for peer in peers}
        assert reasons == {
            "refuses": "cannot",
            "raises": "NotImplementedError: not this",
            "breaks": "OSError: illegal access",
            "wrong": "wrong result: an output row is off by 0.5 of its norm",
            "NaN": "wrong result: an output row is off by nan of its norm",
            "works": None,
        }
    assert measuring.spent == on_gpu
    works = told.found["works", "gradient"]
    assert (works.samples, works.temp_bytes, works.compile_s) == (3, 2**20, 0.25)
    if on_gpu:
        assert (works.ms, works.min_ms, works.max_ms, works.timer) == (2.0, 1.0, 3.0, "fake")


def test_what_runs_has_the_device_alone_and_what_compiles_does_not() -> None:
    told = Collected()
    job = Job(SMALL, ("works",), ("forward",), timed=True, repeats=3, on_gpu=True)
    Measuring(job, FakeFamily(), told, told.device).run()
    run = ["wait", "alone", "run"]
    assert told.stages == ["wait", "shared", "compile", *run, *run]


FAMILY = """
import os, time
def facts(): return {"platform": "cpu", "chip": "none", "versions": {}}
def refusal(peer, cell): return None
def prepare(peer, cell, which):
    if peer == "dies": os._exit(3)
    if peer == "hangs": time.sleep(60)
    class Call:
        compile_s, temp_bytes = 0.0, None
        def __call__(self):
            print("a library speaks")
            if peer == "breaks": raise OSError(str(os.getpid()))
        def too_large(self): return None
        def error(self, result): return None
        def device_times(self, repeats): return [1.0] * repeats, f"process {os.getpid()}"
    return Call()
"""


def test_a_peer_that_hangs_or_dies_costs_its_own_result_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made_up_family.py").write_text(FAMILY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found: dict[str, Measurement] = {}
    pool = Pool(
        lock=tmp_path / "lock",
        timeout_s=3,
        on_result=lambda shown, measurement: found.update({measurement.peer: measurement}),
        on_facts=lambda facts: None,
    )
    orders = (("first", "hangs", "dies", "second"), ("breaks",), ("last",))
    jobs = [Job(SMALL, peers, ("forward",), timed=True, repeats=2, on_gpu=True) for peers in orders]
    pool.run({"made_up_family": jobs}, {}, count=1)
    assert "in 3 s of compile" in (found["hangs"].reason or "")
    assert "ended with status 3 in compile" in (found["dies"].reason or "")
    assert found["first"].ms == found["second"].ms == found["last"].ms == 1.0
    # A call that fails on a GPU may break all that follow in its process.
    broken = (found["breaks"].reason or "").removeprefix("OSError: ")
    assert found["second"].timer == f"process {broken}"
    assert found["last"].timer != f"process {broken}"


def test_a_family_that_cannot_be_imported_says_why(tmp_path: Path) -> None:
    with pytest.raises(BrokenFamilyError, match="No module named 'no_such_family'"):
        Worker("no_such_family", tmp_path / "lock", timeout_s=60)
