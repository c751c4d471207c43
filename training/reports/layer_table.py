"""The memory report as a table and as JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from models import TransformerConfig
from training.reports.layer import Cell, what_is_measured
from training.units import bytes_text, seconds_text


def as_table(cells: Sequence[Cell]) -> Table:
    """A line for each implementation and length; columns of which nothing is known are left out."""
    table = Table(box=box.SIMPLE_HEAD)
    measured = any(cell.peak_bytes is not None for cell in cells)
    table.add_column("", no_wrap=True)
    headings = ["T", "temporary", "growth", "a token", "in all"]
    headings += ["measured"] if measured else []
    for heading in (*headings, "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    before: Cell | None = None
    for cell in cells:
        first = before is None or before.implementation != cell.implementation
        if first and before is not None:
            table.add_section()
        growth = None if first else before
        row = [cell.implementation if first else "", f"{cell.sequence_length:,}"]
        row += [_bytes(cell.temp_bytes), _growth(cell, growth), _bytes(cell.bytes_a_token)]
        row += [_bytes(cell.total_bytes), *([_bytes(cell.peak_bytes)] if measured else [])]
        row += [cell.status if cell.seconds is None else seconds_text(cell.seconds)]
        table.add_row(*row)
        before = cell
    return table


def _bytes(count: float | None) -> str:
    return "" if count is None else bytes_text(count)


def _growth(cell: Cell, before: Cell | None) -> str:
    if cell.temp_bytes is None or before is None or not before.temp_bytes:
        return ""
    return f"x{cell.temp_bytes / before.temp_bytes:.1f}"


def notes(cells: Sequence[Cell]) -> list[str]:
    """Why cells lack a number: a line for each implementation and status, the first cell's why."""
    alike: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if cell.note:
            alike.setdefault((cell.implementation, cell.status), []).append(cell)
    return [
        f"{name}, T = {' '.join(f'{cell.sequence_length:,}' for cell in found)}:"
        f" {status}: {found[0].note}"
        for (name, status), found in alike.items()
    ]


def as_json(
    cells: Sequence[Cell], model: TransformerConfig, *, device: str, seconds: float
) -> dict[str, Any]:
    """The report, with the device it is of and how long it took."""
    return {
        "measured": what_is_measured(model),
        "device": device,
        "report_seconds": round(seconds, 1),
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }
