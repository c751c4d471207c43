"""Attention over a sequence that several devices share, beside one device: the rate of each.

    python benchmarks/context_parallel.py --devices 2 --length 65536 262144
    python benchmarks/context_parallel.py --schedule ring gather --overlap 1 4 --mask causal

A cell is a shape and mask as in `benchmarks/attention.py`, a peer a number of devices, a schedule
("auto" is jattn's own choice) and how many transfers XLA may have under way at once, if not one. A
time is by the host's clock, the median of rounds in which short calls are asked for one after
another and waited for together, as a training step asks for its layers: what a device waits for the
host between two calls is in none of them. temp_bytes is one device's. Efficiency is one device's
time over n times that of n devices.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jattn
from benchmarks.cells import Cell, Mask, Pass
from benchmarks.jax_calls import facts
from benchmarks.jax_peers import DIFFERENTIABLE, Arrays, arrays_of
from benchmarks.results import Measurement, Run, Verdict

PASSES: tuple[Pass, ...] = ("forward", "gradient")
ONE = "1"
# Of one device's rate, on each of several: kinds of mask, and passes.
BARS: dict[tuple[str, Pass], float] = {
    ("causal", "forward"): 0.88,
    ("causal", "gradient"): 0.92,
    ("full", "forward"): 0.88,
    ("full", "gradient"): 0.92,
    ("documents", "forward"): 0.82,
    ("documents", "gradient"): 0.82,
}
_OVERLAP = "xla_gpu_experimental_parallel_collective_overlap_limit"
_TIMED_S = 0.6  # of calls of one pass, in all
_WARM_UP = 3  # calls, of which the first loads the program and links the devices
_ROUND_MS = 40.0  # of calls that are waited for together
_MOST_QUEUED = 8


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, default=2, help="that share a sequence")
    parser.add_argument("--length", type=int, nargs="+", default=[65_536, 262_144])
    parser.add_argument("--mask", nargs="+", default=["causal", "full", "documents:8"])
    parser.add_argument(
        "--heads", nargs="+", default=["16/16", "32/8"], help="query heads/key heads"
    )
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--schedule", nargs="+", default=["auto"], choices=["auto", "ring", "gather"]
    )
    parser.add_argument(
        "--overlap", type=int, nargs="+", default=[1], help="transfers that XLA may have under way"
    )
    parser.add_argument("--threads", type=int, default=8, help="that compile")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls, at most")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    return parser.parse_args(arguments)


def cells(asked: argparse.Namespace) -> Iterator[Cell]:
    """Each combination of what was asked for."""
    for length, mask, heads in product(asked.length, asked.mask, asked.heads):
        query_heads, kv_heads = map(int, heads.split("/"))
        yield Cell(
            batch=1, queries=length, keys=length, heads=query_heads, kv_heads=kv_heads,
            head_dim=asked.head_dim, mask=Mask.parse(mask), dtype=asked.dtype,
        )  # fmt: skip


def attend(cell: Cell, mesh: Mesh | None, schedule: str) -> Callable[[Arrays], jax.Array]:
    """The cell's call on one device, or on each device's part."""
    window = (cell.mask.size, 0) if cell.mask.kind == "window" else None

    attention: Callable[..., Any] = jattn.dot_product_attention

    def call(arrays: Arrays) -> jax.Array:
        causal = cell.mask.kind != "full"
        found: jax.Array = attention(**arrays, is_causal=causal, local_window_size=window)
        return found

    if mesh is None or schedule == "auto":
        return call

    def own(arrays: Arrays) -> jax.Array:
        with jattn.context_parallel("sequence", schedule=schedule):  # type: ignore[arg-type]
            return call(arrays)

    cut = P(None, "sequence")
    mapped: Callable[[Arrays], jax.Array] = jax.shard_map(
        own, mesh=mesh, in_specs=cut, out_specs=cut
    )
    return mapped


@dataclass(frozen=True)
class Job:
    """One pass of a cell, on one device (no mesh) or cut over the mesh's."""

    cell: Cell
    which: Pass
    mesh: Mesh | None
    schedule: str = "auto"
    overlap: int = 1

    @property
    def peer(self) -> str:
        """As results name it."""
        if self.mesh is None:
            return ONE
        overlap = f"/overlap{self.overlap}" if self.overlap > 1 else ""
        return f"{self.mesh.size}/{self.schedule}{overlap}"

    def arguments(self, arrays: Arrays) -> tuple[Arrays, ...]:
        """What the program takes."""
        if self.which == "forward":
            return (arrays,)
        moving = {name: x for name, x in arrays.items() if name in DIFFERENTIABLE}
        return moving, {name: x for name, x in arrays.items() if name not in moving}

    def lowered(self) -> jax.stages.Lowered:
        """The program."""
        forward = attend(self.cell, self.mesh, self.schedule)

        def gradient(moving: Arrays, fixed: Arrays) -> Any:
            out, backward = jax.vjp(lambda moving: forward(moving | fixed), moving)
            return out, backward(jnp.ones_like(out))

        function: Callable[..., Any] = forward if self.which == "forward" else gradient
        shapes = jax.eval_shape(lambda: arrays_of(self.cell))
        if self.mesh is not None:
            place = NamedSharding(self.mesh, P(None, "sequence"))
            shapes = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
            )
        return jax.jit(function).lower(*self.arguments(shapes))

    def compiled(self, lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
        """The program, and the seconds that it took."""
        start = time.perf_counter()
        options = {_OVERLAP: self.overlap} if self.overlap > 1 else None
        return lowered.compile(compiler_options=options), time.perf_counter() - start


def measured(
    job: Job, arrays: Arrays, program: Future[tuple[jax.stages.Compiled, float]], repeats: int
) -> Measurement:
    """The job's numbers, or the reason why there are none."""
    try:
        compiled, compile_s = program.result()
        if job.mesh is not None:
            arrays = jax.device_put(arrays, NamedSharding(job.mesh, P(None, "sequence")))
        arguments = job.arguments(arrays)
        last = spent = _round_ms(compiled, arguments, 1)
        for _ in range(_WARM_UP - 1):
            if spent < 1e3 * _TIMED_S:
                last = _round_ms(compiled, arguments, 1)
                spent += last
        calls = max(1, min(_MOST_QUEUED, round(_ROUND_MS / last)))
        times: list[float] = []
        while len(times) < 2 or (len(times) < repeats and sum(times) * calls < 1e3 * _TIMED_S):
            times.append(_round_ms(compiled, arguments, calls))
    except (jax.errors.JaxRuntimeError, jattn.UnsupportedAttentionError) as error:
        return Measurement(job.peer, job.which, reason=str(error).splitlines()[0][:200])
    return Measurement(
        peer=job.peer,
        which=job.which,
        ms=statistics.median(times),
        min_ms=min(times),
        max_ms=max(times),
        samples=len(times),
        timer="host",
        temp_bytes=getattr(compiled.memory_analysis(), "temp_size_in_bytes", None),
        compile_s=compile_s,
    )


def _round_ms(program: jax.stages.Compiled, arguments: tuple[Arrays, ...], calls: int) -> float:
    """Of each of so many calls."""
    start = time.perf_counter()
    found = None
    for _ in range(calls):
        found = program(*arguments)
    jax.block_until_ready(found)
    return 1e3 * (time.perf_counter() - start) / calls


def efficiency(run: Run, cell: Cell, which: Pass, peer: str, devices: int) -> float | None:
    """A device's rate over that of one that is alone."""
    one, many = run.get(cell.name, ONE, which), run.get(cell.name, peer, which)
    if one is None or many is None or one.ms is None or many.ms is None:
        return None
    return one.ms / many.ms / devices


def verdicts(run: Run, devices: int) -> list[Verdict]:
    """Of the bars, those of what was measured."""
    found = []
    for cell, which in product(run.cells.values(), PASSES):
        bound = BARS.get((cell.mask.kind, which))
        for peer in run.peers():
            share = efficiency(run, cell, which, peer, devices)
            if bound is not None and peer != ONE and share is not None:
                text = f"{cell.name} {which}: rate of a device of {peer} over one alone"
                found.append(Verdict(text, bound, share, share >= bound))
    return found


def line(run: Run, cell: Cell, which: Pass, peer: str, devices: int) -> str:
    """A pass of n devices beside one's, in words."""
    many = run.get(cell.name, peer, which)
    assert many is not None
    if many.ms is None:
        return f"{cell.name:40} {which:9} {peer:18} {many.reason}"
    rate = cell.flops(which) / many.ms / 1e9 / devices
    share = efficiency(run, cell, which, peer, devices)
    shown = "     -" if share is None else f"{share:6.1%}"
    memory = "" if many.temp_bytes is None else f"{many.temp_bytes / 2**20:9.0f} MiB"
    return (
        f"{cell.name:40} {which:9} {peer:18} {many.ms:9.2f} ms {rate:7.1f} TFLOP/s a device "
        f"{shown} {memory}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, writes; returns 2 where there are not so many devices."""
    asked = parse(arguments)
    found = jax.devices()
    if len(found) < asked.devices:
        print(f"--devices {asked.devices}: this machine has {len(found)}", file=sys.stderr)
        return 2
    mesh = jax.make_mesh(
        (asked.devices,), ("sequence",), axis_types=(AxisType.Auto,), devices=found[: asked.devices]
    )
    here = facts()
    run = Run(
        preset=f"context-parallel-{asked.devices}",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine={"platform": here["platform"], "chip": here["chip"], "devices": asked.devices},
        versions={"python": sys.version.split()[0], **here["versions"]},
        protocol={
            "time": "median of rounds, by the host's clock, after untimed calls; compiled before",
            "round": f"1 to {_MOST_QUEUED} calls, {_ROUND_MS:.0f} ms in all, waited for together",
            "order": "all cells of one device, then those of several",
            "peers": "number of devices / schedule; one device has the whole sequence",
        },
    )
    path = asked.out if asked.out.suffix == ".json" else asked.out / run.file_name()
    jobs = [
        Job(cell, which, *how)
        for cell in cells(asked)
        for which in asked.passes
        for how in [(None, "auto", 1), *product([mesh], asked.schedule, asked.overlap)]
    ]
    # One device's come first, while the others are cool and nothing links them.
    jobs.sort(key=lambda job: job.mesh is not None)
    with ThreadPoolExecutor(asked.threads) as pool:
        programs = [pool.submit(job.compiled, job.lowered()) for job in jobs]
        wait(programs)  # what still compiles would take the host's time from what is timed
        arrays: Arrays = {}
        cell = None
        for job, program in zip(jobs, programs, strict=True):
            if job.cell != cell:
                cell = job.cell
                arrays = arrays_of(cell)
            run.add(cell, measured(job, arrays, program, asked.repeats))
            devices = 1 if job.mesh is None else asked.devices
            print(line(run, cell, job.which, job.peer, devices), flush=True)
            run.verdicts = verdicts(run, asked.devices)
            run.save(path)
    for verdict in run.verdicts:
        kept = "kept" if verdict.met else "MISSED"
        print(f"{kept:6} {verdict.measured:6.1%} of {verdict.bound:.0%}  {verdict.target}")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
