"""A job: peers to measure in one cell, whatever they do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from benchmarks.cells import Cell, Pass
from benchmarks.results import Measurement
from benchmarks.row_check import TOLERANCE

__all__ = ["Device", "Family", "Job", "Measuring", "Ready", "Reporter", "interleave", "reason_of"]


class Ready(Protocol):
    """One pass of one peer, ready to be timed; calling it runs it to its end."""

    compile_s: float
    temp_bytes: int | None

    def __call__(self) -> Any: ...
    def too_large(self) -> str | None: ...
    def error(self, result: Any) -> float | None: ...
    def device_times(self, repeats: int) -> tuple[list[float], str]: ...


class Family(Protocol):
    """What a module that prepares calls offers."""

    def facts(self) -> dict[str, Any]: ...
    def refusal(self, peer: str, cell: Cell) -> str | None: ...
    def prepare(self, peer: str, cell: Cell, which: Pass) -> Ready: ...


class Device(Protocol):
    """Waits for the device, and has it alone or beside others until the context ends."""

    def __call__(self, *, alone: bool) -> AbstractContextManager[Any]: ...


class Reporter(Protocol):
    """Hears what begins ("compile", "wait" for the device, "run") and what was measured."""

    def stage(self, peer: str, stage: str) -> None: ...
    def result(self, measurement: Measurement) -> None: ...


@dataclass(frozen=True)
class Job:
    """Peers to measure in one cell; on a CPU their timed calls take turns."""

    cell: Cell
    peers: tuple[str, ...]
    passes: tuple[Pass, ...]
    timed: bool
    repeats: int
    on_gpu: bool

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "cell": self.cell.to_json()}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Job:
        return cls(
            cell=Cell.from_json(fields["cell"]),
            peers=tuple(fields["peers"]),
            passes=tuple(fields["passes"]),
            timed=fields["timed"],
            repeats=fields["repeats"],
            on_gpu=fields["on_gpu"],
        )


class Measuring:
    """One job under way. What a peer raises becomes its reason, and it goes no further.

    spent: a call failed on the GPU, which may leave every later call of the process broken.
    """

    def __init__(
        self,
        job: Job,
        family: Family,
        report: Reporter,
        device: Device,
    ) -> None:
        self._job, self._family, self._report, self._device = job, family, report, device
        self._stopped: dict[str, str] = {}
        self.spent = False

    def run(self) -> None:
        """Measures every pass of every peer."""
        for which in self._job.passes:
            taking_turns: dict[str, tuple[Ready, Measurement]] = {}
            for peer in self._job.peers:
                call, known = self._first_call(peer, which)
                if call is None or not self._job.timed:
                    self._settle(known)
                elif self._job.on_gpu:
                    self._settle(self._timed_on_device(call, known))
                else:
                    taking_turns[peer] = call, known
            self._take_turns(taking_turns)

    def _settle(self, measurement: Measurement) -> None:
        if measurement.reason is not None:
            self._stopped[measurement.peer] = measurement.reason
        self._report.result(measurement)

    def _first_call(self, peer: str, which: Pass) -> tuple[Ready | None, Measurement]:
        """The call, warmed up and checked, and its measurement as yet without times."""
        known = Measurement(peer, which)
        if peer in self._stopped:
            return None, replace(known, reason=self._stopped[peer])
        try:
            with self._stage(peer, "compile", alone=False):
                reason = self._family.refusal(peer, self._job.cell)
                if reason is not None:
                    return None, replace(known, reason=reason)
                call = self._family.prepare(peer, self._job.cell, which)
        except Exception as error:  # a peer may fail in any way; the others go on
            return None, replace(known, reason=reason_of(error))
        known = replace(known, temp_bytes=call.temp_bytes, compile_s=round(call.compile_s, 3))
        if not self._job.timed:
            return call, known
        reason = call.too_large()
        if reason is not None:
            return None, replace(known, reason=reason)
        try:
            off = self._on_device(peer, lambda: call.error(call()))
        except Exception as error:  # as above
            return None, replace(known, reason=reason_of(error))
        if off is None:
            return call, known
        known = replace(known, error=float(f"{off:.2e}"))
        if off <= TOLERANCE:
            return call, known
        reason = f"wrong result: an output row is off by {off:.3g} of its norm"
        return None, replace(known, reason=reason)

    def _timed_on_device(self, call: Ready, known: Measurement) -> Measurement:
        def measured() -> tuple[list[float], str]:
            return call.device_times(self._job.repeats)

        try:
            times, timer = self._on_device(known.peer, measured)
        except Exception as error:  # as above
            return replace(known, reason=reason_of(error))
        return _with_times(known, times, timer)

    def _on_device[R](self, peer: str, work: Callable[[], R]) -> R:
        with self._stage(peer, "run", alone=True):
            try:
                return work()
            except Exception:
                self.spent = self._job.on_gpu
                raise

    @contextmanager
    def _stage(self, peer: str, stage: str, *, alone: bool) -> Generator[None]:
        self._report.stage(peer, "wait")
        with self._device(alone=alone):
            self._report.stage(peer, stage)
            yield

    def _take_turns(self, ready: dict[str, tuple[Ready, Measurement]]) -> None:
        calls = {peer: call for peer, (call, _) in ready.items()}
        found = interleave(
            calls, self._job.repeats, before=lambda peer: self._report.stage(peer, "run")
        )
        for peer, (_, known) in ready.items():
            times = found[peer]
            if isinstance(times, str):
                self._settle(replace(known, reason=times))
            else:
                self._settle(_with_times(known, times, "host clock, peers in turn"))


def interleave(
    calls: dict[str, Any], rounds: int, before: Callable[[str], None] = lambda peer: None
) -> dict[str, list[float] | str]:
    """Milliseconds of `rounds` calls of each, A B C, B C A, ...; the reason for one that raises.

    Turns are taken so that what else the machine does meets all of them alike.
    """
    found: dict[str, list[float] | str] = {peer: [] for peer in calls}
    names = list(calls)
    for i in range(rounds):
        shift = i % max(len(names), 1)
        for peer in names[shift:] + names[:shift]:
            times = found[peer]
            if isinstance(times, str):
                continue
            before(peer)
            start = time.perf_counter()
            try:
                calls[peer]()
            except Exception as error:  # as above
                found[peer] = reason_of(error)
            else:
                times.append((time.perf_counter() - start) * 1e3)
    return found


def reason_of(error: BaseException) -> str:
    """An exception as one line of bounded length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


def _with_times(known: Measurement, times: Sequence[float], timer: str) -> Measurement:
    return replace(
        known,
        ms=round(statistics.median(times), 5),
        min_ms=round(min(times), 5),
        max_ms=round(max(times), 5),
        samples=len(times),
        timer=timer,
    )
