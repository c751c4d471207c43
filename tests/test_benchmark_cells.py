"""The benchmark program's cells and presets: their masks, their work, and what is judged."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks import presets, targets
from benchmarks.cells import Cell, Mask
from tests.benchmark_cells import SMALL, cell, mask_in_words

MASKS = (
    "full",
    "causal",
    "window:0",
    "window:5",
    "window:500",
    "packed:1",
    "packed:3",
    "documents:3",
)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("length", [3, 12, 27])
def test_cells_see_what_the_mask_says(mask: str, length: int) -> None:
    shown = cell(mask, queries=length, keys=length)
    np.testing.assert_array_equal(shown.dense_mask(), mask_in_words(shown))


def test_queries_past_the_last_key_see_the_window_that_is_there() -> None:
    shown = cell("window:3", keys=10)
    np.testing.assert_array_equal(shown.dense_mask(), mask_in_words(shown))
    assert shown.visible_pairs() == mask_in_words(shown).sum()


def test_documents_of_random_lengths_begin_where_the_last_ended() -> None:
    ids = cell("documents:5").documents()
    assert ids[0] == 0
    assert set(np.diff(ids)) == {0, 1}
    assert ids[-1] == 4
    assert len(set(np.bincount(ids))) > 1


def test_flops_count_half_of_causal_and_every_pair_of_a_window() -> None:
    per_pair = 4 * SMALL.heads * SMALL.head_dim
    assert cell("full").flops("forward") == per_pair * 24**2
    assert cell("causal").flops("forward") == per_pair * 24**2 / 2
    assert cell("packed:3").flops("forward") == per_pair * 3 * 8**2 / 2
    lengths = np.bincount(cell("documents:3").documents())
    assert cell("documents:3").flops("forward") == per_pair * (lengths**2).sum() / 2
    assert cell("causal").flops("backward") == 2.5 * cell("causal").flops("forward")
    assert cell("causal").flops("gradient") == 3.5 * cell("causal").flops("forward")
    for window in ("window:0", "window:5", "window:500"):
        assert cell(window).flops("forward") == per_pair * mask_in_words(cell(window)).sum()


@pytest.mark.parametrize(
    "text", ["", "window", "window:-1", "packed:0", "documents:0", "causal:3", "other"]
)
def test_masks_that_are_not_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"mask must be full, causal, window:LEFT"):
        Mask.parse(text)


def test_presets_name_every_cell_once_and_judge_cells_they_plan() -> None:
    for name, build in presets.PRESETS.items():
        preset = build()
        names = [plan.cell.name for plan in preset.plans]
        assert len(set(names)) == len(names), name
        assert all(set(names).issuperset(target.cells) for target in preset.targets), name
        assert all(Cell.from_json(p.cell.to_json()) == p.cell for p in preset.plans), name


def test_the_forward_preset_is_the_bar_table() -> None:
    cells = [plan.cell for plan in presets.hopper_forward().plans]
    table = [c for c in cells if c.mask.kind in ("full", "causal") and c.queries > 1]
    assert {(c.head_dim, c.mask.kind, c.queries) for c in table} == {
        (h, m, t) for h in (64, 128, 256) for m in ("full", "causal") for t in (1024, 4096, 16384)
    }
    assert all(c.batch * c.queries == 16384 and c.heads * c.head_dim == 2048 for c in table)
    assert [c.name for c in cells if c not in table] == [
        "h128-n16-window:1023-b1-t16384",
        "h128-n16-packed:8-b1-t16384",
        "h128-n32k8-full-b16-t1-s32768",
        "h128-n32k8-full-b1-t1-s32768",
    ]


PLAIN = {"bias": False, "dropout": 0.0, "dtype": "bfloat16"}


def test_every_cell_of_the_preset_of_shapes_has_a_bar_in_each_pass() -> None:
    preset = presets.PRESETS["hopper-shapes"]()
    judged = {(target.cell, target.which): target for target in preset.targets}
    assert len(judged) == len(preset.targets)
    for plan in preset.plans:
        passes = {"forward"} | ({"backward"} if "gradient" in plan.passes else set())
        assert {which for cell, which in judged if cell == plan.cell.name} == passes
        assert set(plan.peers) > {
            "jattn/flash",
            "jax.nn/cudnn",
            "tokamax/mosaic",
            "flash-attn3-jax",
        }
    assert {target.at_least for target in judged.values()} == {1.0}
    assert "jattn/flash" not in {peer for target in judged.values() for peer in target.against}
    assert {197, 257, 577, 729, 1000} <= {plan.cell.queries for plan in preset.plans}


def test_the_portable_preset_judges_each_cells_rate() -> None:
    preset = presets.portable()
    cells = {plan.cell.name: plan.cell for plan in preset.plans}
    square = [c for c in cells.values() if c == dataclasses.replace(c, **PLAIN)]
    assert {(c.head_dim, c.mask.kind) for c in square} == {
        (h, m) for h in (64, 128, 256) for m in ("full", "causal")
    }
    assert all((c.batch, c.queries, c.heads * c.head_dim) == (4, 4096, 2048) for c in square)
    bars = {(t.cell, t.which): t.at_least for t in preset.targets if isinstance(t, targets.Rate)}
    for c in square:
        forward, backward = {64: (270, 215), 128: (320, 240), 256: (220, 120)}[c.head_dim]
        assert (bars[c.name, "forward"], bars[c.name, "backward"]) == (forward, backward)
    (time,) = [t for t in preset.targets if isinstance(t, targets.Time)]
    assert cells[time.cell].bias
    assert (time.which, time.at_most_ms) == ("gradient", 10.0)
    (memory,) = [t for t in preset.targets if isinstance(t, targets.Memory)]
    table = 2 * cells[memory.cell].heads * 4096**2 / 2**20
    assert memory.at_most_mib < table
    dropped = [t for t in preset.targets if cells[t.cell].dropout]
    assert [(t.which, 1 / t.at_least) for t in dropped] == [("forward", 1.2), ("gradient", 1.2)]


def test_the_cpu_preset_doubles_lengths_and_compiles_the_longest_alone() -> None:
    plans = [p for p in presets.cpu().plans if p.cell.dtype == "float32"]
    lengths = {p.cell.queries: p.timed for p in plans if p.cell.mask.kind == "causal"}
    assert lengths == {512: True, 1024: True, 2048: True, 4096: True, 8192: False}
