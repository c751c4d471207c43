"""How a run's cells compare: the speed of flash over that of the best rival, cell by cell."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

from benchmarks.cells import Cell, Pass
from benchmarks.report import OURS
from benchmarks.results import Run

__all__ = ["Ratio", "sorted_ratios"]

OWN = "jattn/flash"


@dataclass(frozen=True)
class Ratio:
    """One cell and pass: `ratio` times as fast as `rival`, the fastest of the others."""

    cell: Cell
    which: Pass
    ms: float
    rival: str
    rival_ms: float

    @property
    def ratio(self) -> float:
        return self.rival_ms / self.ms


def sorted_ratios(run: Run) -> list[Ratio]:
    """Every cell and measured pass in which flash and a rival have a time, the worst first.

    The passes are those that were timed, forward and gradient (forward and backward in one call):
    their difference would add the noise of both.
    """
    rivals = [peer for peer in run.peers() if not fnmatch(peer, OURS)]
    found = []
    passes: tuple[Pass, ...] = ("forward", "gradient")
    for name, cell in run.cells.items():
        for which in passes:
            own, best = run.get(name, OWN, which), run.best(name, rivals, which)
            if own is not None and own.ms and best is not None and best.ms:
                found.append(Ratio(cell, which, own.ms, best.peer, best.ms))
    return sorted(found, key=lambda r: r.ratio)
