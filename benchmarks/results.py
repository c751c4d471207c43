"""What a run measured, and the JSON file that keeps it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.cells import Cell, Pass

__all__ = ["LEFT_OUT", "NOT_REACHED", "OUT_OF_TIME", "Measurement", "Run", "Verdict"]

SCHEMA = 1
# Reasons that say nothing of the peer: a later run may still measure it.
NOT_REACHED, OUT_OF_TIME = "not reached", "not run: the time limit had passed"
LEFT_OUT = "left out of this cell by the preset; --peers runs it"
_OPEN = (NOT_REACHED, OUT_OF_TIME, LEFT_OUT)
# As XLA and PyTorch say it: what does not fit beside other workers may fit beside fewer.
_NO_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory")


@dataclass(frozen=True)
class Measurement:
    """One pass of one peer in one cell: numbers, or the reason why there are none.

    Times are milliseconds per call over `samples` timed calls. temp_bytes is the compiler's account
    of temporary memory. error is the largest relative error of the output rows that were checked
    against float64. timer names the clock.
    """

    peer: str
    which: Pass
    ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    samples: int = 0
    timer: str | None = None
    temp_bytes: int | None = None
    compile_s: float | None = None
    error: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Verdict:
    """One target and what was measured of it; None where either side has no number."""

    target: str
    bound: float
    measured: float | None
    met: bool


@dataclass
class Run:
    """One run of a preset on one machine."""

    preset: str
    date: str  # ISO 8601, UTC
    machine: dict[str, Any]
    versions: dict[str, str]
    protocol: dict[str, Any]
    cells: dict[str, Cell] = field(default_factory=dict)
    measurements: dict[str, list[Measurement]] = field(default_factory=dict)  # by cell name
    verdicts: list[Verdict] = field(default_factory=list)

    def add(self, cell: Cell, measurement: Measurement) -> None:
        """Keeps a measurement; a later one of the same peer and pass takes its place."""
        self.cells[cell.name] = cell
        kept = self.measurements.setdefault(cell.name, [])
        same = [(m.peer, m.which) == (measurement.peer, measurement.which) for m in kept]
        if any(same):
            kept[same.index(True)] = measurement
        else:
            kept.append(measurement)

    def get(self, cell: str, peer: str, which: Pass) -> Measurement | None:
        """The measurement of a cell by name; None if there is none.

        `backward` is the difference of the gradient's and the forward pass's medians.
        """
        if which != "backward":
            found = self.measurements.get(cell, [])
            return next((m for m in found if (m.peer, m.which) == (peer, which)), None)
        forward, gradient = (self.get(cell, peer, "forward"), self.get(cell, peer, "gradient"))
        if forward is None or gradient is None:
            return None
        reason = gradient.reason or forward.reason
        if forward.ms is None or gradient.ms is None:
            return Measurement(peer, which, reason=reason)
        return Measurement(peer, which, ms=gradient.ms - forward.ms, timer=gradient.timer)

    def settled(self, cell: str, peer: str, which: Pass) -> bool:
        """Whether this was measured, or is known to be impossible."""
        found = self.get(cell, peer, which)
        if found is None or found.reason in _OPEN:
            return False
        return found.reason is None or not any(words in found.reason for words in _NO_MEMORY)

    def best(self, cell: str, peers: Iterable[str], which: Pass) -> Measurement | None:
        """The fastest of these peers in the cell; None if none has a time."""
        found = [self.get(cell, peer, which) for peer in peers]
        timed = [m for m in found if m is not None and m.ms is not None]
        return min(timed, key=lambda m: m.ms or 0.0, default=None)

    def peers(self) -> list[str]:
        """Every peer that the run speaks of, in the order met."""
        seen = (m.peer for measurements in self.measurements.values() for m in measurements)
        return list(dict.fromkeys(seen))

    def to_json(self) -> dict[str, Any]:
        """Plain values; fields that say nothing are left out."""
        cells = [
            {
                "name": name,
                **cell.to_json(),
                "forward_flops": cell.flops("forward"),
                "measurements": [_without_none(m) for m in self.measurements[name]],
            }
            for name, cell in self.cells.items()
        ]
        return {
            "schema": SCHEMA,
            "preset": self.preset,
            "date": self.date,
            "machine": self.machine,
            "versions": self.versions,
            "protocol": self.protocol,
            "cells": cells,
            "verdicts": [dataclasses.asdict(verdict) for verdict in self.verdicts],
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Self:
        """The run that `to_json` wrote; ValueError for another schema."""
        if fields.get("schema") != SCHEMA:
            raise ValueError(f"results must have schema {SCHEMA}, got {fields.get('schema')!r}")
        run = cls(
            preset=fields["preset"],
            date=fields["date"],
            machine=fields["machine"],
            versions=fields["versions"],
            protocol=fields["protocol"],
            verdicts=[Verdict(**verdict) for verdict in fields["verdicts"]],
        )
        for entry in fields["cells"]:
            for measurement in entry["measurements"]:
                run.add(Cell.from_json(entry), Measurement(**measurement))
        return run

    def save(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".part")
        unfinished.write_text(json.dumps(self.to_json(), indent=1) + "\n")
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The run kept in this file."""
        return cls.from_json(json.loads(path.read_text()))

    def file_name(self) -> str:
        """chip-preset-date.json"""
        chip = re.sub(r"\([^)]*\)|\bCPU\b.*|@.*", " ", str(self.machine["chip"])).lower()
        slug = re.sub(r"[^a-z0-9]+", "-", chip).strip("-") or "unknown"
        return f"{slug}-{self.preset}-{self.date[:10]}.json"


def _without_none(measurement: Measurement) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(measurement).items() if v is not None}
