"""The preset `all`: its shapes, its parts, and that runs go on and merge."""

from __future__ import annotations

import dataclasses
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import pytest

from benchmarks import attention, flash_attn3, jax_calls, merge, report
from benchmarks.all_shapes import all_shapes
from benchmarks.cells import Cell, Mask
from benchmarks.results import LEFT_OUT, NOT_REACHED, OUT_OF_TIME, Measurement, Run
from benchmarks.row_check import row_error, rows_to_check

SMALL = Cell(2, 24, 24, 4, 2, 8, Mask("causal"), "float32")
WIDE = Cell(1, 8, 8, 2, 1, 128, Mask("causal"))


def test_all_has_the_shapes_that_users_have() -> None:
    preset = all_shapes()
    assert preset.parts == ("memory", "square", "users")
    cells = [plan.cell for plan in preset.plans if plan.part == "users"]
    assert {(c.heads, c.kv_heads) for c in cells} >= {(32, 8), (32, 1)}
    widths = {(c.head_dim, c.values) for plan in preset.plans for c in [plan.cell]}
    assert widths >= {(h, h) for h in (64, 72, 80, 96, 128, 256)} | {(192, 128)}
    assert {c.queries for c in cells} >= {1, 197, 577, 729, 1000, 5000, 12345}
    assert any(c.keys == 77 < c.queries for c in cells)
    assert {c.mask.kind for c in cells} == {"full", "causal", "window", "packed"}
    assert any(c.bias for c in cells)
    long = [plan for plan in preset.plans if plan.part == "memory"]
    assert max(plan.cell.queries for plan in long) == 2**20
    assert not any(plan.timed for plan in long)


def test_a_value_head_dim_of_its_own_is_counted_named_and_checked() -> None:
    cell = dataclasses.replace(SMALL, value_dim=12)
    pairs = cell.batch * cell.heads * cell.visible_pairs()
    assert cell.flops("forward") == 2 * pairs * (8 + 12)  # Q Kᵀ, P V
    assert cell.flops("backward") == 2 * pairs * (8 + 12 + 12 + 8 + 8)  # and dP, dV, dQ, dK
    assert cell.flops("gradient") == cell.flops("forward") + cell.flops("backward")
    assert cell.name == SMALL.name.replace("h8-", "h8v12-")
    assert Cell.from_json(cell.to_json()) == cell
    assert "head dim 8/12" in report.title(cell)
    old = {k: v for k, v in SMALL.to_json().items() if k != "value_dim"}
    assert Cell.from_json(old) == SMALL
    with jax.default_matmul_precision("highest"):
        call = jax_calls.prepare("jattn/eager", cell, "forward")
        out = np.array(call())
    assert out.shape == (2, 24, 4, 12)
    assert call.error(out) < 1e-5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"head_dim": 64}, "its wheel is for head dim 128 alone"),
        ({"value_dim": 64}, "its wheel is for head dim 128 alone"),
        ({"bias": True}, "takes no bias"),
        ({"dtype": "float32"}, "dtype float32 is not bfloat16 or float16"),
        ({"keys": 16}, "causal is from the bottom right (T 8, S 16)"),
    ],
)
def test_flash_attn3_is_refused_what_it_cannot(changes: dict[str, Any], reason: str) -> None:
    assert flash_attn3.refusal(dataclasses.replace(WIDE, **changes)) == reason


def _flash_mha(q: Any, k: Any, v: Any, is_causal: bool, window_size: tuple[int, int]) -> Any:
    """What flash-attn3-jax documents, in float64: -1 is an open side, causal closes the right."""
    left, right = window_size
    i, j = np.mgrid[: q.shape[1], : k.shape[1]]
    seen = (left < 0) | (j >= i - left)
    seen &= (right < 0) | (j <= i + right)
    seen &= (j <= i) | (not is_causal)
    group = q.shape[2] // k.shape[2]
    k, v = (np.repeat(np.asarray(x, np.float64), group, axis=2) for x in (k, v))
    logits = np.einsum("btnh,bsnh->bnts", np.asarray(q, np.float64), k) / np.sqrt(q.shape[-1])
    weights = np.exp(np.where(seen, logits, -np.inf))
    return np.einsum("bnts,bsnd->btnd", weights / weights.sum(axis=-1, keepdims=True), v)


def _flash_mha_varlen(
    q: Any, k: Any, v: Any, starts: Any, *, max_seqlen_q: int, max_seqlen_k: int, **options: Any
) -> Any:
    bounds = [int(x) for x in starts]
    assert max_seqlen_q == max_seqlen_k == max(np.diff(bounds))
    parts = [
        _flash_mha(*(x[None, a:b] for x in (q, k, v)), **options)[0] for a, b in pairwise(bounds)
    ]
    return np.concatenate(parts)


def _flash_mha_with_kvcache(q: Any, k: Any, v: Any, *, num_splits: int, **options: Any) -> Any:
    assert num_splits == 132 // (q.shape[0] * k.shape[2])
    return _flash_mha(q, k, v, **options)


