"""The benchmark program: its arithmetic, its file, and that no peer can spoil a run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import attention, jax_calls, presets, report, targets
from benchmarks.cells import Cell, Mask
from benchmarks.jobs import Job, Measuring, interleave
from benchmarks.pool import BrokenFamilyError, Pool, Worker
from benchmarks.results import Measurement, Run, Verdict
from benchmarks.row_check import rows_to_check

MASKS = (
    "full",
    "causal",
    "window:0",
    "window:5",
    "window:500",
    "packed:1",
    "packed:3",
    "documents:3",
)
SMALL = Cell(1, 24, 24, 2, 1, 8, Mask("causal"), "float32")


def cell(mask: str = "causal", **changes: Any) -> Cell:
    return dataclasses.replace(SMALL, mask=Mask.parse(mask), **changes)


def mask_in_words(shown: Cell) -> np.ndarray:
    """(T, S), from what the masks' names say alone."""
    i, j = np.mgrid[: shown.queries, : shown.keys]
    documents = shown.mask.size if shown.mask.kind == "packed" else 1
    own, its = (x // (shown.queries // documents) for x in (i, j))
    cut = shown.documents()
    return {
        "full": np.ones_like(i, bool),
        "causal": j <= i,
        "window": (j <= i) & (j >= i - shown.mask.size),
        "packed": (j <= i) & (own == its),
        "documents": (j <= i) & (cut[i] == cut[j]),
    }[shown.mask.kind]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [3, 12, 27])
def test_cells_see_what_the_mask_says(mask: str, length: int) -> None:
    shown = cell(mask, queries=length, keys=length)
    np.testing.assert_array_equal(shown.dense_mask(), mask_in_words(shown))


def test_queries_past_the_last_key_see_the_window_that_is_there() -> None:
    shown = cell("window:3", keys=10)
    np.testing.assert_array_equal(shown.dense_mask(), mask_in_words(shown))
    assert shown.visible_pairs() == mask_in_words(shown).sum()


def test_flops_count_half_of_causal_and_every_pair_of_a_window() -> None:
    per_pair = 4 * SMALL.heads * SMALL.head_dim
    assert cell("full").flops("forward") == per_pair * 24**2
    assert cell("causal").flops("forward") == per_pair * 24**2 / 2
    assert cell("packed:3").flops("forward") == per_pair * 3 * 8**2 / 2
    lengths = np.bincount(cell("documents:3").documents())
    assert cell("documents:3").flops("forward") == per_pair * (lengths**2).sum() / 2
    assert cell("causal").flops("backward") == 2.5 * cell("causal").flops("forward")
    assert cell("causal").flops("gradient") == 3.5 * cell("causal").flops("forward")
    for window in ("window:0", "window:5", "window:500"):
        assert cell(window).flops("forward") == per_pair * mask_in_words(cell(window)).sum()


@pytest.mark.parametrize(
    "text", ["", "window", "window:-1", "packed:0", "documents:0", "causal:3", "other"]
)
def test_masks_that_are_not_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"mask must be full, causal, window:LEFT"):
        Mask.parse(text)


def test_presets_name_every_cell_once_and_judge_cells_they_plan() -> None:
    for name, build in presets.PRESETS.items():
        preset = build()
        names = [plan.cell.name for plan in preset.plans]
        assert len(set(names)) == len(names), name
        assert all(set(names).issuperset(target.cells) for target in preset.targets), name
        assert all(Cell.from_json(p.cell.to_json()) == p.cell for p in preset.plans), name


def test_the_forward_preset_is_the_bar_table() -> None:
    cells = [plan.cell for plan in presets.hopper_forward().plans]
    table = [c for c in cells if c.mask.kind in ("full", "causal") and c.queries > 1]
    assert {(c.head_dim, c.mask.kind, c.queries) for c in table} == {
        (h, m, t) for h in (64, 128, 256) for m in ("full", "causal") for t in (1024, 4096, 16384)
    }
    assert all(c.batch * c.queries == 16384 and c.heads * c.head_dim == 2048 for c in table)
    assert [c.name for c in cells if c not in table] == [
        "h128-n16-window:1023-b1-t16384",
        "h128-n16-packed:8-b1-t16384",
        "h128-n32k8-full-b16-t1-s32768",
        "h128-n32k8-full-b1-t1-s32768",
    ]


PLAIN = {"bias": False, "dropout": 0.0, "dtype": "bfloat16"}


