"""A figure: an SVG in the page itself, so that its lines and letters take the page's colours."""

from __future__ import annotations

import html
import io
import re
from dataclasses import dataclass
from typing import Any

__all__ = ["BLUE", "GREEN", "GREY", "INK", "ORANGE", "RED", "Drawing", "Figure", "from_matplotlib"]

BLUE, ORANGE, GREEN, RED, GREY = "#4c78a8", "#e8862e", "#3d9970", "#d65f5f", "#9aa0a6"
INK = "#010203"  # what matplotlib draws in this colour is drawn in the page's own


@dataclass(frozen=True)
class Figure:
    """An SVG and the sentence below it, which says what is to be seen and where it is from."""

    svg: str
    caption: str

    def _repr_html_(self) -> str:
        caption = html.escape(self.caption)
        svg = self.svg.replace("<svg ", f'<svg role="img" aria-label="{caption}" ', 1)
        return f'<figure class="shown">{svg}<figcaption>{caption}</figcaption></figure>'


class Drawing:
    """Boxes, words and arrows in a picture; places are pixels from its top left."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self.parts: list[str] = []

    def box(
        self,
        at: tuple[float, float, float, float],
        fill: str = "none",
        *,
        edge: str = "currentColor",
        opacity: float = 1.0,
    ) -> None:
        """A rectangle; `at` is left, top, width, height."""
        x, y, width, height = at
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" '
            f'fill-opacity="{opacity:g}" stroke="{edge}"/>'
        )

    def text(
        self, x: float, y: float, words: str, *, size: int = 13, anchor: str = "middle",
        weight: str = "normal",
    ) -> None:  # fmt: skip
        """Words whose middle (or "start", "end") is at x, on the line y."""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
            f'font-weight="{weight}" fill="currentColor">{html.escape(words)}</text>'
        )

    def arrow(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """From one point to another."""
        (x1, y1), (x2, y2) = start, end
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="currentColor" '
            'stroke-width="1.3" marker-end="url(#tip)"/>'
        )

    def figure(self, caption: str) -> Figure:
        """All that was drawn."""
        tip = (
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0 10 5 0 10z" fill="currentColor"/>'
            "</marker></defs>"
        )
        return Figure(
            f'<svg width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" xmlns="http://www.w3.org/2000/svg" '
            f'font-family="inherit">{tip}{"".join(self.parts)}</svg>',
            caption,
        )


def from_matplotlib(figure: Any, caption: str) -> Figure:
    """A plot, its ink and background the page's."""
    import matplotlib.pyplot as plt

    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.tick_params(which="both", colors=INK)
        axes.grid(alpha=0.25, color=INK, linewidth=0.5)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_color(INK)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        words = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        legend = axes.get_legend()
        if legend is not None:
            legend.get_frame().set(facecolor="none", edgecolor="none")
            words += legend.get_texts()
        for text in words:
            text.set_color(INK)
    buffer = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption, "font.family": "sans"}):
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight")
    plt.close(figure)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg ") :], flags=re.DOTALL)
    return Figure(svg.replace(INK, "currentColor"), caption)
