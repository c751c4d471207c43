"""A run whose sequences are cut over devices: the losses of one device, and its checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.four_devices import run
from tests.tiny_training import OPTIONS, write_corpus

PROGRAM = """
import json, sys
import numpy as np
import train
from tests.promotion import of_others

options = {options!r}

def losses(run):
    rows = [json.loads(line) for line in open(run + "/metrics.jsonl")]
    return {{row["step"]: row for row in rows}}

def trained(name, *more):
    runs = {folder!r}
    with of_others():
        assert train.main([*options, "--runs-dir", runs, "--name", name, *more]) == 0
    return losses(runs + "/" + name)

one = trained("one")
two = trained("two", "--sequence-parallel", "2")
for step in one:
    for name in ("loss", "gradient_norm", "held_out_bits_per_byte"):
        if name in one[step]:
            # Sums over 128 bytes in another order, through a few steps.
            np.testing.assert_allclose(two[step][name], one[step][name], rtol=1e-4)
assert two[6]["loss"] != two[1]["loss"]
"""
RESUMED = """
import shutil
from pathlib import Path

def resumed(name, devices):
    # What the run had saved after step 3, gone on with on other devices.
    folder = Path({folder!r}) / name
    shutil.rmtree(folder / "checkpoints" / "6")
    rows = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(rows[:4]))
    with of_others():
        assert train.main(["--resume", str(folder), "--sequence-parallel", devices]) == 0
    return losses(str(folder))

for name, devices in (("two", "1"), ("one", "2")):
    found = resumed(name, devices)
    for step in (4, 5, 6):
        np.testing.assert_allclose(found[step]["loss"], one[step]["loss"], rtol=1e-4)
"""
REFUSED = """
import contextlib, io
import train
from tests.promotion import of_others
for more, said in (
    (["--sequence-parallel", "3"], "1 to the number of devices, 2; got 3 (XLA_FLAGS=--xla_force_"),
    (["--sequence-parallel", "0"], "1 to the number of devices, 2; got 0"),
    (["--sequence-parallel", "2", "--sequence-length", "63"], "(63) must be a multiple of"),
    (["--sequence-parallel", "2", "--report", "memory", "--memory-lengths", "64", "63"],
     "--memory-lengths (63) must be a multiple of"),
    (["--sequence-parallel", "4", "--report", "step"], "1 to the number of devices, 2; got 4"),
):
    error = io.StringIO()
    with of_others(), contextlib.redirect_stderr(error):
        assert train.main([*{options!r}, "--runs-dir", {folder!r}, *more]) == 2, more
    assert said in error.getvalue(), error.getvalue()
"""


REPORTED = """
import json
import train
from tests.promotion import of_others

def reported(kind, devices):
    name = f"{{kind}}{{devices}}"
    asked = ["--report", kind, "--runs-dir", {folder!r}, "--name", name]
    asked += ["--sequence-parallel", str(devices), "--memory-lengths", "8192", "--step-lengths",
              "1024", "--memory-implementations", "memory_efficient", "--step-implementations",
              "memory_efficient", "--memory-seconds", "0", "--step-seconds", "30"]
    with of_others():
        assert train.main([*{options!r}, *asked]) == 0
    stored = {{"memory": "memory_scaling", "step": "training_step"}}[kind]
    return json.load(open({folder!r} + "/" + name + f"/{{stored}}.json"))

for kind in ("memory", "step"):
    one, two = (reported(kind, devices) for devices in (1, 2))
    assert two["device"] == "2 x " + one["device"]
    for alone, each in zip(one["cells"], two["cells"], strict=True):
        assert each["temp_bytes"] < alone["temp_bytes"], (kind, alone, each)
        if kind == "memory":
            # Its input, its gradient and few weights.
            whole, half = (cell["total_bytes"] - cell["temp_bytes"] for cell in (alone, each))
            assert 0.5 <= half / whole < 0.6, (alone, each)
    if kind == "step":
        assert all(cell["seconds"] for cell in two["cells"])
"""


def options(tmp_path: Path) -> dict[str, object]:
    corpus = write_corpus(tmp_path / "corpus")
    few = ["--data", str(corpus), "--steps", "6", "--checkpoint-every", "3", "--pack-documents"]
    return {"options": [*OPTIONS, *few], "folder": str(tmp_path / "runs")}


@pytest.mark.thorough
def test_losses_are_those_of_one_device_and_checkpoints_are_for_any(tmp_path: Path) -> None:
    run((PROGRAM + RESUMED).format(**options(tmp_path)), devices=2)


@pytest.mark.thorough
def test_a_report_is_of_each_device(tmp_path: Path) -> None:
    run(REPORTED.format(**options(tmp_path)), devices=2)


@pytest.mark.thorough
def test_devices_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    run(REFUSED.format(**options(tmp_path)), devices=2)