def test_every_cell_of_the_preset_of_shapes_has_a_bar_in_each_pass() -> None:
    preset = presets.PRESETS["hopper-shapes"]()
    judged = {(target.cell, target.which): target for target in preset.targets}
    assert len(judged) == len(preset.targets)
    for plan in preset.plans:
        passes = {"forward"} | ({"backward"} if "gradient" in plan.passes else set())
        assert {which for cell, which in judged if cell == plan.cell.name} == passes
        assert set(plan.peers) > {
            "jattn/flash",
            "jax.nn/cudnn",
            "tokamax/mosaic",
            "flash-attn3-jax",
        }
    assert {target.at_least for target in judged.values()} == {1.0}
    assert "jattn/flash" not in {peer for target in judged.values() for peer in target.against}
    assert {197, 257, 577, 729, 1000} <= {plan.cell.queries for plan in preset.plans}


def test_the_portable_preset_judges_the_issues_bars() -> None:
    preset = presets.portable()
    cells = {plan.cell.name: plan.cell for plan in preset.plans}
    square = [c for c in cells.values() if c == dataclasses.replace(c, **PLAIN)]
    assert {(c.head_dim, c.mask.kind) for c in square} == {
        (h, m) for h in (64, 128, 256) for m in ("full", "causal")
    }
    assert all((c.batch, c.queries, c.heads * c.head_dim) == (4, 4096, 2048) for c in square)
    bars = {(t.cell, t.which): t.at_least for t in preset.targets if isinstance(t, targets.Rate)}
    for c in square:
        forward, backward = {64: (270, 215), 128: (320, 240), 256: (220, 120)}[c.head_dim]
        assert (bars[c.name, "forward"], bars[c.name, "backward"]) == (forward, backward)
    (time,) = [t for t in preset.targets if isinstance(t, targets.Time)]
    assert cells[time.cell].bias
    assert (time.which, time.at_most_ms) == ("gradient", 10.0)
    (memory,) = [t for t in preset.targets if isinstance(t, targets.Memory)]
    table = 2 * cells[memory.cell].heads * 4096**2 / 2**20
    assert memory.at_most_mib < table
    dropped = [t for t in preset.targets if cells[t.cell].dropout]
    assert [(t.which, 1 / t.at_least) for t in dropped] == [("forward", 1.2), ("gradient", 1.2)]


def test_the_cpu_preset_doubles_lengths_and_compiles_the_longest_alone() -> None:
    plans = [p for p in presets.cpu().plans if p.cell.dtype == "float32"]
    lengths = {p.cell.queries: p.timed for p in plans if p.cell.mask.kind == "causal"}
    assert lengths == {512: True, 1024: True, 2048: True, 4096: True, 8192: False}


def run_with(*measurements: tuple[Cell, Measurement]) -> Run:
    run = Run("cpu", "2026-01-02T03:04:05+00:00", {"platform": "cpu", "chip": "A Chip"}, {}, {})
    for shown, measurement in measurements:
        run.add(shown, measurement)
    return run


def test_backward_is_gradient_less_forward_and_keeps_reasons() -> None:
    run = run_with(
        (SMALL, Measurement("a", "forward", ms=2.0)),
        (SMALL, Measurement("a", "gradient", ms=7.0)),
        (SMALL, Measurement("b", "forward", ms=2.0)),
        (SMALL, Measurement("b", "gradient", reason="cannot")),
        (SMALL, Measurement("c", "forward", ms=2.0)),
    )
    assert run.get(SMALL.name, "a", "backward") == Measurement("a", "backward", ms=5.0)
    assert run.get(SMALL.name, "b", "backward") == Measurement("b", "backward", reason="cannot")
    assert run.get(SMALL.name, "c", "backward") is None


def test_speed_is_judged_against_the_best_peer_that_has_a_time() -> None:
    run = run_with(
        (SMALL, Measurement("own", "forward", ms=2.0)),
        (SMALL, Measurement("slow", "forward", ms=9.0)),
        (SMALL, Measurement("fast", "forward", ms=3.0)),
        (SMALL, Measurement("out", "forward", reason="cannot")),
    )

    def verdict(at_least: float, *against: str) -> tuple[float | None, bool]:
        target = targets.Speed(SMALL.name, "forward", "own", at_least, against)
        (found,) = targets.verdicts([target], run, run.cells)
        return found.measured, found.met

    assert verdict(1.5, "slow", "fast", "out") == (1.5, True)
    assert verdict(1.51, "slow", "fast", "out") == (1.5, False)
    assert verdict(1.0, "out") == (None, False)
    elsewhere = targets.Speed("another cell", "forward", "own", 1.0, ("fast",))
    assert targets.verdicts([elsewhere], run, run.cells) == []


