"""Small cells of the benchmark program, and runs that measured them."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from benchmarks.cells import Cell, Mask
from benchmarks.results import Measurement, Run

__all__ = ["SMALL", "cell", "mask_in_words", "run_with"]

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


def run_with(*measurements: tuple[Cell, Measurement]) -> Run:
    run = Run("cpu", "2026-01-02T03:04:05+00:00", {"platform": "cpu", "chip": "A Chip"}, {}, {})
    for shown, measurement in measurements:
        run.add(shown, measurement)
    return run
