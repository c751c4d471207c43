"""The figures of README and docs, from the result files that are committed.

    python benchmarks/plot.py                  all of them, to docs/figures
    python benchmarks/plot.py FILE.json --out FOLDER

Each PNG says in its metadata which file it was drawn from and that file's digest; a test compares.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import ratios
from benchmarks.cells import Cell, Pass
from benchmarks.report import length_text
from benchmarks.results import Run

__all__ = [
    "FIGURES",
    "LOOKS",
    "WIDTHS",
    "bytes_text",
    "drawn_from",
    "lengths_timed",
    "longest_family",
    "source_of",
    "squares",
]

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FOLDER = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures"


@dataclass(frozen=True)
class Look:
    """How a peer is drawn: colours of Okabe and Ito, which colour-blind readers tell apart."""

    label: str
    color: str
    marker: str


LOOKS = {
    "jattn/flash": Look("jattn flash", "#D55E00", "o"),
    "jattn/memory_efficient": Look("jattn memory_efficient", "#E69F00", "D"),
    "jattn/eager": Look("jattn eager", "#000000", "x"),
    "flash-attn3-jax": Look("flash-attn3-jax", "#009E73", "^"),
    "jax.nn/cudnn": Look("jax.nn cuDNN", "#0072B2", "s"),
    "jax.nn/xla": Look("jax.nn XLA", "#000000", "X"),
    "tokamax/mosaic": Look("tokamax", "#CC79A7", "v"),
    "torch/flash": Look("PyTorch flash", "#56B4E9", "P"),
    "torch/cudnn": Look("PyTorch cuDNN", "#999999", "*"),
}
WIDTHS = (64, 128, 256)  # head dims
_INK, _FAINT = "#333333", "#8a8a8a"


def memory(run: Run) -> Any:
    """Temporary memory of the gradient against T, both axes logarithmic."""
    figure, axes = _figure(8.6, 4.6)
    family = longest_family(run)
    for peer in (p for p in LOOKS if p in run.peers()):
        found = [(c.queries, run.get(c.name, peer, "gradient")) for c in family]
        points = [(t, m.temp_bytes) for t, m in found if m is not None and m.temp_bytes]
        drawn = _line(axes, peer, points)
        if drawn is not None and peer == "jax.nn/cudnn":  # as much as flash: seen above it
            drawn.set(linestyle=(0, (2, 3)), zorder=4, markersize=3)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    lengths = [c.queries for c in family]
    axes.set_xticks(lengths, [length_text(t) for t in lengths])
    axes.yaxis.set_major_formatter(lambda value, _: bytes_text(value))
    limit = run.machine.get("memory_bytes")
    if limit:
        _level(axes, limit, f"memory of the {run.machine['chip']}: {bytes_text(limit)}")
    first = family[0]
    axes.set_xlabel("sequence length T (tokens)")
    axes.set_title(
        f"Temporary memory of forward and backward: B {first.batch}, {first.heads} heads of"
        f" {first.head_dim}, {first.mask}, {first.dtype}",
        loc="left",
    )
    axes.legend(frameon=False, loc="lower right")
    return figure


def speed(run: Run) -> Any:
    """TFLOP/s against T, a panel for each head dim and pass, and the chip's matrix rate."""
    passes: tuple[Pass, ...] = ("forward", "backward")
    figure, panels = _figure(11.0, 6.4, rows=2, columns=3)
    labels: dict[str, Any] = {}
    everywhere = [p for p in LOOKS if len(lengths_timed(run, p)) > 1]
    for row, which in zip(panels, passes, strict=True):
        for axes, width in zip(row, WIDTHS, strict=True):
            cells = sorted(squares(run, width), key=lambda c: c.queries)
            for peer in everywhere:
                found = [(c, run.get(c.name, peer, which)) for c in cells]
                points = [(c.queries, c.flops(which) / m.ms / 1e9) for c, m in found if m and m.ms]
                drawn = _line(axes, peer, points)
                labels.update({drawn.get_label(): drawn} if drawn else {})
            axes.set_xscale("log", base=2)
            lengths = [c.queries for c in cells]
            axes.set_xticks(lengths, [length_text(t) for t in lengths])
            axes.set_title(f"head dim {width}, {which}", loc="left")
            rate = run.machine.get("matmul_tflops")
            if rate:
                _level(axes, rate, f"matrix product: {rate:.0f}", side="left")
        highest = max(axes.get_ylim()[1] for axes in row)
        for axes in row:
            axes.set_ylim(0, highest)
    for axes in panels[1]:
        axes.set_xlabel("sequence length T (tokens)")
    for axes in panels[:, 0]:
        axes.set_ylabel("TFLOP/s")
    figure.legend(
        labels.values(), labels.keys(), loc="outside upper center", ncols=6, frameon=False
    )
    chip = run.machine["chip"]
    figure.supxlabel(
        f"{chip}, bfloat16, causal, 16,384 tokens, heads × head dim = 2048, {run.date[:10]}",
        fontsize=10,
        color=_FAINT,
    )
    return figure


