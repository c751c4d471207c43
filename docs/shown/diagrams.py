"""The pages' diagrams."""

from __future__ import annotations

from collections.abc import Callable

from docs.shown.figure import BLUE, GREEN, GREY, ORANGE, RED, Drawing, Figure

__all__ = ["backward", "chunks", "masks", "matrix", "memories", "pipeline", "tiles"]

SHARED = "shared memory: 228 KiB on each of 132 multiprocessors"


def matrix() -> Figure:
    """The products of the formula and the matrix between them."""
    d = Drawing(690, 220)
    for x, name, shape in ((10, "Q", "T × H"), (74, "Kᵀ", "H × S"), (580, "V", "S × H")):
        wide = name == "Kᵀ"
        d.box((x, 60, 130 if wide else 34, 34 if wide else 130), BLUE, opacity=0.35)
        d.text(x + (65 if wide else 17), 50, name, weight="bold")
        d.text(x + (65 if wide else 17), 112 if wide else 210, shape, size=11)
    d.text(59, 82, "×")
    d.arrow((210, 77), (262, 77))
    d.box((268, 60, 130, 130), RED, opacity=0.35)
    d.text(333, 50, "S = Q Kᵀ", weight="bold")
    d.text(333, 210, "T × S", size=11)
    d.arrow((402, 125), (436, 125))
    d.text(419, 118, "softmax", size=9)
    d.box((440, 60, 130, 130), RED, opacity=0.35)
    d.text(505, 50, "P", weight="bold")
    d.text(505, 210, "T × S", size=11)
    d.arrow((618, 125), (638, 125))
    d.box((642, 60, 34, 130), GREEN, opacity=0.35)
    d.text(659, 50, "O", weight="bold")
    d.text(659, 210, "T × H", size=11)
    return d.figure(
        "The formula. Blue and green are what goes in and comes out; red, T by S, is what is large."
    )


def chunks() -> Figure:
    """One chunk of queries at a time."""
    d = Drawing(560, 230)
    for i in range(4):
        y, now = 40 + 40 * i, i == 1
        d.box((30, y, 34, 36), BLUE, opacity=0.8 if now else 0.2)
        d.box((120, y, 240, 36), RED if now else "none", opacity=0.35, edge="currentColor")
        d.box((450, y, 34, 36), GREEN, opacity=0.8 if i < 2 else 0.1)
    d.text(47, 28, "Q", weight="bold")
    d.text(240, 28, "rows of S and P", weight="bold")
    d.text(467, 28, "O", weight="bold")
    d.text(240, 62, "forgotten", size=11)
    d.text(240, 102, "chunk × S, here now", size=11)
    d.text(240, 142, "not yet", size=11)
    d.text(240, 182, "not yet", size=11)
    d.arrow((68, 98), (114, 98))
    d.arrow((366, 98), (444, 98))
    d.text(280, 222, "only one strip exists at a time", size=11)
    return d.figure(
        "Query chunks: each row's softmax is its own, so strips of rows can take turns."
    )


def tiles() -> Figure:
    """Blocks of keys pass a block of queries."""
    d = Drawing(640, 250)
    for i in range(4):
        for j in range(4):
            now = (i, j) == (1, 2)
            seen = i == 1 and j < 2
            fill = RED if now else GREY if seen or i == 0 else "none"
            d.box((150 + 70 * j, 50 + 42 * i, 66, 38), fill, opacity=0.6 if now else 0.25)
    for j in range(4):
        d.box((150 + 70 * j, 20, 66, 22), BLUE, opacity=0.7 if j == 2 else 0.2)
    for i in range(4):
        d.box((110, 50 + 42 * i, 30, 38), BLUE, opacity=0.7 if i == 1 else 0.2)
    d.text(90, 36, "K, V", anchor="end", weight="bold")
    d.text(90, 115, "Q", anchor="end", weight="bold")
    d.arrow((170, 232), (410, 232))
    d.text(290, 247, "blocks of keys, one after the other", size=11)
    d.box((480, 80, 140, 76), ORANGE, opacity=0.25)
    d.text(550, 100, "carried along", size=12, weight="bold")
    d.text(550, 118, "m  maximum", size=12)
    d.text(550, 134, "l  sum of e^(s - m)", size=12)
    d.text(550, 150, "o  sum of e^(s - m) v", size=12)
    d.arrow((432, 111), (476, 111))
    return d.figure(
        "Tiles: one block of scores exists at a time. What a row carries from block to block is "
        "its maximum, its sum and its unfinished output."
    )


