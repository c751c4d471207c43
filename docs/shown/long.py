"""The memory reports that `train.py` wrote and that are kept in `training/results`."""

from __future__ import annotations

import json
from typing import Any

from docs.shown.measured import RESULTS, Table, size

__all__ = ["report", "table"]

REPORTS = RESULTS.parents[1] / "training/results"


def report(name: str) -> dict[str, Any]:
    """The report in a folder of `training/results`."""
    found: dict[str, Any] = json.loads((REPORTS / name / "memory_scaling.json").read_text())
    return found


def table(report: dict[str, Any]) -> Table:
    """Lengths down; memory and time of each implementation across."""
    cells = {(cell["implementation"], cell["sequence_length"]): cell for cell in report["cells"]}
    names = list(dict.fromkeys(name for name, _ in cells))
    lengths = sorted({length for _, length in cells})
    head = ["tokens", *(f"{name}: {what}" for name in names for what in ("memory", "time"))]
    rows = [[f"{n:,}", *(x for name in names for x in _entries(cells, name, n))] for n in lengths]
    return Table(head, rows)


def _entries(cells: dict[tuple[str, int], dict[str, Any]], name: str, length: int) -> list[str]:
    cell = cells.get((name, length))
    if cell is None:
        return ["", ""]
    seconds, total = cell["seconds"], cell["total_bytes"]
    if seconds is None:
        time = cell["status"]
    else:
        time = f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
    return ["-" if total is None else size(total), time]
