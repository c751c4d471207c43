"""The launch of the portable forward kernels. Importing this imports no kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pallas_kernels.portable.tiles import Tiles

if TYPE_CHECKING:
    from jattn.call.spec import AttentionSpec
    from pallas_kernels.portable.grid import Grid

__all__ = ["Plan", "make_plan"]

PROGRAMS = 256  # about two for each multiprocessor of a large GPU: fewer leave some idle
LEAST_BLOCKS = 4  # of keys, for a share of a split to be worth its joining


@dataclass(frozen=True)
class Plan:
    """The launch of one call: tiles of `tiles.queries` rows, `pack` heads in each."""

    spec: AttentionSpec
    tiles: Tiles
    pack: int = 1
    splits: int = 1

    @property
    def queries(self) -> int:
        """Queries of a tile."""
        return self.tiles.queries // self.pack

    @property
    def shares(self) -> int:
        """Tiles of a head's queries, each share of the keys its own."""
        return -(-self.spec.queries // self.queries) * self.splits

    @property
    def packs(self) -> int:
        """Tiles of a query's heads."""
        spec = self.spec
        return spec.heads if self.pack == 1 else spec.kv_heads * -(-spec.group // self.pack)

    @property
    def grid(self) -> Grid:
        """Its programs."""
        from pallas_kernels.portable.grid import grid_of  # imports Pallas

        last_first = self.spec.band.upper is not None
        return grid_of(self.spec, tiles=self.shares, heads=self.packs, last_first=last_first)

    @property
    def part_bytes(self) -> int:
        """Bytes of the parts that are joined afterwards: outputs, and two numbers a row."""
        spec = self.spec
        rows = spec.batch * spec.queries * spec.heads
        return self.splits * rows * (spec.value_dim + 2) * 4 if self.splits > 1 else 0


def make_plan(spec: AttentionSpec, tiles: Tiles, *, may_split: bool = True) -> Plan:
    """The launch of a call: heads packed if queries are few, keys split if programs are."""
    pack = 1
    if spec.group > 1 and spec.queries <= tiles.queries // 2:
        pack = min(_power(spec.group), tiles.queries)
    rows = max(16, min(tiles.queries, _power(spec.queries) * pack))
    plan = Plan(spec, tiles._replace(queries=rows), pack)
    programs = spec.batch * plan.packs * plan.shares
    blocks = -(-spec.keys // tiles.keys)
    splits = max(1, min(PROGRAMS // programs, blocks // LEAST_BLOCKS)) if may_split else 1
    return Plan(spec, plan.tiles, pack, splits)


def _power(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()
