"""The process that runs peers: jobs come in as lines of JSON, stages and measurements go out.

Run as `python -m benchmarks.worker FAMILY LOCK`. FAMILY is the module that prepares calls. LOCK is
a file that a worker holds alone while it measures, and shares with others while it compiles: XLA
tries products on the device then, beside which nothing is to be timed. Where XLA's flags keep it
from that (`--xla_gpu_autotune_level=0`) JAX compiles beside what others measure.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import os
import sys
from collections.abc import Generator
from dataclasses import asdict
from typing import Any, TextIO

from benchmarks.jobs import Job, Measuring, reason_of
from benchmarks.results import Measurement


class Lines:
    """Tells the parent process, one line of JSON an event."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def say(self, event: str, **fields: Any) -> None:
        self._out.write(json.dumps({"event": event, **fields}) + "\n")
        self._out.flush()

    def stage(self, peer: str, stage: str) -> None:
        self.say("stage", peer=peer, stage=stage)

    def result(self, measurement: Measurement) -> None:
        self.say("result", measurement=asdict(measurement))


def main(family_name: str, lock_path: str) -> None:
    """Serves jobs from standard input until it ends."""
    # Libraries print; only this process's own lines may reach the parent.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    report = Lines(out)
    try:
        family: Any = importlib.import_module(family_name)
        facts = dict(family.facts())
    except Exception as error:  # a broken installation can raise anything
        report.say("hello", broken=reason_of(error))
        return
    report.say("hello", facts=facts)
    tried_on_device = not (
        family_name == "benchmarks.jax_calls"
        and "--xla_gpu_autotune_level=0" in os.environ.get("XLA_FLAGS", "").split()
    )
    with open(lock_path, "w") as lock:

        @contextlib.contextmanager
        def device(*, alone: bool) -> Generator[None]:
            if alone or tried_on_device:
                fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
            try:
                yield
            finally:
                fcntl.flock(lock, fcntl.LOCK_UN)

        for line in sys.stdin:
            measuring = Measuring(Job.from_json(json.loads(line)), family, report, device)
            measuring.run()
            report.say("done", spent=measuring.spent)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(*sys.argv[1:])
