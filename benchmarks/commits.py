"""Another commit's attention beside this one's, on one machine in one run: what a change costs.

    git worktree add ../before COMMIT
    python benchmarks/commits.py ../before --preset hopper-backward

Each commit compiles every cell in a process of its own; then their timed calls take turns, so that
what else the machine does meets both alike. The result is kept like that of attention.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.cells import Cell, Pass
from benchmarks.presets import PRESETS
from benchmarks.results import Measurement, Run

ROOT = Path(__file__).resolve().parents[1]
BEFORE, AFTER = "before", "after"
ROUNDS = 4  # turns of each commit in each cell


class Commit:
    """A process that has compiled every cell with one checkout's jattn."""

    def __init__(self, tree: Path, implementation: str, todo: list[tuple[Cell, Pass]]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(tree), "--implementation", implementation],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )
        self._say([(cell.to_json(), which) for cell, which in todo])
        self._lines = self._read()

    def ready(self) -> dict[str, Any]:
        """Waits until all is compiled; the device and the versions."""
        facts: dict[str, Any] = next(self._lines)
        return facts

    def times(self, index: int, repeats: int) -> list[float] | str:
        """Milliseconds of each call; why there are none."""
        self._say([index, repeats])
        found: list[float] | str = next(self._lines)
        return found

    def stop(self) -> None:
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()

    def _say(self, message: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _read(self) -> Iterator[Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield json.loads(line)
        raise SystemExit(f"commits.py: a commit's process ended with {self._process.wait()}")


@dataclass
class Compiled:
    """One pass of a cell; `times` draws the arrays and runs it."""

    cell: Cell
    which: Pass
    implementation: str
    call: Any = None
    reason: str | None = None

    def compile(self) -> None:
        import jax
        import jax.numpy as jnp

        import jattn

        cell = self.cell
        window = (cell.mask.size, 0) if cell.mask.kind == "window" else None

        def attend(q: Any, k: Any, v: Any, *ids: Any) -> Any:
            segments = dict(query_segment_ids=ids[0], key_value_segment_ids=ids[0]) if ids else {}
            return jattn.dot_product_attention(
                q, k, v, is_causal=cell.mask.kind != "full", local_window_size=window,
                implementation=self.implementation, **segments,
            )  # fmt: skip

        def gradient(q: Any, k: Any, v: Any, d_out: Any, *ids: Any) -> Any:
            out, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, *ids), q, k, v)
            return out, vjp(d_out)

        try:
            function = attend if self.which == "forward" else gradient
            shapes = jax.eval_shape(lambda: self._arrays(jnp))
            self.call = jax.jit(function).lower(*shapes).compile()
        except Exception as error:  # a commit may fail in any way
            self.reason = f"{type(error).__name__}: {error}"[:400]

    def _arrays(self, jnp: Any) -> list[Any]:
        import jax

        cell = self.cell
        q = (cell.batch, cell.queries, cell.heads, cell.head_dim)
        k = (cell.batch, cell.keys, cell.kv_heads, cell.head_dim)
        shapes = [q, k, k] if self.which == "forward" else [q, k, k, q]
        keys = jax.random.split(jax.random.key(0), len(shapes))
        arrays = [
            jax.random.normal(key, shape, jnp.dtype(cell.dtype))
            for key, shape in zip(keys, shapes, strict=True)
        ]
        if cell.mask.has_documents:
            ids = jnp.asarray(cell.documents())
            arrays.append(jnp.broadcast_to(ids, (cell.batch, cell.queries)))
        return arrays

    def times(self, repeats: int) -> list[float] | str:
        import jax
        import jax.numpy as jnp

        if self.reason is not None:
            return self.reason
        arrays = self._arrays(jnp)
        jax.block_until_ready(self.call(*arrays))
        if jax.default_backend() == "gpu":
            from jax.experimental.mosaic.gpu import profiler

            _, found = profiler.measure(self.call, iterations=repeats)(*arrays)
            return "CUPTI saw no kernel" if found is None else [float(x) for x in np.ravel(found)]
        found = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(self.call(*arrays))
            found.append((time.perf_counter() - start) * 1e3)
        return found


