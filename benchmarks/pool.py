"""Worker processes fed with jobs; one that hangs or dies costs its own measurement alone."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cells import Cell
from benchmarks.jobs import Job
from benchmarks.results import OUT_OF_TIME, Measurement

__all__ = ["JAX", "TORCH", "BrokenFamilyError", "Pool", "Worker"]

JAX, TORCH = "benchmarks.jax_calls", "benchmarks.torch_calls"

type OnResult = Callable[[Cell, Measurement], None]

_START_S = 180  # a process imports its framework and finds its device
_ROOT = Path(__file__).resolve().parents[1]


class BrokenFamilyError(Exception):
    """A family of peers cannot be imported."""


class Worker:
    """One process that runs peers of one family."""

    def __init__(self, family: str, lock: Path, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        search = [str(_ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, search)),
            # Several processes share the device's memory.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", family, str(lock)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            hello = self._next(_START_S) or {"broken": "its process ended at its start"}
        except queue.Empty:
            hello = {"broken": f"its process said nothing in {_START_S} s"}
        if "broken" in hello:
            self.stop()
            raise BrokenFamilyError(hello["broken"])
        self.facts: dict[str, Any] = hello["facts"]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._events.put(json.loads(line))
        self._events.put(None)

    def _next(self, timeout_s: float | None) -> dict[str, Any] | None:
        """The next event; None at the end of the process; queue.Empty when time is up."""
        return self._events.get(timeout=timeout_s)

    def run(self, job: Job, on_result: OnResult) -> Job | None:
        """Runs a job; None if all is well. Else the process is gone: what is left of the job."""
        stage, peer, reason = "start", job.peers[0], ""
        settled: set[tuple[str, str]] = set()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(job.to_json()) + "\n")
            self._process.stdin.flush()
            while True:
                # Another worker's turn on the device may last.
                event = self._next(None if stage == "wait" else self._timeout_s)
                if event is None:
                    reason = f"its process ended with status {self._process.wait()} in {stage}"
                    break
                if event["event"] == "done":
                    if not event["spent"]:
                        return None
                    self.stop()
                    return replace(job, peers=())
                if event["event"] == "stage":
                    stage, peer = event["stage"], event["peer"]
                else:
                    measurement = Measurement(**event["measurement"])
                    settled.add((measurement.peer, measurement.which))
                    on_result(job.cell, measurement)
        except queue.Empty:
            reason = f"nothing came of it in {self._timeout_s:.0f} s of {stage}"
        except BrokenPipeError:
            reason = f"its process ended with status {self._process.wait()} before it began"
        self.stop()
        for which in job.passes:
            if (peer, which) not in settled:
                on_result(job.cell, Measurement(peer, which, reason=reason))
        others = tuple(other for other in job.peers if other != peer)
        complete = {p for p in others if all((p, which) in settled for which in job.passes)}
        return replace(job, peers=tuple(p for p in others if p not in complete))

    def stop(self) -> None:
        """Ends the process, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


@dataclass
class Pool:
    """Runs jobs on several workers, each of one family.

    A finished measurement goes to `on_result`, from one thread at a time.
    """

    lock: Path
    timeout_s: float
    on_result: OnResult
    on_facts: Callable[[dict[str, Any]], None]
    deadline: float | None = None  # time.monotonic() after which no job begins

    def __post_init__(self) -> None:
        self._one_at_a_time = threading.Lock()

    def run(self, jobs: dict[str, list[Job]], workers: dict[str, list[Worker]], count: int) -> None:
        """Runs each family's jobs on at most `count` workers, of which some may be there."""
        threads = []
        for family, wanted in jobs.items():
            waiting = deque(wanted)
            started = list(workers.get(family, []))
            for _ in range(min(1 if family == TORCH else count, len(wanted))):
                worker = started.pop() if started else None
                serve = partial(self._serve, family, waiting, worker)
                threads.append(threading.Thread(target=serve, daemon=True))
        # A process that finds its device disturbs what another measures there.
        self._started = threading.Barrier(max(len(threads), 1))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _serve(self, family: str, waiting: deque[Job], worker: Worker | None) -> None:
        broken: str | None = None
        try:
            if worker is None:
                worker, broken = self._start(family)
            self._started.wait()
            while True:
                try:
                    job = waiting.popleft()
                except IndexError:
                    return
                if self.deadline is not None and time.monotonic() > self.deadline:
                    self._give_up(job, OUT_OF_TIME)
                    continue
                if worker is None and broken is None:
                    worker, broken = self._start(family)
                if worker is None:
                    self._give_up(job, broken or "")
                    continue
                rest = worker.run(job, self._report)
                if rest is not None:
                    worker = None
                    if rest.peers:
                        waiting.appendleft(rest)
        finally:
            if worker is not None:
                worker.stop()

    def _start(self, family: str) -> tuple[Worker | None, str | None]:
        """A worker, or why there can be none."""
        try:
            worker = Worker(family, self.lock, self.timeout_s)
        except BrokenFamilyError as error:
            return None, f"cannot be imported: {error}"
        with self._one_at_a_time:
            self.on_facts(worker.facts)
        return worker, None

    def _report(self, cell: Cell, measurement: Measurement) -> None:
        with self._one_at_a_time:
            self.on_result(cell, measurement)

    def _give_up(self, job: Job, reason: str) -> None:
        for peer in job.peers:
            for which in job.passes:
                self._report(job.cell, Measurement(peer, which, reason=reason))
