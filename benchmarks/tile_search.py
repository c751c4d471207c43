"""Tries other tiles of the Hopper forward kernel on this machine's GPU and prints the best.

    python benchmarks/tile_search.py                          the shapes that the table was tuned on
    python benchmarks/tile_search.py --head-dim 96 --mask causal window:1023 --length 4096

Each try differs from the table's choice (`pallas_kernels/hopper/tiles.py`) in one thing, or is one
given as `--tiles warpgroups=3,keys=64`. TFLOP/s by the median of kernel times (CUPTI).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several processes share it

from benchmarks.cells import Cell, Mask

TOKENS, WIDTH = 16384, 2048
type Change = dict[str, Any]

_turn: Any = None  # one process uses the GPU at a time


def tries(head_dim: int) -> list[Change]:
    """Changes to the table's tiles, the first of which is none."""
    found: list[Change] = [{}]
    found += [{"keys": keys} for keys in (64, 128, 192)]
    found += [{"warpgroups": w} for w in (2, 3)[: 2 if head_dim <= 64 else 1]]
    found += [{name: on} for name in ("in_turn", "overlap") for on in (False, True)]
    return [*found, {"query_slots": 0}, {"query_slots": 3}]


def measure(cell: Cell, change: Change, repeats: int) -> tuple[Cell, Change, str, float | None]:
    """TFLOP/s, or why there is none; and the tiles, which another change may lead to as well."""
    import jax
    from jax.experimental.mosaic.gpu import profiler

    from jattn.call.arguments import attention_call
    from pallas_kernels.hopper.forward import forward
    from pallas_kernels.hopper.plan import make_plan

    keys = jax.random.split(jax.random.key(0), 3)
    shape = (cell.batch, cell.queries, cell.heads, cell.head_dim)
    with _turn:
        arrays = jax.block_until_ready([jax.random.normal(k, shape, cell.dtype) for k in keys])
    options: Change = {"is_causal": cell.mask.kind == "causal"}
    if cell.mask.kind == "window":
        options = {"local_window_size": (cell.mask.size, 0)}
    call = attention_call(*arrays, return_residual=True, **options)
    table = make_plan(call.spec).tiles
    changed = replace(table, **change)
    if "warpgroups" in change:
        changed = replace(changed, query_slots=2 * changed.warpgroups)
    if change and all(getattr(table, name) == value for name, value in change.items()):
        return cell, change, "", None
    try:
        plan = make_plan(call.spec, changed)
        run = jax.jit(lambda x: forward(call.spec, x, plan=plan)[0]).lower(call.operands).compile()
        with _turn:
            _, times = profiler.measure(run, iterations=repeats)(call.operands)
    except Exception as error:
        return cell, change, f"{str(error)[:100]}", None
    median = sorted(times)[len(times) // 2] if times else float("inf")
    return cell, change, repr(plan.tiles), cell.flops("forward") / median * 1e-9


def _share(lock: Any) -> None:
    global _turn
    _turn = lock


def main() -> None:
    """Measures, then prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--mask", type=Mask.parse, nargs="+", default=["full", "causal"])
    parser.add_argument("--length", type=int, nargs="+", default=[16384, 4096, 1024])
    parser.add_argument("--tiles", nargs="+", help="fields to change, instead of the usual tries")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--workers", type=int, default=8, help="processes that compile")
    asked = parser.parse_args()
    jobs = []
    for head_dim, mask, length in product(asked.head_dim, asked.mask, asked.length):
        heads = max(1, WIDTH // head_dim)
        mask = Mask.parse(mask) if isinstance(mask, str) else mask
        cell = Cell(max(1, TOKENS // length), length, length, heads, heads, head_dim, mask)
        changes = [{}, *map(_parsed, asked.tiles)] if asked.tiles else tries(head_dim)
        jobs += [(cell, change, asked.repeats) for change in changes]
    context = multiprocessing.get_context("spawn")
    with context.Pool(asked.workers, _share, (context.Lock(),)) as pool:
        found = pool.starmap(measure, jobs, chunksize=1)
    for cell in dict.fromkeys(job[0] for job in jobs):
        print(f"\n{cell.name}")
        own = [(speed or 0, change, tiles) for c, change, tiles, speed in found if c == cell]
        best = max(own, key=lambda x: x[0])
        for speed, change, tiles in own:
            text = ", ".join(f"{k}={v}" for k, v in change.items()) or "the table's"
            if speed or tiles:
                mark = " <" if speed == best[0] else ""
                print(f"  {speed:6.0f}  {text}{mark}" if speed else f"       -  {text}: {tiles}")
        print(f"  best: {best[2]}")


def _parsed(text: str) -> Change:
    from pallas_kernels.hopper.tiles import Tiles

    known = {field.name for field in fields(Tiles)}
    change = {name: int(value) for name, value in (x.split("=") for x in text.split(","))}
    if change.keys() - known:
        raise SystemExit(f"tile_search.py: tiles have {sorted(known)}, given {text!r}")
    return change


if __name__ == "__main__":
    main()
