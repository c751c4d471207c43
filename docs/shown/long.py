"""The memory reports that `train.py` wrote and that are kept in `training/results`."""

from __future__ import annotations

import json
from typing import Any

from docs.shown.measured import RESULTS, Table, size

__all__ = ["reports"]

REPORTS = RESULTS.parents[1] / "training/results"


def reports() -> Table | None:
    """Bytes and seconds by length, a row for each cell of each report; None without any."""
    rows = []
    for file in sorted(REPORTS.glob("**/memory_scaling*.json")):
        report: dict[str, Any] = json.loads(file.read_text())
        for cell in report["cells"]:
            seconds = cell["seconds"]
            rows.append(
                [
                    report["device"],
                    cell["implementation"],
                    f"{cell['sequence_length']:,}",
                    "-" if cell["temp_bytes"] is None else size(cell["temp_bytes"]),
                    cell["status"] if seconds is None else f"{seconds:.3g} s",
                ]
            )
    head = ["device", "implementation", "tokens", "temporary memory", "gradient step"]
    return Table(head, rows) if rows else None