def test_rates_and_times_are_judged_by_themselves() -> None:
    run = run_with((SMALL, Measurement("own", "forward", ms=2.0)))
    rate = SMALL.flops("forward") / 2e9
    asked = [
        targets.Rate(SMALL.name, "forward", "own", rate),
        targets.Rate(SMALL.name, "forward", "own", rate * 1.01),
        targets.Rate(SMALL.name, "forward", "other", 0.0),
        targets.Time(SMALL.name, "forward", "own", 2.0),
        targets.Time(SMALL.name, "forward", "own", 1.9),
        targets.Time(SMALL.name, "gradient", "own", 9.0),
    ]
    found = targets.verdicts(asked, run, run.cells)
    assert [v.met for v in found] == [True, False, False, True, False, False]
    assert [v.measured for v in found] == [rate, rate, None, 2.0, 2.0, None]


def test_what_a_pass_does_beside_another_is_judged_by_the_difference() -> None:
    run = run_with(
        (SMALL, Measurement("own", "forward", ms=2.0)),
        (SMALL, Measurement("own", "jvp", ms=6.0)),  # five products beside two
        (SMALL, Measurement("own", "jvp-gradient", ms=16.5)),
        (SMALL, Measurement("other", "jvp", ms=6.0)),
    )
    asked = [
        targets.More(SMALL.name, "jvp-gradient", "jvp", "own", 10.5),
        targets.More(SMALL.name, "jvp-gradient", "jvp", "own", 10.4),
        targets.More(SMALL.name, "jvp", "forward", "other", 9.0),
        targets.Pace(SMALL.name, "jvp", "forward", "own", 1.25),
        targets.Pace(SMALL.name, "jvp", "forward", "own", 1.26),
        targets.Pace(SMALL.name, "jvp", "forward", "other", 0.1),
    ]
    found = targets.verdicts(asked, run, run.cells)
    assert [v.measured for v in found] == [10.5, 10.5, None, 1.25, 1.25, None]
    assert [v.met for v in found] == [True, False, False, True, False, False]


def test_memory_is_judged_by_size_and_growth() -> None:
    long = cell(queries=48, keys=48)
    run = run_with(
        (SMALL, Measurement("own", "gradient", temp_bytes=10 * 2**20)),
        (long, Measurement("own", "gradient", temp_bytes=21 * 2**20)),
    )
    asked = [
        targets.Memory(SMALL.name, "gradient", "own", 10.0),
        targets.Memory(SMALL.name, "gradient", "own", 9.9),
        targets.Growth(long.name, SMALL.name, "gradient", "own", 2.1),
        targets.Growth(long.name, SMALL.name, "gradient", "own", 2.0),
    ]
    found = targets.verdicts(asked, run, run.cells)
    assert [v.measured for v in found] == [10.0, 10.0, 2.1, 2.1]
    assert [v.met for v in found] == [True, False, True, False]
    rows = [line.split("|") for line in report.memory_table(run).splitlines()[2:]]
    assert [row[2].strip() for row in rows] == ["10.0", "21.0 (2.10x)"]


def test_tables_show_numbers_dashes_and_the_lead() -> None:
    run = run_with(
        (SMALL, Measurement("jattn/x", "forward", ms=2.0, timer="host clock")),
        (SMALL, Measurement("peer", "forward", ms=3.0, timer="host clock")),
        (SMALL, Measurement("other", "forward", reason="cannot")),
    )
    values = report.time_table(run, "forward").splitlines()[-1].split("|")
    assert [text.strip() for text in values[2:-1]] == ["2.00", "3.00", "-", "1.50x"]
    run.machine["platform"] = "gpu"
    tflops = report.time_table(run, "forward", peers=["jattn/*"]).splitlines()[-1].split("|")
    assert [text.strip() for text in tflops[2:-1]] == ["0.00000922", "1.50x"]
    assert report.time_table(run, "gradient") == ""
    assert report.reasons(run) == "- other: cannot (1)"


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


def test_documents_of_random_lengths_begin_where_the_last_ended() -> None:
    ids = cell("documents:5").documents()
    assert ids[0] == 0
    assert set(np.diff(ids)) == {0, 1}
    assert ids[-1] == 4
    assert len(set(np.bincount(ids))) > 1
