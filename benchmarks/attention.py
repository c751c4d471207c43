"""Attention beside its peers: one command, one run, one table, one file of results.

    python benchmarks/attention.py                        the preset of this machine's device
    python benchmarks/attention.py --preset hopper-forward --peers jattn/flash jax.nn/cudnn
    python benchmarks/attention.py --preset all --part users --time-limit 540 --resume
    python benchmarks/attention.py --head-dim 64 128 --mask causal packed:8 --length 8192

A cell is one shape and mask, a peer one implementation. On an NVIDIA GPU a time is the median over
calls of the sum of their kernels' times (CUPTI), on a CPU the median of calls that take turns with
the other peers'. A peer that cannot do a cell is kept with its reason. `--resume` goes on where the
file of an earlier run of the machine ended; `benchmarks/merge.py` makes one file of several.
"""

from __future__ import annotations

import argparse
import inspect
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import matmul, merge, presets, report, targets
from benchmarks.cells import Cell
from benchmarks.jobs import Job
from benchmarks.plans import Preset
from benchmarks.pool import JAX, TORCH, BrokenFamilyError, Pool, Worker
from benchmarks.presets import PRESETS
from benchmarks.results import LEFT_OUT, NOT_REACHED, Measurement, Run

SHAPE_OPTIONS: dict[str, dict[str, Any]] = {
    "--head-dim": {"type": int, "nargs": "+"},
    "--mask": {
        "nargs": "+",
        "help": "full, causal, window:LEFT, packed:DOCUMENTS, documents:DOCUMENTS",
    },
    "--length": {"type": int, "nargs": "+", "help": "queries (T)"},
    "--keys": {"type": int, "help": "keys (S), where not as many as queries"},
    "--batch": {"type": int, "help": "rows, instead of a token budget"},
    "--tokens": {"type": int, "help": "rows x length"},
    "--width": {"type": int, "help": "heads x head dim"},
    "--heads": {"type": int, "help": "query heads, instead of a width"},
    "--kv-heads": {"type": int, "help": "key and value heads"},
    "--window": {"type": int, "help": "the window of the preset cpu"},
    "--dtype": {"choices": ["bfloat16", "float16", "float32"], "help": "of all arrays"},
    "--bias": {"action": "store_true", "default": None, "help": "a bias (1, N, T, S)"},
    "--dropout": {"type": float, "help": "dropout rate"},
    "--passes": {"nargs": "+", "choices": ["forward", "gradient", "jvp", "jvp-gradient", "hvp"]},
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; shape options that were not given are None."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    preset = "what is measured; custom: the shapes below (the one for this machine's device)"
    parser.add_argument("--preset", choices=[*PRESETS, "custom"], help=preset)
    parser.add_argument("--part", nargs="+", default=[], help="run only these parts of the preset")
    parser.add_argument("--resume", action="store_true", help="only what the file lacks")
    parser.add_argument("--cells", nargs="+", default=[], help="run only these (part of the name)")
    parser.add_argument("--peers", nargs="+", default=[], help="run only these, in every cell")
    parser.add_argument("--repeats", type=int, help="timed calls (GPU: 15, CPU: 7)")
    parser.add_argument("--workers", type=int, help="processes that compile (GPU: 4, CPU: 1)")
    parser.add_argument("--timeout", type=float, default=90, help="seconds one step may take")
    parser.add_argument("--time-limit", type=float, help="seconds after which no cell begins")
    parser.add_argument("--out", type=Path, help="result file, or folder to name it in")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    shape = parser.add_argument_group("shape: a grid of cells, or sizes of the preset named")
    for name, settings in SHAPE_OPTIONS.items():
        shape.add_argument(name, **settings)
    return parser.parse_args(arguments)


def chosen_preset(asked: argparse.Namespace, *, on_gpu: bool) -> tuple[str, Preset]:
    """The preset by name, else a grid if a shape is given, else the device's own."""
    names = [name.strip("-").replace("-", "_") for name in SHAPE_OPTIONS]
    shape = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    name = asked.preset or ("custom" if shape else "hopper-forward" if on_gpu else "cpu")
    if name == "custom":
        shape["peers"] = presets.FAST_PEERS + presets.SLOW_PEERS if on_gpu else presets.CPU_PEERS
    build = PRESETS.get(name, presets.custom)
    unknown = shape.keys() - inspect.signature(build).parameters.keys()
    if unknown:
        options = ", ".join("--" + option.replace("_", "-") for option in sorted(unknown))
        _fail(f"the preset {name} has no {options}")
    try:
        return name, build(**shape)
    except ValueError as error:
        _fail(str(error))


def plan(
    preset: Preset, asked: argparse.Namespace, run: Run, *, on_gpu: bool
) -> dict[str, list[Job]]:
    """Jobs by family of peers; peers that the preset leaves out of a cell go into the run so."""
    every = (*preset.peers, *(p for p in _known_peers() if asked.peers and p not in preset.peers))
    named = [p for p in every if report.matches(p, asked.peers)]
    unknown = set(asked.part) - set(preset.parts)
    if unknown:
        has = f"has {', '.join(preset.parts)}" if preset.parts else "has none"
        _fail(f"no part {', '.join(sorted(unknown))}: the preset {run.preset} {has}")
    jobs: dict[str, list[Job]] = {}
    for plan in preset.plans:
        if asked.part and plan.part not in asked.part:
            continue
        if not report.matches(plan.cell.name, asked.cells):
            continue
        peers = [p for p in named if asked.peers or p in plan.peers]
        for peer, which in product(named, plan.passes):
            reason = NOT_REACHED if peer in peers else LEFT_OUT
            if not run.settled(plan.cell.name, peer, which):
                run.add(plan.cell, Measurement(peer, which, reason=reason))
        peers = [
            p for p in peers if not all(run.settled(plan.cell.name, p, w) for w in plan.passes)
        ]
        repeats = asked.repeats or plan.repeats or (15 if on_gpu else 7)
        for family in (JAX, TORCH):
            own = tuple(p for p in peers if p.startswith("torch/") == (family == TORCH))
            # On a CPU the peers of a cell take turns in one job.
            for together in [(p,) for p in own] if on_gpu else [own] if own else []:
                job = Job(
                    plan.cell,
                    together,
                    plan.passes,
                    timed=plan.timed,
                    repeats=repeats,
                    on_gpu=on_gpu,
                )
                jobs.setdefault(family, []).append(job)
    if not jobs and not (asked.resume and run.cells):
        given = {"--cells": asked.cells, "--peers": asked.peers}
        asks = " ".join(word for name, x in given.items() if x for word in (name, *x))
        _fail(f"no cell and peer match {asks}; the peers are {', '.join(every)}")
    return jobs


def machine(facts: dict[str, Any]) -> dict[str, Any]:
    """What the numbers depend on and the packages do not say."""
    found = {"platform": facts["platform"], "chip": facts["chip"]}
    if facts["platform"] == "cpu":
        found["chip"] = _cpu_name()
        found["cores"] = f"{len(os.sched_getaffinity(0))} cores"
        found["load_average"] = [os.getloadavg()[0]] * 2
    else:
        wanted = "--query-gpu=driver_version,memory.total"
        query = ["nvidia-smi", wanted, "--format=csv,noheader,nounits"]
        try:
            asked = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
            driver, memory = asked.stdout.splitlines()[0].split(", ")
            found["driver"], found["memory_bytes"] = f"driver {driver}", int(memory) * 2**20
        except (OSError, subprocess.SubprocessError, ValueError, IndexError):
            found["driver"] = "driver unknown"
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, keeps and prints; the exit status."""
    asked = parse(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as ending:
        lock = Path(folder) / "device"
        try:
            worker = Worker(JAX, lock, asked.timeout)
        except BrokenFamilyError as error:
            _fail(f"jax cannot be used: {error}")
        ending.callback(worker.stop)  # no job may have been JAX's
        on_gpu = worker.facts["platform"] == "gpu"
        name, preset = chosen_preset(asked, on_gpu=on_gpu)
        run = Run(
            preset=name,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            machine=machine(worker.facts),
            versions={"python": sys.version.split()[0], **worker.facts["versions"]},
            protocol={
                "time": "median of the timed calls, after one untimed call",
                "backward": "gradient - forward, medians",
                "order": "peers take turns" if not on_gpu else "peers one after the other",
            },
        )
        if on_gpu:
            run.machine["matmul_tflops"] = matmul.measured_apart()
        out = asked.out or Path(__file__).resolve().parent / "results"
        path = out if out.suffix == ".json" else out / run.file_name()
        if asked.resume and path.exists():
            try:
                run = merge.merged([Run.load(path), run])
            except ValueError as error:
                _fail(f"cannot resume {path}: {error}")
        jobs = plan(preset, asked, run, on_gpu=on_gpu)

        def keep(cell: Cell, measurement: Measurement) -> None:
            run.add(cell, measurement)
            run.save(path)
            _progress(cell, measurement, time.monotonic() - began)

        limit = None if asked.time_limit is None else began + asked.time_limit
        pool = Pool(lock, asked.timeout, keep, lambda f: run.versions.update(f["versions"]), limit)
        count = asked.workers or (4 if on_gpu else 1)
        interrupted = False
        try:
            pool.run(jobs, {JAX: [worker]}, count)
        except KeyboardInterrupt:
            interrupted, pool.deadline = True, began
    if not on_gpu:
        run.machine["load_average"][1] = os.getloadavg()[0]
    run.verdicts = targets.verdicts(preset.targets, run, run.cells)
    run.save(path)
    print(report.everything(run))
    print(f"\nnot measured:\n{report.reasons(run)}" if report.reasons(run) else "")
    print(f"{time.monotonic() - began:.0f} s, kept in {path}")
    if interrupted:
        return 130
    return int(asked.check and not all(verdict.met for verdict in run.verdicts))


def _known_peers() -> tuple[str, ...]:
    return (*presets.FAST_PEERS, *presets.SLOW_PEERS, "flash-attn3-jax", "jattn/cudnn")


def _progress(cell: Cell, measurement: Measurement, seconds: float) -> None:
    told = measurement.reason
    if told is None and measurement.ms is not None:
        told = f"{measurement.ms:.3f} ms ({measurement.min_ms:.3f} to {measurement.max_ms:.3f})"
    text = told or f"{(measurement.temp_bytes or 0) / 2**20:.1f} MiB"
    label = f"[{seconds:4.0f} s] {cell.name} {measurement.peer} {measurement.which}"
    print(f"{label}: {text}", file=sys.stderr, flush=True)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"


def _fail(message: str) -> NoReturn:
    print(f"attention.py: {message}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