def backward() -> Figure:
    """What forward keeps and what backward computes again."""
    d = Drawing(680, 190)
    stages = (
        (20, "forward", ("Q, K, V", "→ O, L"), BLUE),
        (260, "kept", ("Q, K, V, O, L", "linear in T"), GREEN),
        (500, "backward", ("P = e^(S - L), again", "dV, dS, dQ, dK"), ORANGE),
    )
    for x, name, lines, colour in stages:
        d.box((x, 50, 160, 80), colour, opacity=0.3)
        d.text(x + 80, 40, name, weight="bold")
        for i, line in enumerate(lines):
            d.text(x + 80, 85 + 24 * i, line)
    d.arrow((184, 90), (254, 90))
    d.arrow((424, 90), (494, 90))
    d.text(
        340, 165, "S and P are not kept: a tile of them is made again when it is needed", size=12
    )
    return d.figure("Recomputation: the log-sum-exp L of each row is all that backward needs of S.")


def memories() -> Figure:
    """A GPU's memories, large and slow to small and fast."""
    d = Drawing(680, 250)
    levels = (
        (60, 560, "HBM: 141 GB, 4.8 TB/s", "Q, K, V, O; with the plain formula also S and P", GREY),
        (105, 470, "L2: 50 MB", "the K and V of the heads that are at work", BLUE),
        (150, 380, SHARED, "a ring of K and V blocks", GREEN),
        (195, 290, "registers: 256 KiB on each", "a tile of S, then P; O, m and l", RED),
    )  # fmt: skip
    d.text(340, 32, "one H200: large and slow at the top, small and fast at the bottom", size=12)
    for y, width, name, holds, colour in levels:
        d.box((340 - width / 2, y, width, 40), colour, opacity=0.3)
        d.text(340, y + 17, name, weight="bold", size=12)
        d.text(340, y + 33, holds, size=11)
    return d.figure(
        "Where things are while a kernel runs. S is made and used up in registers and never leaves."
    )


def pipeline() -> Figure:
    """Who does what when in the Hopper forward kernel."""
    d = Drawing(740, 212)
    names = ("loads (TMA)", "tensor cores", "softmax")
    for row, name in enumerate(names):
        d.text(110, 64 + 50 * row, name, anchor="end", size=12, weight="bold")
    for i in range(5):
        d.box((125 + 110 * i, 42, 100, 34), BLUE, opacity=0.3)
        d.text(175 + 110 * i, 63, f"K, V of {i + 1}", size=11)
    for i in range(4):
        x = 180 + 125 * i
        d.box((x, 92, 60, 34), RED, opacity=0.35)
        d.text(x + 30, 113, f"Q K{'₁₂₃₄'[i]}ᵀ", size=11)
        if i:
            d.box((x + 61, 92, 56, 34), ORANGE, opacity=0.4)
            d.text(x + 89, 113, f"P V{'₁₂₃₄'[i - 1]}", size=11)
        d.box((x + 62, 142, 100, 34), GREEN, opacity=0.35)
        d.text(x + 112, 163, f"softmax of {i + 1}", size=11)
    d.arrow((125, 194), (730, 194))
    d.text(400, 207, "time", size=11)
    return d.figure(
        "One compute warpgroup and the one that loads: while blocks arrive, the scores of a block "
        "and the output of the block before are in flight together."
    )


def masks() -> Figure:
    """Which keys a query sees, by option."""
    d = Drawing(700, 180)
    n, cell = 8, 15
    seen: dict[str, Callable[[int, int], bool]] = {
        "is_causal": lambda q, k: k <= q,
        "window (2, 0)": lambda q, k: q - 2 <= k <= q,
        "bottom_right, T 4": lambda q, k: q >= 4 and k <= q,
        "segments, causal": lambda q, k: q // 3 == k // 3 and k <= q,
        "lengths 5": lambda q, k: k < 5,
    }
    for i, (name, rule) in enumerate(seen.items()):
        x = 10 + 138 * i
        d.text(x + n * cell / 2, 24, name, size=12, weight="bold")
        for q in range(n):
            if name.startswith("bottom") and q < 4:
                continue
            for k in range(n):
                fill = BLUE if rule(q, k) else "none"
                d.box((x + k * cell, 36 + q * cell, cell, cell), fill, edge=GREY, opacity=0.7)
    d.text(350, 174, "queries down, keys across; what has no blue square is never visited")
    return d.figure("What each option leaves visible of 8 keys.")
