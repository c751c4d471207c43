"""The numbers in README and docs, written from the result files that are committed.

    python benchmarks/tables.py            rewrites what stands between the markers of each page
    python benchmarks/tables.py --check    exits 1 where a page says otherwise than the files

A page holds `<!-- results: NAME -->` and `<!-- end -->`; NAME is one of SECTIONS.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import plot, ratios, report
from benchmarks.cells import Pass
from benchmarks.results import Run

__all__ = ["PAGES", "SECTIONS", "rewritten"]

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "reference" / "results.md")
_SECTION = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
_BOTH = {"forward": "forward", "gradient": "forward and backward"}


def summary(run: Run) -> str:
    """How often flash leads, by how much, and on what."""
    found = ratios.sorted_ratios(run)
    ahead, near = (sum(r.ratio >= bound for r in found) for bound in (1, 0.95))
    worst, middle = found[0].ratio, statistics.median(r.ratio for r in found)
    versions = [
        f"{name} {run.versions[key]}"
        for name, key in (
            ("jax", "jax"),
            ("cuDNN", "nvidia-cudnn-cu13"),
            ("flash-attn3-jax", "flash-attn3-jax"),
            ("tokamax", "tokamax"),
            ("PyTorch", "torch"),
        )
        if key in run.versions
    ]
    text = (
        f"On an {run.machine['chip']} `flash` is as fast as the best rival or faster in {ahead} of"
        f" {len(found)} measurements ({_cells(found)} shapes, forward, and forward with backward),"
        f" within 5% of it or faster in {near};"
        f" its speed over the best rival's is {middle:.2f} in the median and {worst:.2f} at the"
        f" least ({', '.join(versions)}; bfloat16, {run.date[:10]})."
    )
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def speed(run: Run) -> str:
    """TFLOP/s of causal attention at 16,384 tokens, by head dim and pass."""
    shown = [p for p in plot.LOOKS if p in run.peers() and len(plot.lengths_timed(run, p)) > 1]
    rows = []
    passes: tuple[Pass, ...] = ("forward", "backward")
    for width in plot.WIDTHS:
        cell = max(plot.squares(run, width), key=lambda c: c.queries)
        for which in passes:
            found = [run.get(cell.name, peer, which) for peer in shown]
            rates = [cell.flops(which) / m.ms / 1e9 if m and m.ms else None for m in found]
            best = max(rate for rate in rates if rate is not None)
            texts = ["-" if x is None else f"{x:.0f}" for x in rates]
            texts = [f"**{t}**" if x == best else t for t, x in zip(texts, rates, strict=True)]
            label = f"head dim {width}, T {report.length_text(cell.queries)}, {which}"
            rows.append([label, *texts])
    return report.markdown(["TFLOP/s", *(plot.LOOKS[p].label for p in shown)], rows)


def memory(run: Run) -> str:
    """Temporary memory of forward and backward by length."""
    family = plot.longest_family(run)
    shown = [p for p in plot.LOOKS if p in run.peers()]
    found = {p: [run.get(c.name, p, "gradient") for c in family] for p in shown}
    shown = [p for p in shown if any(m and m.temp_bytes for m in found[p])]
    rows = [
        [
            report.length_text(cell.queries),
            *(plot.bytes_text(m.temp_bytes) if m and m.temp_bytes else "-" for m in of_cell),
        ]
        for cell, of_cell in zip(family, zip(*(found[p] for p in shown), strict=True), strict=True)
    ]
    return report.markdown(["T", *(plot.LOOKS[p].label for p in shown)], rows)


def losses(run: Run) -> str:
    """Every measurement in which a rival is faster, the worst first."""
    rows = [
        [
            report.title(r.cell),
            _BOTH[r.which],
            f"{r.ms:.3f}",
            f"{r.rival_ms:.3f}",
            _label(r.rival),
            f"{r.ratio:.3f}",
        ]
        for r in ratios.sorted_ratios(run)
        if r.ratio < 1
    ]
    head = ["shape", "pass", "flash, ms", "rival, ms", "rival", "speed over the rival's"]
    return report.markdown(head, rows) if rows else "Nowhere, in this run."


def wins(run: Run) -> str:
    """Every other measurement, the worst first."""
    rows = [
        [report.title(r.cell), _BOTH[r.which], f"{r.ms:.3f}", _label(r.rival), f"{r.ratio:.2f}"]
        for r in ratios.sorted_ratios(run)
        if r.ratio >= 1
    ]
    return report.markdown(["shape", "pass", "flash, ms", "best rival", "ratio"], rows)


def machine(run: Run) -> str:
    """Chip, versions, date and clocks."""
    return "\n".join(f"- {line}" for line in report.heading(run).splitlines())


# What writes a section, and the figure whose result file it is written from.
SECTIONS: dict[str, tuple[Callable[[Run], str], str]] = {
    "summary": (summary, "rivals"),
    "speed": (speed, "speed"),
    "memory": (memory, "memory"),
    "losses": (losses, "rivals"),
    "wins": (wins, "rivals"),
    "machine": (machine, "rivals"),
}


def rewritten(page: str) -> str:
    """The page with what its markers enclose written anew."""

    def section(match: re.Match[str]) -> str:
        write, figure = SECTIONS[match[2]]
        return f"{match[1]}{write(Run.load(plot.source_of(figure)))}\n{match[3]}"

    return _SECTION.sub(section, page)


def _label(peer: str) -> str:
    return plot.LOOKS[peer].label if peer in plot.LOOKS else peer


def _cells(found: Sequence[ratios.Ratio]) -> int:
    return len({r.cell.name for r in found})


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrites or checks; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args(arguments)
    stale = 0
    for page in PAGES:
        text = page.read_text()
        new = rewritten(text)
        if new != text:
            stale += 1
            print(page if not asked.check else f"{page}: not what the result files say")
            if not asked.check:
                page.write_text(new)
    return int(asked.check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
