"""The benchmark of several devices: what it compares, and which bars it holds that to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import context_parallel
from benchmarks.cells import Cell, Mask
from benchmarks.results import Measurement, Run
from tests.four_devices import run

PROGRAM = """
import sys
from benchmarks import context_parallel
sys.exit(context_parallel.main([
    "--devices", "2", "--length", "64", "--heads", "4/2", "--mask", "documents:3",
    "--head-dim", "8", "--dtype", "float32", "--repeats", "2", "--out", "{out}",
]))
"""


def test_efficiency_is_one_devices_time_over_that_of_all() -> None:
    cell = Cell(1, 64, 64, 4, 2, 8, Mask("causal"))
    found = Run("context-parallel-2", "", {}, {}, {})
    for peer, ms in (("1", 100.0), ("2/auto", 55.0), ("2/ring", 80.0)):
        found.add(cell, Measurement(peer, "gradient", ms=ms))
    verdicts = context_parallel.verdicts(found, 2)
    assert [v.measured for v in verdicts] == [pytest.approx(100 / 110), pytest.approx(100 / 160)]
    assert [v.met for v in verdicts] == [False, False]
    found.add(cell, Measurement("2/auto", "gradient", ms=54.0))
    assert [v.met for v in context_parallel.verdicts(found, 2)] == [True, False]


def test_more_devices_than_there_are_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert context_parallel.main(["--devices", "99"]) == 2
    assert "--devices 99: this machine has" in capsys.readouterr().err


@pytest.mark.thorough
def test_a_run_measures_one_device_and_several(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    run(PROGRAM.format(out=out), devices=2)
    (cell,) = json.loads(out.read_text())["cells"]
    found = {(m["peer"], m["which"]): m["ms"] for m in cell["measurements"]}
    assert set(found) == {(p, w) for p in ("1", "2/auto") for w in ("forward", "gradient")}
    assert min(found.values()) > 0
