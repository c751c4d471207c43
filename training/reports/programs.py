"""Programs compiled ahead, several at once, and what the compiler says of their memory."""

import concurrent.futures
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from jattn import UnsupportedAttentionError
from training import compiler
from training.errors import one_line
from training.program_memory import Memory, memory_of
from training.reports.place import Place
from training.reports.without_kernels import leave_out


@dataclasses.dataclass(frozen=True)
class Built:
    """A compiled program, or why there is none."""

    program: Any  # jax.stages.Compiled, or None
    memory: Memory | None
    refusal: str = ""
    out_of_memory: str = ""


def build(lower: Callable[[], jax.stages.Lowered], place: Place) -> Built:
    """Lowers and compiles one program."""
    return _compiled(_lowered(lower, place), place)


def build_all(
    lowers: Iterable[Callable[[], jax.stages.Lowered]], place: Place
) -> Iterator[tuple[int, Built]]:
    """Compiles all, in threads; yields each with its number when it is there, in any order.

    Tracing is Python, one thread's work at a time and this one's; a place that is a context of
    this thread is seen by it alone.
    """
    with concurrent.futures.ThreadPoolExecutor(_cores()) as pool:
        waiting: dict[concurrent.futures.Future[Built], int] = {}
        try:
            for number, lower in enumerate(lowers):
                waiting[pool.submit(_compiled, _lowered(lower, place), place)] = number
                yield from _finished(waiting, wait=False)
            while waiting:
                yield from _finished(waiting, wait=True)
        finally:
            for future in waiting:
                future.cancel()


def _cores() -> int:
    known = getattr(os, "sched_getaffinity", None)  # there is none on macOS
    return len(known(0)) if known is not None else os.cpu_count() or 1


def _finished(
    waiting: dict[concurrent.futures.Future[Built], int], *, wait: bool
) -> Iterator[tuple[int, Built]]:
    done, _ = concurrent.futures.wait(
        waiting,
        timeout=None if wait else 0,
        return_when=concurrent.futures.FIRST_COMPLETED,
    )
    for future in done:
        yield waiting.pop(future), future.result()


def _lowered(lower: Callable[[], jax.stages.Lowered], place: Place) -> jax.stages.Lowered | Built:
    try:
        lowered = lower()
    except UnsupportedAttentionError as error:
        return Built(None, None, refusal=one_line(error))
    return lowered if place.can_run else leave_out(lowered)


def _compiled(lowered: jax.stages.Lowered | Built, place: Place) -> Built:
    if isinstance(lowered, Built):
        return lowered
    try:
        program = lowered.compile(
            compiler_options=compiler.options(is_gpu=place.is_gpu, runs=place.can_run)
        )
    except jax.errors.JaxRuntimeError as error:
        return Built(None, None, out_of_memory=out_of_memory(error))
    return Built(program, memory_of(program))


def out_of_memory(error: jax.errors.JaxRuntimeError) -> str:
    """The error's text in a line, if it is about memory; raises any other again."""
    if "RESOURCE_EXHAUSTED" not in str(error) and "out of memory" not in str(error).lower():
        raise error
    return one_line(error)[:200]
