"""Programs that need several devices, which a process has from its start or not at all.

To start one takes as long as many a program, so each of pytest's workers keeps its own, and sends
it the programs of all tests one after the other.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

__all__ = ["REPOSITORY", "STRICTLY", "run"]

REPOSITORY = Path(__file__).parents[1]
STRICTLY = "from tests.promotion import be_strict; be_strict()\n"

# What the process does with each line of its input; it answers with a line, empty if all was well.
_SERVER = f"""{STRICTLY}
import json, linecache, os, sys, traceback, warnings
answers = os.fdopen(int(sys.argv[1]), "w")
for number, line in enumerate(sys.stdin):
    name, text, said = f"<program {{number}}>", json.loads(line), ""
    linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name
    try:
        with warnings.catch_warnings():
            exec(compile(text, name, "exec"), {{"__name__": "__main__"}})
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code:
            said = traceback.format_exc()
    print(json.dumps(said), file=answers, flush=True)
"""
_MOST = 20  # programs of one process, whose compiled functions it keeps


class _Devices:
    """A process whose CPU is so many devices."""

    def __init__(self, devices: int) -> None:
        self._printed = tempfile.TemporaryFile("w+")  # noqa: SIM115 (until it ends)
        answers, its_end = os.pipe()
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} "
            f"--xla_force_host_platform_device_count={devices}",
            "NPROC": "64",  # interpreted kernels of each wait for each other on XLA's threads
        }
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, str(its_end)],
            cwd=REPOSITORY,
            env=env,
            stdin=subprocess.PIPE,
            stdout=self._printed,
            stderr=self._printed,
            text=True,
            pass_fds=[its_end],
        )
        os.close(its_end)
        self._answers = os.fdopen(answers)
        self.programs = 0
        atexit.register(self.end)

    def run(self, program: str, timeout: int) -> str:
        """What went wrong, with what the process printed if it ended or took too long."""
        self.programs += 1
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            print(json.dumps(program), file=self._process.stdin, flush=True)
        ready, _, _ = select.select([self._answers], [], [], timeout)
        answer = self._answers.readline() if ready else ""
        if answer:
            said: str = json.loads(answer)
            return said
        self._process.kill()
        self._printed.seek(0)
        ended = "it ended" if ready else f"it took more than {timeout} s"
        return f"{self._printed.read()}\n{ended}"

    def end(self) -> None:
        atexit.unregister(self.end)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        self._printed.close()


@cache
def _processes() -> dict[tuple[int, str], _Devices]:
    """By their number of devices and their kind."""
    return {}


def run(program: str, *, devices: int = 4, timeout: int = 300, kind: str = "") -> None:
    """Runs Python text in a process whose CPU is so many devices; fails with what went wrong.

    kind: of programs that change what others would find in their process, which those of a kind
      share.
    """
    kept, key = _processes(), (devices, kind)
    if key not in kept:
        kept[key] = _Devices(devices)
    process = kept[key]
    said = process.run(program, timeout)
    if said or process.programs == _MOST:
        kept.pop(key).end()
    assert not said, said[-3000:]
