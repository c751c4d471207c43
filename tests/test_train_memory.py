"""The memory-scaling report: what it measures, and what it says when it cannot."""

from __future__ import annotations

import dataclasses
import itertools
import json

import jax
import pytest
from rich.console import Console

from models import TransformerConfig
from training.config import MemoryConfig
from training.reports import layer, place, tables
from training.reports.cells import Cell, Watch, notes
from training.units import bytes_text

MODEL = TransformerConfig(hidden_size=32, num_heads=4, num_key_value_heads=2, head_dim=16)
SHORT = MemoryConfig(memory_lengths=(64,))


def _measure(config: MemoryConfig) -> list[Cell]:
    return layer.measure(MODEL, config, place.here(), Watch())


def _text(cells: list[Cell]) -> str:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(tables.as_table(cells))
    return captured.get()


@pytest.fixture(scope="module")
def cells() -> list[Cell]:
    """Longer than a chunk, timed only while that takes next to nothing."""
    return _measure(MemoryConfig(memory_lengths=(4096, 1024, 2048), memory_seconds=0.0))


def test_per_doubling_eager_grows_fourfold_and_memory_efficient_at_most_twofold(
    cells: list[Cell],
) -> None:
    for name, low, high in (("eager", 3.7, 4.1), ("memory_efficient", 1.0, 2.1)):
        own = [cell for cell in cells if cell.implementation == name]
        assert [cell.sequence_length for cell in own] == [1024, 2048, 4096]
        for shorter, longer in itertools.pairwise(own):
            assert shorter.temp_bytes is not None
            assert longer.temp_bytes is not None
            assert low < longer.temp_bytes / shorter.temp_bytes < high


def test_what_the_time_budget_lacks_is_compiled_but_not_timed(cells: list[Cell]) -> None:
    for cell in cells:
        assert cell.status == "not timed"
        assert cell.seconds is None
        assert cell.temp_bytes is not None
        assert cell.total_bytes is not None
        assert cell.total_bytes > cell.temp_bytes


def test_json_has_what_was_measured_and_every_field(cells: list[Cell]) -> None:
    measured = layer.what_is_measured(MODEL)
    report = tables.as_json(cells, measured=measured, device="cpu", seconds=1.25)
    stored = json.loads(json.dumps(report))
    assert "one attention layer, batch 1, 4 query and 2 key heads of 16" in stored["measured"]
    assert stored["device"] == "cpu"
    assert stored["report_seconds"] == 1.2
    assert [Cell(**cell) for cell in stored["cells"]] == cells
    assert set(stored["cells"][0]) == {field.name for field in dataclasses.fields(Cell)}


def test_table_has_a_row_per_length_with_bytes_and_growth(cells: list[Cell]) -> None:
    text = _text(cells)
    for expected in ("eager", "memory_efficient", "1,024", "4,096", "MiB", "x4.0", "not timed"):
        assert expected in text


def test_cells_that_fit_are_timed() -> None:
    cells = _measure(SHORT)
    for cell in cells:
        assert cell.status == "ok"
        assert cell.seconds is not None
        assert 0 < cell.seconds < 10
    assert notes(cells) == []


def test_a_cell_larger_than_free_memory_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "free_bytes", lambda device: 1000)
    for cell in _measure(SHORT):
        assert cell.status == "too large"
        assert cell.temp_bytes is not None
        assert "1000 B are free" in cell.note or "0 KiB are free" in cell.note
        assert cell.seconds is None


def test_running_out_of_memory_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> float:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    monkeypatch.setattr(layer, "run", fail)
    cells = _measure(SHORT)
    assert [cell.status for cell in cells] == ["out of memory", "out of memory"]
    assert "out of memory" in _text(cells)
    assert "allocating 9 bytes" in notes(cells)[0]


def test_any_other_failure_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> float:
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(layer, "run", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        _measure(SHORT)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="flash runs on a GPU")
def test_an_implementation_that_is_refused_is_a_cell_with_its_reason() -> None:
    (cell,) = _measure(dataclasses.replace(SHORT, memory_implementations=("flash",)))
    assert cell.status == "unsupported"
    assert "needs an NVIDIA GPU" in cell.note
    assert "\n" not in cell.note
    assert "unsupported" in _text([cell])


def test_a_stop_request_ends_the_report() -> None:
    assert layer.measure(MODEL, SHORT, place.here(), Watch(lambda: True)) == []


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1023, "1.0 KiB"), (1536, "1.5 KiB"), (260 << 20, "260 MiB")],
)
def test_bytes_are_written_in_binary_units(count: int, text: str) -> None:
    assert bytes_text(count) == text
