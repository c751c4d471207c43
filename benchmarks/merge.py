"""Result files of one preset and machine as one: python benchmarks/merge.py OUT IN IN ..."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import targets
from benchmarks.presets import PRESETS
from benchmarks.results import Run

__all__ = ["merged"]


def merged(runs: Sequence[Run]) -> Run:
    """All that these runs measured; what is measured twice is the later run's.

    The date is the last run's. ValueError where presets, chips, drivers or a version of a package
    differ: numbers of two machines do not stand side by side.
    """
    first, *others = sorted(runs, key=lambda run: run.date)
    whole = replace(first, machine=dict(first.machine), versions=dict(first.versions))
    whole.cells, whole.measurements = {}, {}
    for run in (first, *others):
        _refuse_another(first, run)
        whole.date, whole.protocol = run.date, run.protocol
        whole.machine.update(run.machine)
        whole.versions.update(run.versions)
        for name, cell in run.cells.items():
            for measurement in run.measurements[name]:
                open_still = not run.settled(name, measurement.peer, measurement.which)
                if not (open_still and whole.get(name, measurement.peer, measurement.which)):
                    whole.add(cell, measurement)
    preset = PRESETS.get(whole.preset)
    judged = preset().targets if preset is not None else ()
    whole.verdicts = targets.verdicts(judged, whole, whole.cells)
    return whole


def _refuse_another(first: Run, run: Run) -> None:
    pairs = {
        "preset": (first.preset, run.preset),
        **{name: (first.machine.get(name), run.machine.get(name)) for name in ("chip", "driver")},
        **{
            name: (version, run.versions[name])
            for name, version in first.versions.items()
            if name in run.versions
        },
    }
    for name, (one, other) in pairs.items():
        if one != other:
            raise ValueError(f"{name} must be the same in all runs, got {one!r} and {other!r}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Merges files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="+", type=Path)
    asked = parser.parse_args(arguments)
    try:
        merged([Run.load(path) for path in asked.files]).save(asked.out)
    except ValueError as error:
        raise SystemExit(f"merge.py: {error}") from error


if __name__ == "__main__":
    main()
