"""What a preset promises: speed next to a peer, memory under a bound; and whether a run kept it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.cells import Pass
from benchmarks.results import Run, Verdict

__all__ = ["Growth", "Memory", "More", "Pace", "Rate", "Speed", "Target", "Time", "verdicts"]


class _OfOneCell:
    cell: str

    @property
    def cells(self) -> tuple[str, ...]:
        return (self.cell,)


@dataclass(frozen=True)
class Speed:
    """`peer` is at least this many times as fast as the best of `against`.

    The best is sought in the same cell, or in `against_cell` where that is another.
    """

    cell: str
    which: Pass
    peer: str
    at_least: float
    against: tuple[str, ...]
    against_cell: str | None = None

    @property
    def cells(self) -> tuple[str, ...]:
        return (self.cell, self.against_cell or self.cell)

    def verdict(self, run: Run) -> Verdict:
        own = run.get(self.cell, self.peer, self.which)
        other = run.best(self.against_cell or self.cell, self.against, self.which)
        ratio = None
        if own is not None and own.ms and other is not None and other.ms is not None:
            ratio = other.ms / own.ms
        where = f" in {self.against_cell}" if self.against_cell else ""
        others = " or ".join(self.against)
        text = f"{self.cell} {self.which}: speed of {self.peer} over {others}{where}"
        return _at_least(self.at_least, ratio, text)


@dataclass(frozen=True)
class Rate(_OfOneCell):
    """`peer` does at least so many TFLOP/s, as `Cell.flops` counts them."""

    cell: str
    which: Pass
    peer: str
    at_least: float

    def verdict(self, run: Run) -> Verdict:
        own = run.get(self.cell, self.peer, self.which)
        rate = None
        if own is not None and own.ms:
            rate = run.cells[self.cell].flops(self.which) / own.ms / 1e9
        text = f"{self.cell} {self.which}: TFLOP/s of {self.peer}"
        return _at_least(self.at_least, rate, text)


@dataclass(frozen=True)
class Time(_OfOneCell):
    """`peer` takes at most so many milliseconds."""

    cell: str
    which: Pass
    peer: str
    at_most_ms: float

    def verdict(self, run: Run) -> Verdict:
        own = run.get(self.cell, self.peer, self.which)
        ms = None if own is None else own.ms
        text = f"{self.cell} {self.which}: milliseconds of {self.peer}, at most"
        return _at_most(self.at_most_ms, ms, text)


@dataclass(frozen=True)
class More(_OfOneCell):
    """A pass of `peer` takes at most so many milliseconds more than another, which it includes."""

    cell: str
    which: Pass
    than: Pass
    peer: str
    at_most_ms: float

    def verdict(self, run: Run) -> Verdict:
        more = _more(run, self)
        text = f"{self.cell} {self.which}: milliseconds of {self.peer} more than {self.than}"
        text += "'s, at most"
        return _at_most(self.at_most_ms, more, text)


@dataclass(frozen=True)
class Pace(_OfOneCell):
    """What a pass of `peer` does beside another runs at least at this share of the other's rate."""

    cell: str
    which: Pass
    than: Pass
    peer: str
    at_least: float

    def verdict(self, run: Run) -> Verdict:
        share, more = None, _more(run, self)
        base = run.get(self.cell, self.peer, self.than)
        if more and base is not None and base.ms:
            of_cell = run.cells[self.cell].flops
            rate = (of_cell(self.which) - of_cell(self.than)) / more
            share = rate / (of_cell(self.than) / base.ms)
        text = f"{self.cell} {self.which}: rate of {self.peer} beside {self.than}, over that of it"
        return _at_least(self.at_least, share, text)


@dataclass(frozen=True)
class Memory(_OfOneCell):
    """The compiled pass of `peer` takes at most so much temporary memory."""

    cell: str
    which: Pass
    peer: str
    at_most_mib: float

    def verdict(self, run: Run) -> Verdict:
        taken = _temp_bytes(run, self.cell, self.peer, self.which)
        mib = None if taken is None else taken / 2**20
        text = f"{self.cell} {self.which}: temporary MiB of {self.peer}, at most"
        return _at_most(self.at_most_mib, mib, text)


@dataclass(frozen=True)
class Growth:
    """Temporary memory grows at most so many times from `smaller` to `cell`."""

    cell: str
    smaller: str
    which: Pass
    peer: str
    at_most: float

    @property
    def cells(self) -> tuple[str, ...]:
        return (self.cell, self.smaller)

    def verdict(self, run: Run) -> Verdict:
        large = _temp_bytes(run, self.cell, self.peer, self.which)
        small = _temp_bytes(run, self.smaller, self.peer, self.which)
        growth = large / small if large is not None and small else None
        text = f"{self.cell} {self.which}: memory of {self.peer} over {self.smaller}'s, at most"
        return _at_most(self.at_most, growth, text)


type Target = Speed | Rate | Time | More | Pace | Memory | Growth


def verdicts(targets: Iterable[Target], run: Run, cells: Iterable[str]) -> list[Verdict]:
    """The verdicts on those targets whose cells the run was asked for."""
    asked = set(cells)
    return [target.verdict(run) for target in targets if asked.issuperset(target.cells)]


def _at_least(bound: float, measured: float | None, text: str) -> Verdict:
    return Verdict(text, bound, measured, measured is not None and measured >= bound)


def _at_most(bound: float, measured: float | None, text: str) -> Verdict:
    return Verdict(text, bound, measured, measured is not None and measured <= bound)


def _more(run: Run, of: More | Pace) -> float | None:
    own, base = (run.get(of.cell, of.peer, which) for which in (of.which, of.than))
    if own is None or base is None or own.ms is None or base.ms is None:
        return None
    return own.ms - base.ms


def _temp_bytes(run: Run, cell: str, peer: str, which: Pass) -> int | None:
    measurement = run.get(cell, peer, which)
    return None if measurement is None else measurement.temp_bytes
