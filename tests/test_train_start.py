"""Layers compiled apart where they fit, else in a loop over one; what is stored is what ran."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

import train
from tests.promotion import of_others
from tests.tiny_training import OPTIONS, results, write_corpus
from training import environment, start
from training.ahead import Programs
from training.data import Batch
from training.program_memory import Memory
from training.run_folder import MetricsLog
from training.step import TrainState

APART, LOOPED = 9_000_000, 4_000_000  # bytes that the updates are said to take


@pytest.fixture(scope="module", autouse=True)
def optax_promotes() -> Iterator[None]:
    """The optimiser is of another library."""
    with of_others():
        yield


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes that are free; what an update takes is set by whether its layers are in a loop."""
    free = {"bytes": 10_000_000}

    def memory_of_update(programs: Programs, batch: object) -> Memory:
        looped = programs._config.model.scan_blocks
        return Memory(LOOPED if looped else APART, 10**12, 0)

    monkeypatch.setattr(start, "free_bytes", lambda device: free["bytes"])
    monkeypatch.setattr(Programs, "memory_of_update", memory_of_update)
    return free


def trained(tmp_path: Path, name: str, *options: str) -> Path:
    corpus = tmp_path / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    few = ["--steps", "4", "--checkpoint-every", "2", "--num-layers", "2", "--data", str(corpus)]
    runs = ["--runs-dir", str(tmp_path / "runs"), "--name", name]
    assert train.main([*OPTIONS, *few, *runs, *options]) == 0
    return tmp_path / "runs" / name


def test_what_fits_in_a_loop_alone_is_trained_in_one(
    tmp_path: Path,
    said: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    said["bytes"] = 8_000_000
    drawn: list[Any] = []
    draw = Programs.prepare_initial_state
    with monkeypatch.context() as patch:
        patch.setattr(Programs, "prepare_initial_state", lambda x: drawn.append(draw(x)))
        run = trained(tmp_path, "chosen", "--no-scan-blocks")
    assert len(drawn) == 1  # weights take memory
    out = capfd.readouterr().out
    assert [line for line in out.splitlines() if "looped over" in line] == [
        "one block is compiled and looped over: a step takes 3.8 MiB beside the weights, with"
        " blocks apart 8.6 MiB of 7.6 MiB free"
    ]
    assert json.loads((run / "config.json").read_text())["config"]["model"]["scan_blocks"] is True
    assert results(run) == results(trained(tmp_path, "named", "--scan-blocks"))
    assert train.main(["--resume", str(run)]) == 0  # with the configuration that ran


@pytest.mark.parametrize(("free", "looped"), [(10_000_000, LOOPED), (8_000_000, APART - 1)])
def test_layers_stay_apart_where_they_fit_or_a_loop_does_not_either(
    free: int,
    looped: int,
    tmp_path: Path,
    said: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    said["bytes"] = free
    monkeypatch.setattr(f"{__name__}.LOOPED", looped)
    run = trained(tmp_path, "run", "--no-scan-blocks")
    assert "looped over" not in capfd.readouterr().out
    assert json.loads((run / "config.json").read_text())["config"]["model"]["scan_blocks"] is False
    rows = results(run)
    assert rows[0]["held_out_bits_per_byte"] == pytest.approx(8.0, abs=0.01)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("argv", "opened"),
    [
        ([], 1),
        (["--steps=3"], 1),
        (["--help"], 0),
        (["--target", "h100"], 0),
        (["--coordinator_address=auto"], 0),
    ],
)
def test_the_device_is_opened_ahead_where_the_arguments_ask_for_one(
    argv: list[str], opened: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def devices() -> None:
        asked.append(argv)
        raise RuntimeError("no device")  # the trainer comes to that by itself

    def thread(target: Any) -> Any:
        return SimpleNamespace(start=target)

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(environment, "threading", SimpleNamespace(Thread=thread))
    monkeypatch.setattr("sys.argv", ["train.py", *argv])
    environment.open_device()
    assert len(asked) == opened


def test_the_device_has_its_next_update_before_the_last_ones_row_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the state between the two is to be measured or saved: here after 4 and 6."""
    seen: list[str] = []
    update, write = Programs.update, MetricsLog.write

    def updated(programs: Programs, state: TrainState, batch: Batch) -> Any:
        seen.append("update")
        return update(programs, state, batch)

    def written(log: MetricsLog, row: dict[str, Any]) -> None:
        seen.append(str(row["step"]))
        write(log, row)

    monkeypatch.setattr(Programs, "update", updated)
    monkeypatch.setattr(MetricsLog, "write", written)
    options = ["--steps", "7", "--evaluate-every", "4", "--checkpoint-every", "6"]
    trained(tmp_path, "run", *options)
    text = " ".join(seen).replace("update", "+")
    assert text == "0 + 1 + + 2 + 3 4 + + 5 6 + 7"
