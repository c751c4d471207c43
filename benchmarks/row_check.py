"""A spot check of what a peer computes: a time counts only for the right result."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from benchmarks.cells import Cell

__all__ = ["row_error", "rows_to_check"]

type Host = NDArray[np.generic]

TOLERANCE = 0.05  # a wrong mask, head or scale is off by far more, bfloat16 by far less


def rows_to_check(cell: Cell) -> list[tuple[int, int, int]]:
    """(batch row, query, query head) at both ends, in the middle and at a document's start."""
    last = (cell.batch - 1, cell.queries - 1, cell.heads - 1)
    middle = (cell.batch // 2, int(cell.queries * 0.6), cell.heads // 2)
    start = (0, int(cell.document_starts()[-1]), 0)
    return list(dict.fromkeys([(0, 0, 0), start, middle, last]))


def row_error(
    cell: Cell, row: tuple[int, int, int], arrays: dict[str, Host], output: Host
) -> float:
    """|output - exact| / |exact| of one output row, exact being float64.

    Args:
      cell: the call.
      row: (batch row, query, query head).
      arrays: "query" (H,) of this row; "key" and "value" (S, H) of its batch row and key head;
        "bias" (S,) of its query and head, where the cell has one.
      output: (H,) the peer's row.
    """
    seen = cell.visible(row[1])
    keys = np.asarray(arrays["key"], np.float64)[seen.start : seen.stop]
    values = np.asarray(arrays["value"], np.float64)[seen.start : seen.stop]
    logits = keys @ np.asarray(arrays["query"], np.float64) / math.sqrt(cell.head_dim)
    if cell.bias:
        logits += np.asarray(arrays["bias"], np.float64)[seen.start : seen.stop]
    weights = np.exp(logits - logits.max())
    exact = weights @ values / weights.sum()
    difference = np.asarray(output, np.float64) - exact
    return float(np.linalg.norm(difference) / np.linalg.norm(exact))
