"""Ctrl-C and SIGTERM ask for a stop at the next step; a second one ends the process at once."""

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from signal import SIG_DFL, SIGINT, SIGTERM, Signals, signal
from types import FrameType

from training import processes


@dataclasses.dataclass
class StopRequest:
    """Set once a signal came."""

    signal: Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    def anywhere(self) -> bool:
        """Whether a signal came to any of JAX's processes; from then on it has come to all."""
        if processes.are_several():
            number = max(map(int, processes.gather(str(int(self.signal or 0)))))
            self.signal = Signals(number) if number else None
        return bool(self)


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside, SIGINT and SIGTERM only set the request that is yielded."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # Python delivers signals to the main thread alone
        return

    def note(number: int, frame: FrameType | None) -> None:
        request.signal = Signals(number)
        signal(number, SIG_DFL)

    before = {number: signal(number, note) for number in (SIGINT, SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal(number, handler)
