"""Numbers of the committed benchmark results, and of the compiler's analysis of a call."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cells import Pass
from benchmarks.results import Run

__all__ = ["RESULTS", "Table", "gradient_bytes", "runs", "size", "source", "speed", "tflops"]

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


@dataclass(frozen=True)
class Table:
    """Rows of text under a head, as a page shows them."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def _repr_html_(self) -> str:
        def row(cells: Iterable[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells) + "</tr>"

        body = "".join(row(cells, "td") for cells in self.rows)
        return (
            '<div class="table-wrapper docutils container"><table class="docutils align-default">'
            f"<thead>{row(self.head, 'th')}</thead><tbody>{body}</tbody></table></div>"
        )


@cache
def runs() -> dict[str, Run]:
    """Every committed run, by the name of its file."""
    return {file.name: Run.load(file) for file in sorted(RESULTS.glob("*.json"))}


def source(run: Run) -> str:
    """Chip, version of jax and date."""
    return f"{run.machine['chip']}, jax {run.versions['jax']}, {run.date[:10]}"


def tflops(run: Run, cell: str, peer: str, which: Pass = "forward") -> float | None:
    """Floating-point operations of the visible pairs over the median time, in 1e12 a second."""
    found = run.get(cell, peer, which)
    if found is None or not found.ms:
        return None
    return run.cells[cell].flops(which) / found.ms / 1e9


def speed(number: float | None) -> str:
    """'634', '31.4', '-'."""
    return "-" if number is None else f"{number:.0f}" if number >= 99.95 else f"{number:.1f}"


def size(count: float) -> str:
    """'3.2 MiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 999.5:
            return f"{count:.1f} {unit}" if count < 99.95 and unit != "B" else f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:,.1f} TiB"


def gradient_bytes(
    attention: Callable[..., Any], length: int, heads: int = 8, dim: int = 64
) -> int:
    """Temporary memory of the gradient of one float32 call, by XLA's analysis; nothing runs."""
    x = jax.ShapeDtypeStruct((1, length, heads, dim), jnp.float32)

    def energy(q: Any, k: Any, v: Any) -> Any:
        return jnp.square(attention(q, k, v)).sum()

    compiled = jax.jit(jax.grad(energy, argnums=(0, 1, 2))).lower(x, x, x).compile()
    memory: Any = compiled.memory_analysis()
    return int(memory.temp_size_in_bytes)
