"""The pages' plots, of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt

from docs.shown import measured
from docs.shown.figure import BLUE, GREEN, GREY, ORANGE, RED, Figure, from_matplotlib
from docs.shown.hopper_steps import STEPS
from docs.shown.measured import size, source, tflops

__all__ = ["hopper_steps", "memory", "roofline", "where_time_goes"]

FORWARD = "nvidia-h200-hopper-forward-2026-11-22.json"
COLOURS = (RED, BLUE, GREEN, ORANGE, GREY)
# An H200's data sheet: dense bfloat16 and its memory.
PEAK, BANDWIDTH = 989.0, 4.8


def memory(found: Mapping[str, Mapping[int, float]], caption: str) -> Figure:
    """Bytes against length, a line for each name, both axes by powers of two."""
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    for (name, points), colour in zip(found.items(), COLOURS, strict=False):
        axes.plot(list(points), list(points.values()), "o-", color=colour, label=name, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    lengths = sorted({length for points in found.values() for length in points})
    axes.set_xticks(lengths, [_short(length) for length in lengths])
    low, high = (f(b for p in found.values() for b in p.values()) for f in (min, max))
    step = 4.0 if high / low < 4.0**9 else 16.0
    ticks = [step**i for i in range(30) if low / step <= step**i <= high * step]
    axes.set_yticks(ticks, [size(tick).replace(".0", "") for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.set_ylabel("memory of the gradient")
    axes.legend()
    return from_matplotlib(figure, caption)


def roofline() -> Figure:
    """What memory allows and what was reached, by the work done with each byte."""
    run = measured.runs()[FORWARD]
    cell = "h128-n16-full-b4-t4096"
    figure, axes = plt.subplots(figsize=(6.4, 3.6))
    work = [2.0**i for i in range(13)]
    axes.plot(work, [min(PEAK, BANDWIDTH * x) for x in work], color=GREY, label="the chip's bound")
    shape = run.cells[cell]
    passes = 4 * 4  # S and P of 4 bytes, each written and read
    eager = 4 * shape.head_dim / passes
    flash = shape.flops("forward") / (4 * 2 * shape.elements)
    for name, peer, x, colour in (
        ("the formula", "jattn/eager", eager, RED),
        ("flash", "jattn/flash", flash, BLUE),
    ):
        y = tflops(run, cell, peer)
        assert y is not None
        axes.plot([x], [y], "o", color=colour, label=f"{name}: {y:.0f} TFLOP/s")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.set_xlabel("operations for each byte of memory traffic")
    axes.set_ylabel("TFLOP/s")
    axes.legend(loc="lower right")
    return from_matplotlib(
        figure,
        f"Head dim 128, T = 4096, forward ({source(run)}). The line: {BANDWIDTH} TB/s and "
        f"{PEAK:.0f} TFLOP/s, from the data sheet. Traffic is what the algorithm needs.",
    )


def hopper_steps() -> Figure:
    """Each step's speed before and after."""
    figure, axes = plt.subplots(figsize=(6.4, 4.0))
    places = range(len(STEPS))
    axes.barh(
        [y - 0.2 for y in places], [s.before for s in STEPS], 0.38, color=GREY, label="before"
    )
    axes.barh([y + 0.2 for y in places], [s.after for s in STEPS], 0.38, color=BLUE, label="after")
    for y, step in zip(places, STEPS, strict=True):
        axes.text(step.after + 6, y + 0.2, f"{step.after}", va="center", fontsize=8)
        axes.text(step.before + 6, y - 0.2, f"{step.before}", va="center", fontsize=8)
    axes.set_yticks(places, [f"{i + 1}. {s.name}" for i, s in enumerate(STEPS)])
    axes.invert_yaxis()
    axes.set_xlim(0, 820)
    axes.set_xlabel("TFLOP/s")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return from_matplotlib(
        figure,
        "Nine steps, each in the call where it shows (NVIDIA H200, the last H100, jax 0.11.2).",
    )


def where_time_goes(cells: Sequence[str], peers: Mapping[str, str], file: str = FORWARD) -> Figure:
    """TFLOP/s of each peer in each cell, as bars."""
    run = measured.runs()[file]
    figure, axes = plt.subplots(figsize=(6.4, 0.5 * len(cells) * len(peers) ** 0.5 + 1))
    width = 0.8 / len(peers)
    for i, ((peer, name), colour) in enumerate(zip(peers.items(), COLOURS[1:], strict=False)):
        values = [tflops(run, cell, peer) or 0 for cell in cells]
        axes.barh(
            [y + i * width for y in range(len(cells))], values, width, color=colour, label=name
        )
    axes.set_yticks([y + 0.4 - width / 2 for y in range(len(cells))], [_cell(c) for c in cells])
    axes.invert_yaxis()
    axes.set_xlabel("TFLOP/s")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return from_matplotlib(figure, f"Forward ({source(run)}).")


def _cell(name: str) -> str:
    head, _, rest = name.partition("-")
    _, mask, _, length = rest.split("-")[:4]
    return f"head dim {head[1:]}, {mask}, T {length[1:]}"


def _short(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 else str(length)
