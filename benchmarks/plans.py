"""What a preset is made of: cells to measure, by which peers, and in which part."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cells import Cell, Pass
from benchmarks.targets import Target

__all__ = ["FAST_PEERS", "SLOW_PEERS", "Plan", "Preset"]

FAST_PEERS = ("jattn/flash", "jax.nn/cudnn", "tokamax/mosaic", "torch/flash", "torch/cudnn")
# Far behind on a GPU: they run in few cells unless they are asked for by name.
SLOW_PEERS = (
    "jattn/memory_efficient",
    "jattn/eager",
    "jax.nn/xla",
    "tokamax/triton",
    "tokamax/xla_chunked",
    "torch/efficient",
)


@dataclass(frozen=True)
class Plan:
    """One cell to measure. Only compiled, for its memory, where `timed` is false."""

    cell: Cell
    passes: tuple[Pass, ...]
    peers: tuple[str, ...]
    timed: bool = True
    repeats: int | None = None  # timed calls; None: as the command line says
    part: str = ""  # a share of the preset that can be run by itself


@dataclass(frozen=True)
class Preset:
    """Cells in the order to run, every peer the run speaks of, and the targets."""

    plans: tuple[Plan, ...]
    peers: tuple[str, ...]
    targets: tuple[Target, ...] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of its parts, in the order to run."""
        return tuple(dict.fromkeys(plan.part for plan in self.plans if plan.part))
