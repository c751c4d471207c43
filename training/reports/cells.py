"""A report's cells, and how they come about: programs compiled, weighed and timed."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import jax

from models.implementations import AttnImplementation
from training.reports.place import Place
from training.reports.programs import Built, build_all, out_of_memory
from training.reports.running import Run
from training.units import bytes_text, seconds_text

Status = Literal["ok", "fits", "not timed", "too large", "out of memory", "unsupported"]

_MARGIN_GPU, _MARGIN_CPU = 1.1, 2.0  # on expected times; a CPU's first touch of memory takes long
_USABLE = 0.95  # of the free memory; the rest is for what runs beside it, and for gaps


@dataclasses.dataclass(frozen=True)
class Cell:
    """One implementation at one length; what could not be had is None and `note` says why."""

    implementation: AttnImplementation
    sequence_length: int
    rematerialized: bool | None = None  # of a whole step
    status: Status = "ok"
    note: str = ""
    temp_bytes: int | None = None  # the compiler's account; arguments and results not included
    total_bytes: int | None = None  # with arguments and results
    peak_bytes: int | None = None  # the allocator's account of the same, while it ran
    seconds: float | None = None  # best of three runs, one if that is long

    @property
    def series(self) -> str:
        """What it is at any length."""
        return f"{self.implementation}{', rematerialised' if self.rematerialized else ''}"

    @property
    def bytes_a_token(self) -> float | None:
        return None if self.temp_bytes is None else self.temp_bytes / self.sequence_length

    @property
    def tokens_per_second(self) -> float | None:
        return None if self.seconds is None else self.sequence_length / self.seconds


class RunOnce(Protocol):
    """Runs a compiled program; `running.run` with its arguments."""

    def __call__(self, program: Any, /, *, expected_bytes: int, deadline: float) -> Run: ...


@dataclasses.dataclass(frozen=True)
class Job:
    """A cell to be filled in."""

    cell: Cell
    lower: Callable[[], jax.stages.Lowered]
    run: RunOnce


@dataclasses.dataclass(frozen=True)
class Watch:
    """Who looks on."""

    stopped: Callable[[], bool] = lambda: False
    status: Callable[[str], None] = lambda text: None


def fill(jobs: Sequence[Job], place: Place, watch: Watch, *, seconds: float) -> list[Cell]:
    """The cells in the jobs' order: first all are compiled, then those that fit are timed.

    Args:
        jobs: of a series the shorter before the longer.
        place: what they are compiled for; nothing is timed where nothing can run.
        watch: told what goes on; an empty list comes back once it says to stop.
        seconds: time budget of the runs, which are taken as cheap ones first.
    """
    cells = [job.cell for job in jobs]
    programs: dict[int, Any] = {}
    # Last ones first: Mosaic's kernels stand last, and wait for each other in the compiler.
    lowers = [job.lower for job in reversed(jobs)]
    for done, (from_end, built) in enumerate(build_all(lowers, place), 1):
        if watch.stopped():
            return []
        number = len(jobs) - 1 - from_end
        cells[number] = _weighed(cells[number], built, place)
        programs[number] = built.program
        watch.status(f"compiled {done} of {len(jobs)}")
    deadline = time.perf_counter() + seconds
    waiting = [number for number, cell in enumerate(cells) if cell.status == "ok"]
    while waiting and not watch.stopped():
        number = min(waiting, key=lambda number: _expected(cells, number))
        margin = _MARGIN_GPU if place.is_gpu else _MARGIN_CPU
        if time.perf_counter() + margin * _expected(cells, number) > deadline:
            break
        watch.status(f"{cells[number].series}, T = {cells[number].sequence_length:,}")
        cells[number] = _timed(cells[number], jobs[number], programs[number], deadline)
        waiting.remove(number)
    for number in waiting:
        expected = _expected(cells, number)
        about = f"about {seconds_text(expected)}, " if expected else ""
        note = f"{about}more than the time budget has left"
        cells[number] = dataclasses.replace(cells[number], status="not timed", note=note)
    return [] if watch.stopped() else cells


def _weighed(cell: Cell, built: Built, place: Place) -> Cell:
    """What is known of a compiled program before it runs."""
    if built.memory is None:
        status: Status = "unsupported" if built.refusal else "out of memory"
        return dataclasses.replace(cell, status=status, note=built.refusal or built.out_of_memory)
    total = built.memory.total
    cell = dataclasses.replace(cell, temp_bytes=built.memory.temporary, total_bytes=total)
    free = place.free_bytes()
    if free is not None and total > _USABLE * free:
        note = f"needs {bytes_text(total)}, {bytes_text(free)} are free"
        return dataclasses.replace(cell, status="too large", note=note)
    return dataclasses.replace(cell, status="ok" if place.can_run else "fits")


def _expected(cells: Sequence[Cell], number: int) -> float:
    """Seconds of one run: at most four times those of half the length; 0 where none is known."""
    cell = cells[number]
    known = [
        (other.sequence_length, other.seconds)
        for other in cells
        if other.series == cell.series and other.seconds is not None
    ]
    length, seconds = max(known, default=(1, 0.0))
    return seconds * (cell.sequence_length / length) ** 2


def _timed(cell: Cell, job: Job, program: Any, deadline: float) -> Cell:
    assert cell.total_bytes is not None
    try:
        found = job.run(program, expected_bytes=cell.total_bytes, deadline=deadline)
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.replace(cell, status="out of memory", note=out_of_memory(error))
    return dataclasses.replace(cell, seconds=found.seconds, peak_bytes=found.peak_bytes)


def notes(cells: Sequence[Cell]) -> list[str]:
    """Why cells lack a number: a line for each series and status, the first cell's why."""
    alike: dict[tuple[str, Status], list[Cell]] = {}
    for cell in cells:
        if cell.note:
            alike.setdefault((cell.series, cell.status), []).append(cell)
    return [
        f"{series}, T = {' '.join(f'{cell.sequence_length:,}' for cell in found)}:"
        f" {status}: {found[0].note}"
        for (series, status), found in alike.items()
    ]
