"""The benchmark program from its options to its file and tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import attention, presets, report, targets
from benchmarks.results import Run, Verdict
from tests.benchmark_cells import run_with

TINY = ["--preset", "cpu", "--length", "64", "--heads", "2", "--head-dim", "8", "--window", "8"]


def test_a_run_keeps_its_file_and_a_missed_target_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    missed = [Verdict("out of reach", 1e9, 1.0, met=False)]
    monkeypatch.setattr(targets, "verdicts", lambda *asked: missed)
    path = tmp_path / "result.json"
    some = ["--cells", "full", "--peers", "eager", "jax.nn", "tokamax/triton", "torch/flash"]
    arguments = [*TINY, *some, "--repeats", "2", "--check", "--out", str(path)]
    assert attention.main(arguments) == 1
    printed = capsys.readouterr().out

    fields = json.loads(path.read_text())
    keys = {"schema", "preset", "date", "machine", "versions", "protocol", "cells", "verdicts"}
    assert keys == set(fields)
    assert {"platform", "chip", "cores", "load_average"} == set(fields["machine"])
    assert {"python", "jax", "jaxlib"} <= set(fields["versions"])
    (entry,) = fields["cells"]
    assert entry["name"] == "h8-n2-full-b1-t64-float32"
    assert entry["forward_flops"] == 4 * 2 * 8 * 64**2

    run = Run.load(path)
    assert run.to_json() == fields
    for peer in ("jattn/eager", "jax.nn/xla"):
        forward = run.get(entry["name"], peer, "forward")
        gradient = run.get(entry["name"], peer, "gradient")
        assert forward is not None
        assert gradient is not None
        assert forward.ms
        assert forward.samples == 2
        assert forward.error is not None
        assert forward.error < 1e-5
        assert gradient.ms
        assert gradient.temp_bytes
    triton = run.get(entry["name"], "tokamax/triton", "forward")
    flash = run.get(entry["name"], "torch/flash", "forward")
    assert "needs an NVIDIA GPU" in ((triton and triton.reason) or "")
    assert flash is not None
    assert flash.reason is not None

    report.main([str(path)])
    tables = capsys.readouterr().out.strip()
    assert tables in printed
    assert "| out of reach | 1e+09 | 1.00     | NO  |" in tables


def test_options_that_a_preset_lacks_and_cells_that_are_none_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        attention.chosen_preset(attention.parse([*TINY, "--dtype", "float16"]), on_gpu=False)
    assert "the preset cpu has no --dtype" in capsys.readouterr().err
    asked = attention.parse(["--mask", "packed:100", "--length", "10"])
    with pytest.raises(SystemExit, match="2"):
        attention.chosen_preset(asked, on_gpu=False)
    assert "packed:100 needs a multiple of 100 queries" in capsys.readouterr().err


def test_a_peer_named_runs_in_cells_that_leave_it_out() -> None:
    name = "h128-n16-causal-b1-t16384"
    for peers, expected in (([], presets.FAST_PEERS), (["eager"], ("jattn/eager",))):
        named = ["--peers", *peers] if peers else []
        asked = attention.parse(["--cells", name, *named])
        run = run_with()
        chosen, preset = attention.chosen_preset(asked, on_gpu=True)
        assert chosen == "hopper-forward"
        jobs = attention.plan(preset, asked, run, on_gpu=True)
        together = [job.peers for family in jobs.values() for job in family]
        assert sorted(together) == sorted((peer,) for peer in expected)
        planned = run.measurements[name]
        left_out = [m.peer for m in planned if "left out" in (m.reason or "")]
        assert left_out == ([] if peers else list(presets.SLOW_PEERS))
