"""The preset `hopper-shapes`: what users ask of Hopper kernels beside squares, each with a bar."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from benchmarks.all_shapes import PEERS, cell_of
from benchmarks.cells import Cell, Pass
from benchmarks.plans import Plan, Preset
from benchmarks.targets import Speed, Target

__all__ = ["hopper_shapes"]

BOTH: tuple[Pass, ...] = ("forward", "gradient")
JUDGED: tuple[Pass, ...] = ("forward", "backward")


def hopper_shapes() -> Preset:
    """On one Hopper GPU, bf16: forward and backward no slower than the best rival in any cell."""
    parts = {
        "few-keys": _few_keys(),
        "head-dims": _head_dims(),
        "short": _short(),
        "small": _small(),
        "long": _long(),
    }
    plans = [Plan(cell, BOTH, PEERS, part=part) for part, cells in parts.items() for cell in cells]
    decode = [Plan(cell, ("forward",), PEERS, part="decode") for cell in _decode()]
    targets: list[Target] = [
        Speed(plan.cell.name, which, "jattn/flash", 1.0, PEERS[1:])
        for plan in plans
        for which in JUDGED
    ]
    targets += [Speed(plan.cell.name, "forward", "jattn/flash", 1.0, PEERS[1:]) for plan in decode]
    return Preset((*plans, *decode), PEERS, tuple(targets))


def _few_keys() -> Iterator[Cell]:
    """Fewer tiles of keys than multiprocessors, or than even out."""
    yield cell_of(128, "32/1", "causal", 2, 4096)
    yield cell_of(128, "32/1", "full", 2, 4096)
    yield cell_of(256, "8/1", "causal", 2, 2048)  # Gemma 2B
    yield cell_of(128, "32/8", "causal", 1, 1024)  # Llama 3, one short sequence
    yield cell_of(64, "16", "full", 16, 4096, keys=77)
    yield cell_of(64, "10", "full", 8, 4096, keys=77)


def _head_dims() -> Iterator[Cell]:
    """No multiple of 64."""
    for head_dim in (40, 48, 72, 80, 88, 96, 112, 160, 176, 192):
        yield cell_of(head_dim, "16", "causal", 4, 4096)
    yield cell_of(192, "16", "causal", 4, 4096, value_dim=128)


def _short() -> Iterator[Cell]:
    """Many short sequences: vision, and what papers call T = 1k."""
    for length, head_dim in product((197, 257, 577, 729, 1000), (64, 72, 80, 96, 128)):
        yield cell_of(head_dim, "16", "full", 64, length)
    yield cell_of(128, "16", "full", 16, 1024)
    yield cell_of(256, "8", "full", 16, 1024)
    yield cell_of(64, "32", "causal", 16, 1024)


def _small() -> Iterator[Cell]:
    """Launches of a few microseconds."""
    for length in (128, 256, 512):
        yield cell_of(64, "8", "causal", 1, length)


def _long() -> Iterator[Cell]:
    """Lengths that no tile divides, grouped heads, windows, documents."""
    yield cell_of(128, "16", "causal", 2, 5000)
    yield cell_of(128, "16", "causal", 1, 12345)
    yield cell_of(128, "32/8", "causal", 2, 8192)
    for window in (128, 1023, 4095):
        yield cell_of(128, "16", f"window:{window}", 1, 16384)
    yield cell_of(128, "16", "packed:8", 1, 16384)
    yield cell_of(128, "32/8", "packed:16", 1, 16384)


def _decode() -> Iterator[Cell]:
    """One query against a cache."""
    for batch, heads, keys in ((16, "32/8", 32768), (1, "32/8", 32768), (64, "32/1", 8192)):
        yield cell_of(128, heads, "full", batch, 1, keys=keys)
