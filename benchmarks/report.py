"""Markdown tables of benchmark results: python benchmarks/report.py FILE.json ... [--peers ...]"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cells import Cell, Pass
from benchmarks.results import Measurement, Run

__all__ = [
    "heading",
    "length_text",
    "markdown",
    "memory_table",
    "reasons",
    "time_table",
    "title",
    "verdict_table",
]

OURS = "jattn/*"


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name is, contains or globs to one of the patterns; no pattern matches all."""
    return not patterns or any(fnmatch(name, p) or p in name for p in patterns)


def heading(run: Run) -> str:
    """Chip, versions, date and protocol in one line each."""
    machine = ", ".join(
        str(run.machine[name]) for name in ("chip", "cores", "driver") if name in run.machine
    )
    load = run.machine.get("load_average")
    loaded = f"; load average {load[0]:.2f} before, {load[1]:.2f} after" if load else ""
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    timers = {m.timer for found in run.measurements.values() for m in found if m.timer}
    timed = f"\ntimed by {'; '.join(sorted(timers))}" if timers else ""
    return f"{run.preset}, {run.date[:10]}: {machine}{loaded}\n{versions}{timed}"


def time_table(
    run: Run, which: Pass, *, peers: Sequence[str] = (), cells: Sequence[str] = ()
) -> str:
    """Peers side by side: TFLOP/s on a GPU, milliseconds on a CPU and where marked.

    The last column is the speed of the fastest jattn backend over the fastest other peer.
    """
    shown = [p for p in run.peers() if matches(p, peers)]
    rows = []
    for name, cell in run.cells.items():
        found = [run.get(name, peer, which) for peer in shown]
        if not matches(name, cells) or not any(m and (m.timer or m.reason) for m in found):
            continue
        in_ms = run.machine["platform"] == "cpu"
        rows.append(
            [title(cell), *(_time(cell, m, in_ms=in_ms) for m in found), _lead(run, name, which)]
        )
    if not rows:
        return ""
    unit = "ms" if run.machine["platform"] == "cpu" else "TFLOP/s"
    return markdown([f"{which}, {unit}", *shown, "jattn / best peer"], rows)


def memory_table(run: Run, which: Pass = "gradient", *, peers: Sequence[str] = ()) -> str:
    """Temporary MiB of the compiled pass where a cell was measured at several lengths.

    In brackets the growth since the row above, per doubling of the length.
    """
    shown = [p for p in run.peers() if matches(p, peers)]
    rows = []
    for family in _same_butlength_text(run):
        before: Cell | None = None
        for cell in family:
            values = [title(cell)]
            for peer in shown:
                now = _temp_bytes(run, cell, peer, which)
                then = None if before is None else _temp_bytes(run, before, peer, which)
                text = "-" if now is None else f"{now / 2**20:.1f}"
                if now is not None and then and before is not None:
                    doublings = math.log2(cell.queries / before.queries)
                    text += f" ({(now / then) ** (1 / doublings):.2f}x)"
                values.append(text)
            rows.append(values)
            before = cell
    return markdown([f"temporary MiB, {which}", *shown], rows) if rows else ""


def verdict_table(run: Run) -> str:
    """Targets, what was measured, and whether they are met."""
    rows = [
        [v.target, f"{v.bound:g}", _number(v.measured), "yes" if v.met else "NO"]
        for v in run.verdicts
    ]
    return markdown(["target", "bound", "measured", "met"], rows) if rows else ""


def reasons(run: Run) -> str:
    """Why cells are empty: one line per peer and reason."""
    count: dict[tuple[str, str], int] = {}
    for measurements in run.measurements.values():
        for m in measurements:
            if m.reason is not None:
                count[m.peer, m.reason] = count.get((m.peer, m.reason), 0) + 1
    return "\n".join(f"- {peer}: {reason} ({n})" for (peer, reason), n in count.items())