def serve(tree: Path, implementation: str) -> None:
    """The process of one commit."""
    sys.path.insert(0, str(tree.resolve()))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print; only this process's own lines may reach the parent
    import jax

    import jattn

    here = Path(jattn.__file__).resolve().parents[1]
    assert here == tree.resolve(), f"jattn comes from {here}, not from {tree}"
    todo = [
        Compiled(Cell.from_json(cell), which, implementation)
        for cell, which in json.loads(sys.stdin.readline())
    ]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(Compiled.compile, todo))
    device = jax.devices()[0]
    facts = {"platform": device.platform, "chip": device.device_kind, "jax": jax.__version__}
    print(json.dumps(facts), file=out, flush=True)
    for line in sys.stdin:
        index, repeats = json.loads(line)
        print(json.dumps(todo[index].times(repeats)), file=out, flush=True)


def compare(asked: argparse.Namespace) -> Run:
    """Every cell of the preset with both commits."""
    plans = PRESETS[asked.preset]().plans
    todo = [
        (plan.cell, which)
        for plan in plans
        if all(part in plan.cell.name for part in asked.cells) and not plan.cell.dropout
        for which in plan.passes
    ]
    commits = {
        name: Commit(tree, asked.implementation, todo)
        for name, tree in ((BEFORE, asked.before), (AFTER, ROOT))
    }
    try:
        facts = [commit.ready() for commit in commits.values()][-1]
        run = Run(
            preset=f"commits-{asked.preset}",
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            machine={"platform": facts["platform"], "chip": facts["chip"]},
            versions={
                "jax": facts["jax"], BEFORE: _revision(asked.before), AFTER: _revision(ROOT),
            },
            protocol={"time": "median of the timed calls", "order": "commits take turns"},
        )  # fmt: skip
        for index, (cell, which) in enumerate(todo):
            times: dict[str, list[float]] = {name: [] for name in commits}
            reasons: dict[str, str] = {}
            for turn in range(ROUNDS):
                for name in list(commits)[:: 1 if turn % 2 else -1]:
                    found = commits[name].times(index, asked.repeats)
                    if isinstance(found, str):
                        reasons[name] = found
                    else:
                        times[name] += found
            for name in commits:
                run.add(cell, _measured(name, which, times[name], reasons.get(name)))
            print(_line(run, cell, which), flush=True)
    finally:
        for commit in commits.values():
            commit.stop()
    return run


def _measured(name: str, which: Pass, times: list[float], reason: str | None) -> Measurement:
    if reason is not None:
        return Measurement(name, which, reason=reason)
    ms = round(statistics.median(times), 5)
    return Measurement(name, which, ms, round(min(times), 5), round(max(times), 5), len(times))


def _line(run: Run, cell: Cell, which: Pass) -> str:
    before, after = (run.get(cell.name, name, which) for name in (BEFORE, AFTER))
    assert before is not None
    assert after is not None
    label = f"{cell.name:28} {which:9}"
    if before.ms is None or after.ms is None:
        return f"{label} {before.reason or after.reason}"
    rate = cell.flops(which) / after.ms / 1e9
    times = f"{before.ms:9.4f} {after.ms:9.4f} ms"
    return f"{label} {times}  {before.ms / after.ms:6.3f}x  {rate:5.0f} TFLOP/s"


def summary(run: Run) -> str:
    """How fast the commit after is, of the one before: the mean, and the worst cell."""
    lines = []
    passes: tuple[Pass, ...] = ("forward", "gradient")
    for which in passes:
        pairs = [(run.get(c, BEFORE, which), run.get(c, AFTER, which)) for c in run.cells]
        ratios = [b.ms / a.ms for b, a in pairs if a and b and a.ms and b.ms]
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            lines.append(f"{which}: {mean:.3f}x in the mean, {min(ratios):.3f}x at worst")
    return "\n".join(lines)


def _revision(tree: Path) -> str:
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares, keeps and prints; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, nargs="?", help="a checkout of the other commit")
    parser.add_argument("--preset", choices=PRESETS, default="hopper-backward")
    parser.add_argument("--cells", nargs="+", default=[], help="only names with all these parts")
    parser.add_argument("--implementation", default="flash")
    parser.add_argument("--repeats", type=int, default=6, help="calls in each of the turns")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.serve is not None:
        serve(asked.serve, asked.implementation)
        return 0
    if asked.before is None:
        parser.error("name a checkout of the commit to compare with")
    run = compare(asked)
    path = asked.out if asked.out.suffix == ".json" else asked.out / run.file_name()
    run.save(path)
    print(f"{summary(run)}\nkept in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
