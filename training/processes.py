"""JAX's processes (`jax.distributed`), in each of which the whole trainer runs: they agree here.

All run the same programs in the same order, so what one finds out alone, such as a signal or a file
that is missing, each tells the others, and all go by what all said:

    process 0    decides, writes        |          | goes on, or refuses, as all do
                                        | together |
    process 1    decides                |          | goes on, or refuses, as all do
"""

import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from training.errors import REFUSALS, AgreedError, TrainingError, one_line

OPTIONS = ("--coordinator-address", "--num-processes", "--process-id")
"""What `join` takes, on the command line."""

_MOST = 4096  # bytes that a process says at once, so that one program is for all


def join(address: str | None, count: str | None, number: str | None) -> None:
    """Makes this process one of several, before JAX looks for devices.

    Args:
        address: host and port of process 0, the same in all; "auto": what Slurm, Open MPI and other
            schedulers that JAX knows say, in place of all three. None: there is one process.
        count: of processes.
        number: of this one, from 0.

    Raises:
        TrainingError: arguments are missing or wrong, or the others do not come.
        AgreedError: one has more devices than another.
    """
    if address is None:
        for option, value in zip(OPTIONS[1:], (count, number), strict=True):
            if value is not None:
                raise TrainingError(f"{option} goes with {OPTIONS[0]} HOST:PORT")
        return
    if address != "auto" and not address.rpartition(":")[2].isdecimal():
        raise TrainingError(f"{OPTIONS[0]} must be HOST:PORT or auto, got {address}")
    num_processes, process_id = _integer(OPTIONS[1], count), _integer(OPTIONS[2], number)
    try:
        jax.distributed.initialize(
            None if address == "auto" else address, num_processes, process_id
        )
    except (ValueError, RuntimeError) as error:
        is_unknown = address == "auto" and isinstance(error, ValueError)
        hint = " (JAX finds no scheduler here: name HOST:PORT)" if is_unknown else ""
        raise TrainingError(f"{OPTIONS[0]} {address}: {one_line(error)}{hint}") from error
    sys.excepthook = _leave_with_traceback
    devices = Counter(device.process_index for device in jax.devices())
    if len(set(devices.values())) > 1:
        found = ", ".join(str(devices[process]) for process in sorted(devices))
        raise AgreedError(f"processes must have as many devices each; they have {found}")


def are_several() -> bool:
    """Whether there are others."""
    return int(jax.process_count()) > 1


def leave(status: int) -> int:
    """Ends this process, which failed alone: JAX would have it wait for others, who wait for it.

    Returns the status if there are no others.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def is_first() -> bool:
    """Whether this is the one that writes and speaks."""
    return int(jax.process_index()) == 0


def gather(text: str) -> list[str]:
    """What each process says here, by their numbers; each waits for all."""
    if not are_several():
        return [text]
    own, said = text.encode()[:_MOST], np.zeros(_MOST, np.uint8)
    said[: len(own)] = np.frombuffer(own, np.uint8)
    rows = multihost_utils.process_allgather(said)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


def together[T](do: Callable[[], T]) -> T:
    """What this process makes of it, unless one of them refuses: then all do, in its words.

    Raises:
        AgreedError: one has.
    """
    if not are_several():
        return do()
    words, done = "", None
    try:
        done = do()
    except REFUSALS as error:
        words = one_line(error) or type(error).__name__
    for number, said in enumerate(gather(words)):
        if said:
            raise AgreedError(said if number == 0 else f"process {number}: {said}")
    return done  # type: ignore[return-value]


def check_alike(what: str, value: str) -> None:
    """AgreedError unless it is the same in all processes."""
    said = gather(value)
    for number, other in enumerate(said):
        if other != said[0]:
            raise AgreedError(f"process {number} has other {what} than process 0")


def _leave_with_traceback(*error: Any) -> None:
    traceback.print_exception(*error)
    leave(1)


def _integer(option: str, value: str | None) -> int | None:
    try:
        return None if value is None else int(value)
    except ValueError:
        raise TrainingError(f"{option} must be an integer, got {value}") from None