@pytest.mark.parametrize("mask", ["full", "causal", "window:5", "packed:3", "decode"])
def test_flash_attn3_is_called_as_it_documents(mask: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("flash_attn3_jax")
    module.flash_mha = _flash_mha
    module.flash_mha_varlen = _flash_mha_varlen
    module.flash_mha_with_kvcache = _flash_mha_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn3_jax", module)
    cell = dataclasses.replace(SMALL, mask=Mask.parse("full" if mask == "decode" else mask))
    if mask == "decode":
        cell = dataclasses.replace(cell, queries=1)
    random = np.random.default_rng(0)
    sizes = {"query": (cell.queries, cell.heads), "key": (cell.keys, cell.kv_heads)}
    sizes["value"] = sizes["key"]
    arrays: Any = {n: random.normal(size=(cell.batch, *s, 8)) for n, s in sizes.items()}
    out = np.asarray(flash_attn3.attend_with(cell)(arrays))
    for b, t, n in rows_to_check(cell):
        k = n // (cell.heads // cell.kv_heads)
        row = {"query": arrays["query"][b, t, n]}
        row |= {name: arrays[name][b, :, k] for name in ("key", "value")}
        assert row_error(cell, (b, t, n), row, out[b, t, n]) < 1e-12


def run_of(date: str, *found: Measurement, **facts: Any) -> Run:
    machine = {"platform": "gpu", "chip": "A Chip", "driver": "driver 1", **facts}
    run = Run("all", date, machine, {"jax": "1"}, {})
    for measurement in found:
        run.add(SMALL, measurement)
    return run


def test_merged_runs_keep_what_was_measured_and_the_later_of_two() -> None:
    one = run_of(
        "2026-01-01",
        Measurement("a", "forward", ms=1.0),
        Measurement("b", "forward", ms=2.0),
        Measurement("c", "forward", reason=NOT_REACHED),
        Measurement("d", "forward", reason="cannot"),
        Measurement("e", "forward", ms=5.0),
        Measurement("f", "forward", ms=6.0),
    )
    two = run_of(
        "2026-01-02",
        Measurement("a", "forward", reason=OUT_OF_TIME),
        Measurement("b", "forward", ms=3.0),
        Measurement("c", "forward", ms=4.0),
        Measurement("d", "forward", reason=LEFT_OUT),
        Measurement("e", "forward", reason="JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory"),
        Measurement("f", "forward", reason="OutOfMemoryError: CUDA out of memory."),
        matmul_tflops=700.0,
    )
    for order in ([one, two], [two, one]):
        whole = merge.merged(order)
        kept = {m.peer: m.ms or m.reason for m in whole.measurements[SMALL.name]}
        assert kept == {"a": 1.0, "b": 3.0, "c": 4.0, "d": "cannot", "e": 5.0, "f": 6.0}
        assert whole.date == "2026-01-02"
        assert whole.machine["matmul_tflops"] == 700.0
    assert one.measurements[SMALL.name][2].reason == NOT_REACHED


@pytest.mark.parametrize("facts", [{"chip": "Another"}, {"driver": "driver 2"}])
def test_runs_of_two_machines_are_not_merged(facts: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="must be the same in all runs"):
        merge.merged([run_of("2026-01-01"), run_of("2026-01-02", **facts)])


TINY = ["--preset", "cpu", "--length", "64", "--heads", "2", "--head-dim", "8", "--window", "8"]


def test_a_run_goes_on_where_its_file_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    path, peer = tmp_path / "run.json", "jattn/memory_efficient"
    options = [*TINY, "--peers", peer, "--repeats", "1", "--out", str(path)]
    cells = [
        plan.cell for plan in attention.chosen_preset(attention.parse(TINY), on_gpu=False)[1].plans
    ]
    done, out_of_time, missing = [c for c in cells if c.dtype == "float32" and c.queries == 64]
    chip = attention.machine({"platform": "cpu", "chip": ""})["chip"]
    run = Run("cpu", "2026-01-01", {"platform": "cpu", "chip": chip}, {}, {})
    for which in ("forward", "gradient"):
        run.add(done, Measurement(peer, which, ms=123.0))
        run.add(out_of_time, Measurement(peer, which, reason=OUT_OF_TIME))
    run.save(path)
    names = [cell.name for cell in (done, out_of_time, missing)]
    attention.main([*options, "--cells", *names, "--resume"])
    whole = Run.load(path)
    times = []
    for name in names:
        found = whole.get(name, peer, "forward")
        assert found is not None
        times.append(found.ms)
    assert times[0] == 123.0
    assert None not in times
    assert 123.0 not in times[1:]


def test_a_part_that_is_not_is_answered_with_those_that_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = attention.parse(["--part", "other"])
    with pytest.raises(SystemExit):
        attention.plan(all_shapes(), asked, run_of("2026-01-01"), on_gpu=True)
    assert "the preset all has memory, square, users" in capsys.readouterr().err


def test_a_peer_that_is_not_is_answered_with_those_that_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = attention.parse(["--peers", "other"])
    with pytest.raises(SystemExit):
        attention.plan(all_shapes(), asked, run_of("2026-01-01"), on_gpu=True)
    assert "match --peers other; the peers are jattn/flash, " in capsys.readouterr().err


def test_no_process_outlives_a_wrong_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = []

    class Worker:
        facts: ClassVar = {"platform": "cpu"}

        def __init__(self, *arguments: object) -> None: ...

        def stop(self) -> None:
            stopped.append(self)

    monkeypatch.setattr(attention, "Worker", Worker)
    with pytest.raises(SystemExit):
        attention.main(["--mask", "other"])
    assert stopped
