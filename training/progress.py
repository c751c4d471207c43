"""What a run shows: a live bar on a terminal, plain lines everywhere else."""

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from training import processes

_PIPE_WIDTH = 120  # columns


class TrainingProgress:
    """Steps done out of `total`, with lines above the bar."""

    def __init__(self, console: Console, *, total: int, done: int) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=console.quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=total, completed=done, now="compiling")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, step: int, bits_per_byte: float) -> None:
        self._bar.update(self._task, completed=step, now=f"{bits_per_byte:.2f} bits/byte")

    def line(self, text: str) -> None:
        say(self._console, text)


def make_console() -> Console:
    """Standard output; where it is no terminal, wide enough for any table of the trainer.

    Of JAX's processes the first alone speaks.
    """
    console = Console(quiet=not processes.is_first())
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def say(console: Console, text: str) -> None:
    """One line, as written: no wrapping, no markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.file.flush()
