"""The reports as tables and as JSON."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.table import Table

from training.reports.cells import Cell
from training.units import bytes_text, seconds_text


def as_table(cells: Sequence[Cell]) -> Table:
    """A line for each series and length; columns of which nothing is known are left out."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    columns = [column for column in _COLUMNS if any(column.text(cell) for cell in cells)]
    growth = {
        (cell.series, cell.sequence_length): _growth(cell, shorter)
        for shorter, cell in itertools.pairwise(cells)
    }
    for heading in ("T", *(column.heading for column in columns)):
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for cell in cells:
        if before is not None and cell.series != before:
            table.add_section()
        row = [cell.series if cell.series != before else "", f"{cell.sequence_length:,}"]
        for column in columns:
            text = column.text(cell)
            if column.heading == "temporary":
                text += f"  {growth.get((cell.series, cell.sequence_length), ''):>5}"
            row.append(text)
        table.add_row(*row)
        before = cell.series
    return table


@dataclasses.dataclass(frozen=True)
class _Column:
    heading: str
    text: Callable[[Cell], str]


def _bytes(count: float | None) -> str:
    return "" if count is None else bytes_text(count)


def _time(cell: Cell) -> str:
    return cell.status if cell.seconds is None else seconds_text(cell.seconds)


def _rate(cell: Cell) -> str:
    of_a_step = cell.rematerialized is not None
    return f"{cell.tokens_per_second:,.0f}" if of_a_step and cell.tokens_per_second else ""


_COLUMNS = (
    _Column("temporary", lambda cell: _bytes(cell.temp_bytes)),
    _Column("a token", lambda cell: _bytes(cell.bytes_a_token)),
    _Column("in all", lambda cell: _bytes(cell.total_bytes)),
    _Column("measured", lambda cell: _bytes(cell.peak_bytes)),
    _Column("time", _time),
    _Column("tokens/s", _rate),
)


def _growth(cell: Cell, shorter: Cell) -> str:
    if cell.series != shorter.series or not shorter.temp_bytes or cell.temp_bytes is None:
        return ""
    return f"x{cell.temp_bytes / shorter.temp_bytes:.1f}"


def as_json(cells: Sequence[Cell], *, measured: str, device: str, seconds: float) -> dict[str, Any]:
    """The report: what of, on which device, and how long it took."""
    return {
        "measured": measured,
        "device": device,
        "report_seconds": round(seconds, 1),
        "cells": [dataclasses.asdict(cell) for cell in cells],
    }
