"""The two pictures of a run, drawn without a display."""

import logging
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.reports.cells import Cell
from training.units import bytes_text, length_text

_COLORS = ("#d1495b", "#00798c", "#edae49", "#66518f", "#2e933c")
_OVER_CURVES: dict[str, Any] = {
    "color": "0.25",
    "fontsize": 9,
    "zorder": 4,
    "bbox": {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
}
_SERIES_INSIDE = 4  # names that find room above the curves


def plot_loss(
    path: Path,
    rows: Sequence[dict[str, Any]],
    references: dict[str, float],
    title: str,
    events: Mapping[int, str],
) -> None:
    """Training and held-out bits per byte over the steps, and what compressors reach.

    Args:
        path: the PNG to write.
        rows: those of metrics.jsonl.
        references: bits per byte of the held-out text by name of the compressor.
        title: what was trained on what.
        events: what begins at which step.
    """
    figure, axes = _figure(8.5, 5.0)
    trained = [row for row in rows if "bits_per_byte" in row]
    measured = [row for row in rows if "held_out_bits_per_byte" in row]
    steps = [row["step"] for row in trained]
    losses = [row["bits_per_byte"] for row in trained]
    axes.plot(steps, losses, color=_COLORS[1], alpha=0.25, linewidth=1)
    axes.plot(steps, _smoothed(losses), color=_COLORS[1], label="training, smoothed")
    axes.plot(
        [row["step"] for row in measured],
        [row["held_out_bits_per_byte"] for row in measured],
        color=_COLORS[0],
        marker="o",
        markersize=4,
        clip_on=False,
        zorder=3,
        label="held-out",
    )
    last = max([1, *(row["step"] for row in rows)])
    for name, value in references.items():
        axes.axhline(value, color="0.35", linestyle=(0, (5, 3)), linewidth=1)
        label = f"held-out text under {name}: {value:.2f}"
        axes.text(0.01 * last, value, label, va="bottom", ha="left", **_OVER_CURVES)
    for step, what in events.items():
        if 1 < step <= last:
            axes.axvline(step, color="0.35", linestyle=":", linewidth=1)
            above = {"transform": axes.get_xaxis_transform(), "va": "top"}
            axes.text(step, 0.99, f"{what} ", ha="right", **above, **_OVER_CURVES)
    values = [
        *losses,
        *references.values(),
        *(row["held_out_bits_per_byte"] for row in measured),
    ]
    axes.set_yscale("log")
    ticks = [0.25, 0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(0.9 * min(values), 1.1 * max(values))
    axes.set_xlim(0, last)
    axes.set_xlabel("step")
    axes.set_ylabel("bits per byte (log scale, lower is better)")
    axes.set_title(title, loc="left")
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(path)


def plot_memory(path: Path, cells: Sequence[Cell], measured: str) -> None:
    """Memory and time over the sequence length, each with its lines of growth as T and T squared.

    Args:
        path: the PNG to write.
        cells: the report's.
        measured: what the numbers are of.
    """
    timed = any(cell.seconds is not None for cell in cells)
    figure, axes = _figure(11.0, 5.0, columns=2) if timed else _figure(7.5, 5.0)
    memory, seconds = axes if timed else (axes, None)
    lengths = sorted({cell.sequence_length for cell in cells})
    names = list(dict.fromkeys(cell.implementation for cell in cells))
    for name in dict.fromkeys(cell.series for cell in cells):
        own = [cell for cell in cells if cell.series == name]
        place = names.index(own[0].implementation)
        style = {
            "color": _COLORS[place],
            "linestyle": "--" if own[0].rematerialized else "-",
            "linewidth": 3.0 - 0.5 * place,  # a curve under another is seen on both its sides
            "markersize": 8.0 - 1.2 * place,
            "label": name,
        }
        _curve(memory, own, "temp_bytes", **style)
        if seconds is not None:
            _curve(seconds, own, "seconds", **style)
    not_run = [c for c in cells if c.temp_bytes is not None and c.status not in ("ok", "fits")]
    memory.plot(
        [c.sequence_length for c in not_run],
        [c.temp_bytes for c in not_run],
        linestyle="none",
        marker="o",
        markersize=3,
        color="white",
        zorder=3,
    )
    if not_run:
        hollow = {"linestyle": "none", "marker": "o", "color": "white", "markeredgecolor": "0.4"}
        memory.plot([], [], label="not run" if timed else "too large", **hollow)
    _over_lengths(memory, lengths, "temporary memory")
    _growth_lines(memory, powers=(1, 2))
    memory.set_yscale("log", base=2)
    memory.yaxis.set_major_formatter(lambda value, _: bytes_text(value).replace(".0", ""))
    memory.set_ylabel("bytes (log scale)")
    if seconds is not None:
        _over_lengths(seconds, lengths, "time of one step")
        _growth_lines(seconds, powers=(2,))
        seconds.set_yscale("log")
        seconds.yaxis.set_major_formatter(lambda value, _: _seconds_tick(value))
        seconds.yaxis.set_minor_formatter(lambda value, _: "")
        seconds.set_ylabel("time (log scale)")
    if len({cell.series for cell in cells}) > _SERIES_INSIDE:
        names_of = memory.get_legend_handles_labels()
        figure.legend(*names_of, loc="outside lower center", ncols=5, frameon=False)
    else:
        memory.legend(frameon=False, loc="upper left")
    title = textwrap.fill(measured, 140 if timed else 90)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color="0.25")
    figure.savefig(path)


def _curve(axes: Any, cells: Sequence[Cell], fact: str, **style: Any) -> None:
    """One fact of the cells that have it over their lengths."""
    known = [(c.sequence_length, getattr(c, fact)) for c in cells if getattr(c, fact) is not None]
    axes.plot([x for x, _ in known], [y for _, y in known], marker="o", **style)


def _over_lengths(axes: Any, lengths: Sequence[int], title: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [length_text(length) for length in lengths])
    axes.set_xlabel("sequence length T (tokens, log scale)")
    axes.set_title(title, loc="left")


def _figure(width: float, height: float, columns: int = 1) -> Any:
    # Its first import on a machine builds a font cache, and would say so as a warning.
    logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    for each in [axes] if columns == 1 else axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(color="0.92")
        each.set_axisbelow(True)
    return figure, axes


def _growth_lines(axes: Any, *, powers: Sequence[int]) -> None:
    """Dotted: growth as T through the end of the lowest curve, as T squared of the highest."""
    curves = [line.get_xydata() for line in axes.get_lines() if len(line.get_xdata()) > 1]
    by_height = sorted(curves, key=lambda curve: float(curve[-1][1]))
    if not by_height:
        return
    first = min(curve[0][0] for curve in curves)
    for power, label in ((1, "as T"), (2, "as T²")):
        if power not in powers:
            continue
        last, value = by_height[0 if power == 1 else -1][-1]
        start = value * (first / last) ** power
        axes.plot([first, last], [start, value], color="0.6", linestyle=":", zorder=0)
        axes.annotate(
            label, (first, start), (4, -10), textcoords="offset points", color="0.45", fontsize=9
        )


def _smoothed(values: Sequence[float]) -> list[float]:
    """Moving average over the last fiftieth of a run or so, weights falling exponentially."""
    keep = 1 - 1 / max(10, len(values) / 50)
    smoothed: list[float] = []
    total = weight = 0.0
    for value in values:
        total = keep * total + value
        weight = keep * weight + 1
        smoothed.append(total / weight)
    return smoothed


def _seconds_tick(value: float) -> str:
    return f"{value:g} s" if value >= 1 else f"{1000 * value:g} ms"
