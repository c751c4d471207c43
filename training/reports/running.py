"""One program run on this device: how long it takes, and what the allocator gave out for it.

The allocator counts what is in use and its highest mark since the process began. To see how high
one program goes, arrays fill what lies between what is in use and that mark while it runs first:

    mark now   |........................ ----- what the program takes, rising above the mark
    ballast    |=====================
    arguments  |---
    in use     |----------
"""

import dataclasses
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Arguments = TypeVar("Arguments")

_REPEATS = 3
_LONG = 0.5  # seconds after which one run is measure enough
_SLACK = 0.1  # of a program's memory, by which the compiler's account may be too high
_BLOCK = 1 << 28  # bytes of ballast in one array


@dataclasses.dataclass(frozen=True)
class Run:
    """What was measured."""

    seconds: float  # best of three runs, one if that is long
    peak_bytes: int | None  # arguments and results too; None where that is not counted


def run[Arguments](
    execute: Callable[[Arguments], Arguments],
    make_arguments: Callable[[], Arguments],
    *,
    expected_bytes: int,
    deadline: float,
) -> Run:
    """Runs a program up to three times, a further time only if it ends before the deadline.

    Args:
        execute: runs it to its end; returns the arguments of the next run.
        make_arguments: those of the first.
        expected_bytes: what the program takes in all, as its compiler says.
        deadline: of `time.perf_counter`.

    Raises:
        jax.errors.JaxRuntimeError: of memory, mostly.
    """
    empty = _counted("bytes_in_use")
    arguments = jax.block_until_ready(make_arguments())
    beside = _counted("bytes_in_use")
    ballast = _ballast(expected_bytes - (beside - empty))
    beside = _counted("bytes_in_use") - beside  # an array may have a larger piece than it asked for
    mark = _counted("peak_bytes_in_use")
    seconds, arguments = _timed(execute, arguments)
    peak = _counted("peak_bytes_in_use")
    own = peak - empty - beside
    del ballast
    for _ in range(_REPEATS - 1):
        if seconds > _LONG or time.perf_counter() + seconds > deadline:
            break
        again, arguments = _timed(execute, arguments)
        seconds = min(seconds, again)
    return Run(seconds, own if peak > mark else None)


def _timed[Arguments](
    execute: Callable[[Arguments], Arguments], arguments: Arguments
) -> tuple[float, Arguments]:
    started = time.perf_counter()
    arguments = execute(arguments)
    return time.perf_counter() - started, arguments


def _counted(name: str) -> int:
    """One of the allocator's counts, 0 where it has none."""
    return int((jax.devices()[0].memory_stats() or {}).get(name, 0))


def _ballast(coming: int) -> list[jax.Array]:
    """Arrays that bring the mark in reach of a program which takes so much; none if that fails."""
    missing = _counted("peak_bytes_in_use") - _counted("bytes_in_use") - (1 - _SLACK) * coming
    room = _counted("bytes_limit") - _counted("bytes_in_use") - coming
    if not 0 < missing < room:
        return []
    blocks, rest = divmod(int(missing), _BLOCK)
    arrays = [jnp.zeros(_BLOCK, jnp.uint8) for _ in range(blocks)]
    arrays.append(jax.device_put(np.zeros(rest, np.uint8)))
    jax.block_until_ready(arrays)
    return arrays
