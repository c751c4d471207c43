"""What the benchmark program makes of measurements: differences, verdicts, tables."""

from __future__ import annotations

from benchmarks import report, targets
from benchmarks.results import Measurement
from tests.benchmark_cells import SMALL, cell, run_with


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