def title(cell: Cell) -> str:
    """The cell in words."""
    keys = f", S {length_text(cell.keys)}" if cell.keys != cell.queries else ""
    heads = f"{cell.heads}/{cell.kv_heads}" if cell.heads != cell.kv_heads else str(cell.heads)
    extras = [cell.dtype] * (cell.dtype != "bfloat16") + ["bias"] * cell.bias
    extras += [f"dropout {cell.dropout}"] * (cell.dropout > 0)
    value = "" if cell.values == cell.head_dim else f"/{cell.values}"
    head = f"head dim {cell.head_dim}{value}, {cell.mask}, B {cell.batch}, N {heads}"
    return ", ".join([f"{head}, T {length_text(cell.queries)}{keys}", *extras])


def _time(cell: Cell, measurement: Measurement | None, *, in_ms: bool) -> str:
    if measurement is None or measurement.ms is None:
        return "-"
    if in_ms:
        return _digits(measurement.ms)
    if cell.queries == 1 or cell.mask.kind == "window" or cell.mask.has_documents:
        return f"{measurement.ms:.3f} ms"
    return _digits(cell.flops(measurement.which) / measurement.ms / 1e9)


def _lead(run: Run, cell: str, which: Pass) -> str:
    ours = run.best(cell, [p for p in run.peers() if fnmatch(p, OURS)], which)
    others = run.best(cell, [p for p in run.peers() if not fnmatch(p, OURS)], which)
    if ours is None or others is None or not ours.ms or not others.ms:
        return "-"
    return f"{others.ms / ours.ms:.2f}x"


def _same_butlength_text(run: Run) -> list[list[Cell]]:
    """Groups of at least two cells that differ in their length alone, short ones first."""
    groups: dict[str, list[Cell]] = {}
    for cell in run.cells.values():
        rest = {**cell.to_json(), "queries": 0, "keys": 0}
        groups.setdefault(str(rest), []).append(cell)
    return [sorted(g, key=lambda c: c.queries) for g in groups.values() if len(g) > 1]


def _temp_bytes(run: Run, cell: Cell, peer: str, which: Pass) -> int | None:
    measurement = run.get(cell.name, peer, which)
    return None if measurement is None else measurement.temp_bytes


def length_text(n: int) -> str:
    """A length as tables show it: 4k, 1M, 12345."""
    if n % 2**20 == 0:
        return f"{n // 2**20}M"
    return f"{n // 1024}k" if n % 1024 == 0 else str(n)


def _digits(x: float) -> str:
    """Three significant digits, more only of whole numbers."""
    places = 2 - math.floor(math.log10(x)) if x > 0 else 0
    return f"{x:.{max(places, 0)}f}"


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.2f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"
        for row in [head, ["-" * w for w in widths], *rows]
    ]
    return "\n".join(lines)


def everything(
    run: Run, passes: Sequence[Pass] = (), peers: Sequence[str] = (), cells: Sequence[str] = ()
) -> str:
    """All tables that have something in them."""
    second: Pass = "gradient" if run.machine["platform"] == "cpu" else "backward"
    passes = passes or ("forward", second)
    parts = [time_table(run, which, peers=peers, cells=cells) for which in passes]
    parts += [memory_table(run, peers=peers)] if run.machine["platform"] == "cpu" else []
    return "\n\n".join(part for part in [heading(run), *parts, verdict_table(run)] if part)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables of result files."""
    parser = argparse.ArgumentParser(description="Markdown tables of benchmark results.")
    parser.add_argument("files", nargs="+", type=Path)
    every = get_args(Pass.__value__)
    parser.add_argument("--passes", nargs="+", choices=every, default=())
    parser.add_argument("--peers", nargs="+", default=[], help="names or patterns")
    parser.add_argument("--cells", nargs="+", default=[], help="names or patterns")
    asked = parser.parse_args(arguments)
    for path in asked.files:
        print(everything(Run.load(path), asked.passes, asked.peers, asked.cells), end="\n\n")


if __name__ == "__main__":
    main()
