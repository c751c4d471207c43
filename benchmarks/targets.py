"""What a preset promises: speed next to a peer, memory under a bound; and whether a run kept it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.cells import Pass
from benchmarks.results import Run, Verdict

__all__ = ["Growth", "Memory", "More", "Pace", "Rate", "Speed", "Target", "Time", "verdicts"]


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
        return Verdict(text, self.at_least, ratio, ratio is not None and ratio >= self.at_least)


@dataclass(frozen=True)
class Rate:
    """`peer` does at least so many TFLOP/s, as `Cell.flops` counts them."""

    cell: str
    which: Pass
    peer: str
    at_least: float

    @property
    def cells(self) -> tuple[str, ...]:
        return (self.cell,)

    def verdict(self, run: Run) -> Verdict:
        own = run.get(self.cell, self.peer, self.which)
        rate = None
        if own is not None and own.ms:
            rate = run.cells[self.cell].flops(self.which) / own.ms / 1e9
        text = f"{self.cell} {self.which}: TFLOP/s of {self.peer}"
        return Verdict(text, self.at_least, rate, rate is not None and rate >= self.at_least)


@dataclass(frozen=True)
class Time:
    """`peer` takes at most so many milliseconds."""

    cell: str
    which: Pass
    peer: str
    at_most_ms: float

    @property
    def cells(self) -> tuple[str, ...]:
        return (self.cell,)

    def verdict(self, run: Run) -> Verdict:
        own = run.get(self.cell, self.peer, self.which)
        ms = None if own is None else own.ms
        text = f"{self.cell} {self.which}: milliseconds of {self.peer}, at most"
        return Verdict(text, self.at_most_ms, ms, ms is not None and ms <= self.at_most_ms)


@dataclass(frozen=True)
class More:
    """A pass of `peer` takes at most so many milliseconds more than another, which it includes."""

    cell: str
    which: Pass
    than: Pass
    peer: str
    at_most_ms: float

    @property
    def cells(self) -> tuple[str, ...]:
        return (self.cell,)

    def verdict(self, run: Run) -> Verdict:
        more = _more(run, self)
        text = f"{self.cell} {self.which}: milliseconds of {self.peer} more than {self.than}"
        text += "'s, at most"
        return Verdict(text, self.at_most_ms, more, more is not None and more <= self.at_most_ms)


@dataclass(frozen=True)
class Pace:
    """What a pass of `peer` does beside another runs at least at this share of the other's rate."""

    cell: str
    which: Pass
    than: Pass
    peer: str
    at_least: float

    @property
    def cells(self) -> tuple[str, ...]:
        return (self.cell,)

    def verdict(self, run: Run) -> Verdict:
        share, more = None, _more(run, self)
        base = run.get(self.cell, self.peer, self.than)
        if more and base is not None and base.ms:
            of_cell = run.cells[self.cell].flops
            rate = (of_cell(self.which) - of_cell(self.than)) / more
            share = rate / (of_cell(self.than) / base.ms)
        text = f"{self.cell} {self.which}: rate of {self.peer} beside {self.than}, over that of it"
        return Verdict(text, self.at_least, share, share is not None and share >= self.at_least)


@dataclass(frozen=True)
class Memory:
    """The compiled pass of `peer` takes at most so much temporary memory."""

    cell: str
    which: Pass
    peer: str
    at_most_mib: float

    @property
    def cells(self) -> tuple[str, ...]:
        return (self.cell,)

    def verdict(self, run: Run) -> Verdict:
        taken = _temp_bytes(run, self.cell, self.peer, self.which)
        mib = None if taken is None else taken / 2**20
        text = f"{self.cell} {self.which}: temporary MiB of {self.peer}, at most"
        return Verdict(text, self.at_most_mib, mib, mib is not None and mib <= self.at_most_mib)


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
        return Verdict(text, self.at_most, growth, growth is not None and growth <= self.at_most)


type Target = Speed | Rate | Time | More | Pace | Memory | Growth


def verdicts(targets: Iterable[Target], run: Run, cells: Iterable[str]) -> list[Verdict]:
    """The verdicts on those targets whose cells the run was asked for."""
    asked = set(cells)
    return [target.verdict(run) for target in targets if asked.issuperset(target.cells)]


def _more(run: Run, of: More | Pace) -> float | None:
    own, base = (run.get(of.cell, of.peer, which) for which in (of.which, of.than))
    if own is None or base is None or own.ms is None or base.ms is None:
        return None
    return own.ms - base.ms


def _temp_bytes(run: Run, cell: str, peer: str, which: Pass) -> int | None:
    measurement = run.get(cell, peer, which)
    return None if measurement is None else measurement.temp_bytes