def rivals(run: Run) -> Any:
    """The speed of flash over the best rival's, every cell and pass, sorted."""
    found = ratios.sorted_ratios(run)
    figure, axes = _figure(11.0, 4.8)
    behind = [r for r in found if r.ratio < 1]
    ahead = found[len(behind) :]
    for group, start, color, label in (
        (behind, 0, "#0072B2", f"where we lose: {len(behind)} of {len(found)}"),
        (ahead, len(behind), "#D55E00", f"as fast as the best rival or faster: {len(ahead)}"),
    ):
        places = range(start, start + len(group))
        # Bars grow from 1: what is lost hangs below it.
        heights = [r.ratio - 1 for r in group]
        axes.bar(places, heights, bottom=1, width=0.8, color=color, label=label)
    low, high = min([r.ratio for r in found] + [0.9]), max([r.ratio for r in found] + [1.2])
    ticks = (0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.2, 1.5, 2, 3, 5, 8, 12, 20)
    axes.set_yscale("log")
    axes.set_ylim(0.95 * low, 1.08 * high)
    axes.set_yticks([x for x in ticks if 0.95 * low <= x <= 1.08 * high])
    axes.minorticks_off()
    axes.axhline(1, color=_INK, linewidth=1)
    axes.set_xticks([])
    axes.set_xlim(-1, len(found))
    axes.set_xlabel("every shape and pass (forward; forward and backward), sorted")
    axes.set_ylabel("speed over the best rival's")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}×")
    axes.set_title(f"{run.machine['chip']}, bfloat16, {run.date[:10]}", loc="left")
    axes.legend(frameon=False, loc="upper left")
    return figure


# What draws it, and the presets whose newest result it is drawn from: the first that is there.
FIGURES: dict[str, tuple[Callable[[Run], Any], tuple[str, ...]]] = {
    "memory": (memory, ("all", "cpu")),
    "speed": (speed, ("all", "hopper-backward")),
    "rivals": (rivals, ("all", "hopper-backward")),
}


def source_of(name: str) -> Path:
    """The committed result that this figure is drawn from."""
    for preset in FIGURES[name][1]:
        found = [p for p in RESULTS.glob("*.json") if Run.load(p).preset == preset]
        if found:
            return max(found, key=lambda p: Run.load(p).date)
    raise FileNotFoundError(f"no result of {' or '.join(FIGURES[name][1])} in {RESULTS}")


def drawn_from(path: Path) -> str:
    """What a figure drawn from this file has as its `Source`."""
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"


def _families(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    """Cells that differ in their length alone, short ones first."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        rest = {**cell.to_json(), "queries": 0, "keys": 0}
        groups.setdefault(str(rest), []).append(cell)
    for group in groups.values():
        yield sorted(group, key=lambda c: c.queries)


def longest_family(run: Run) -> list[Cell]:
    """The causal cells that differ in length alone and reach furthest, short ones first."""
    cells = [c for c in run.cells.values() if c.queries == c.keys and c.mask.kind == "causal"]
    return max(_families(cells), key=lambda cells: cells[-1].queries)


def squares(run: Run, width: int) -> list[Cell]:
    """Causal cells of 16,384 tokens and heads * head dim = 2048."""
    return [
        cell
        for cell in run.cells.values()
        if cell.head_dim == cell.values == width
        and cell.heads == cell.kv_heads == 2048 // width
        and cell.batch * cell.queries == 16384
        and str(cell.mask) == "causal"
    ]


def lengths_timed(run: Run, peer: str) -> set[int]:
    """The lengths at which this peer has a time: one alone makes no line."""
    timed = (c for name, c in run.cells.items() if (m := run.get(name, peer, "forward")) and m.ms)
    return {c.queries for c in timed}


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    # Its first import on a machine builds a font cache, and would say so as a warning.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns)
    for each in figure.get_axes():
        each.spines[["top", "right"]].set_visible(False)
        each.grid(color="0.92")
        each.set_axisbelow(True)
        each.tick_params(labelsize=11)
        each.xaxis.label.set_fontsize(12)
        each.yaxis.label.set_fontsize(12)
        each.title.set_fontsize(12)
    return figure, axes


def _line(axes: Any, peer: str, points: Sequence[tuple[float, float]]) -> Any:
    if not points:
        return None
    look, ours = LOOKS[peer], peer == "jattn/flash"
    (drawn,) = axes.plot(
        *zip(*points, strict=True),
        label=look.label,
        color=look.color,
        marker=look.marker,
        linewidth=2.6 if ours else 1.5,
        markersize=7 if ours else 6,
        zorder=3 if ours else 2,
    )
    return drawn


def _level(axes: Any, value: float, label: str, side: str = "right") -> None:
    """A dashed line across, its label under it."""
    axes.axhline(value, color=_FAINT, linestyle=(0, (5, 3)), linewidth=1.2)
    axes.annotate(
        label,
        (1 if side == "right" else 0, value),
        (-4 if side == "right" else 4, -3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha=side,
        va="top",
        color=_INK,
        fontsize=10,
    )


def bytes_text(value: float) -> str:
    """Bytes in the largest unit that they fill."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.0f} B"


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", nargs="?", type=Path, help="instead of the committed results")
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES))
    asked = parser.parse_args(arguments)
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in asked.only:
        source = asked.file or source_of(name)
        figure = FIGURES[name][0](Run.load(source))
        metadata = {"Source": drawn_from(source), "Software": None}
        figure.savefig(asked.out / f"{name}.png", metadata=metadata)
        print(asked.out / f"{name}.png")


if __name__ == "__main__":
    main()
