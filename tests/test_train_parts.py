"""Parts of the trainer that a whole run does not show: presets, rates, metrics, names, bars."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console

from models import TransformerConfig
from training import cli, config, free_memory, run_folder
from training.config import PRESETS, DataConfig, TrainConfig, from_json
from training.data import Batch, Text, evaluation_batches, training_batch
from training.errors import TrainingError
from training.loop import shape_line
from training.progress import TrainingProgress
from training.run_folder import MetricsLog
from training.step import parameter_count
from training.throughput import Pace, peak_flops, step_flops


@pytest.mark.parametrize("preset", PRESETS)
def test_a_stored_configuration_reads_back_equal(preset: config.PresetName) -> None:
    stored = json.loads(json.dumps(dataclasses.asdict(PRESETS[preset])))
    assert from_json(stored, "config.json") == PRESETS[preset]


def test_the_gpu_preset_is_taken_on_a_gpu_or_when_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = PRESETS["gpu"]
    assert (gpu.data.sequence_length, gpu.model.dtype) == (32_768, "bfloat16")
    assert cli.parse(["--preset", "gpu"]).config == gpu
    for backend, preset in (("gpu", gpu), ("cpu", PRESETS["cpu"])):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert cli.parse([]).config == preset
        assert cli.parse(["--preset=cpu"]).config == PRESETS["cpu"]


def test_an_option_changes_its_field_alone() -> None:
    changed = cli.parse(["--preset", "cpu", "--num-layers", "7", "--data", "x"]).config
    expected = dataclasses.replace(
        PRESETS["cpu"],
        model=dataclasses.replace(PRESETS["cpu"].model, num_layers=7),
        data=dataclasses.replace(PRESETS["cpu"].data, data="x"),
    )
    assert changed == expected
    assert config.differences(PRESETS["cpu"], changed) == [
        f"num_layers (was {PRESETS['cpu'].model.num_layers}, now 7)",
        "data (was None, now x)",
    ]


def test_what_does_not_shape_the_losses_may_differ() -> None:
    record = dataclasses.replace(PRESETS["cpu"].record, log_every=1)
    assert config.differences(TrainConfig(), TrainConfig(record=record)) == []


def _batch(rows: int, length: int, ids: list[list[int]] | None = None) -> Batch:
    zeros = np.zeros((rows, length), np.uint8)
    return Batch(zeros, zeros, None if ids is None else np.asarray(ids, np.int32))


def test_step_flops_count_matrices_and_the_pairs_that_attention_sees() -> None:
    model = TransformerConfig(
        hidden_size=8, num_layers=3, num_heads=4, num_key_value_heads=2, head_dim=6, mlp_size=10
    )
    weights = 3 * (8 * 24 + 2 * 8 * 12 + 24 * 8 + 3 * 8 * 10) + 256 * 8
    causal = 2 * (1 + 2 + 3 + 4)
    assert step_flops(model, _batch(2, 4)) == 6 * weights * 8 + 12 * 3 * 24 * causal
    packed = (1 + 2 + 1 + 2) + (1 + 1 + 2 + 3)
    ids = [[0, 0, 1, 1], [2, 3, 3, 3]]
    assert step_flops(model, _batch(2, 4, ids)) == 6 * weights * 8 + 12 * 3 * 24 * packed


def test_mfu_is_of_the_device_kinds_bfloat16_peak_and_absent_elsewhere() -> None:
    half = TransformerConfig(dtype="bfloat16")
    for kind, peak in (
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA GH200 144G HBM3e", 989e12),
        ("NVIDIA L40", 181e12),  # neither an L4 nor an L40S
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),  # another chip
        ("cpu", None),
    ):
        device: Any = SimpleNamespace(device_kind=kind)
        assert peak_flops(half, device) == peak
        assert peak_flops(TransformerConfig(), device) is None
    pace = Pace(half, peak=1e12)
    batch = _batch(2, 4)
    assert pace.add(batch, 99.0) == {}  # compilation
    assert pace.add(_batch(4, 2), 99.0) == {}  # of another shape
    assert pace.add(batch, 0.5) == {
        "tokens_per_second": 16,
        "mfu": step_flops(half, batch) / 0.5 / 1e12,
    }
    pace.add(batch, 1.5)
    assert pace.take()["tokens_per_second"] == 8
    assert pace.take() == {}


def test_default_names_are_unique(tmp_path: Path) -> None:
    folders = [run_folder.create(str(tmp_path), None, TrainConfig(), {}) for _ in range(3)]
    assert len({folder.path for folder in folders}) == 3
    assert all(folder.path.name.startswith("20") for folder in folders)


def test_metrics_keep_rows_up_to_the_step_and_drop_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    with MetricsLog(path, after_step=1) as log:
        assert log.last_step == 1
        log.write({"step": 2, "loss": 1.5})
        assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2, "loss": 1.5}\n'


def test_metrics_damaged_in_the_middle_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\nnonsense\n{"step": 2}\n')
    with pytest.raises(TrainingError, match=r"line 2 is not a row of metrics: 'nonsense'"):
        MetricsLog(path, after_step=2)
    assert path.read_text() == '{"step": 0}\nnonsense\n{"step": 2}\n'


def test_a_terminal_gets_a_bar_and_a_pipe_lines_alone() -> None:
    shown = {}
    for terminal in (True, False):
        output = io.StringIO()
        console = Console(file=output, force_terminal=terminal, width=120, _environ={})
        with TrainingProgress(console, total=8, done=0) as progress:
            progress.advance(4, 2.5)
            progress.line("step 4/8  [not markup]")
        shown[terminal] = output.getvalue()
    assert shown[False] == "step 4/8  [not markup]\n"
    assert "4/8" in shown[True].replace("step 4/8", "")
    assert "2.50 bits/byte" in shown[True]
    assert "step 4/8  [not markup]" in shown[True]


def test_free_memory_is_the_least_of_machine_and_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu: Any = SimpleNamespace(platform="cpu")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:  50 kB\nHugePages_Total: 0\n")
    monkeypatch.setattr(free_memory, "_MEMINFO", meminfo)
    files = {"memory.max": "max", "memory.current": "4000", "memory.stat": "inactive_file 1000\n"}
    monkeypatch.setattr(free_memory, "_cgroup", lambda name: files[name.split("/")[-1]])
    monkeypatch.setattr(free_memory, "_CGROUPS", (tuple(files),))
    assert free_memory.free_bytes(cpu) == 50 * 1024
    files["memory.max"] = "24000"
    assert free_memory.free_bytes(cpu) == 24000 - 4000 + 1000
    gpu: Any = SimpleNamespace(
        platform="gpu", memory_stats=lambda: {"bytes_limit": 90, "bytes_in_use": 20}
    )
    assert free_memory.free_bytes(gpu) == 70


def test_first_steps_take_as_many_bytes_in_shorter_sequences() -> None:
    text = Text.join([bytes(range(256)) * 4])
    options = DataConfig(
        sequence_length=64, batch_size=2, short_sequence_length=16, short_share=0.3
    )

    def shape(options: DataConfig, step: int, steps: int | None) -> tuple[int, ...]:
        return training_batch(text, options, seed=0, step=step, steps=steps).inputs.shape

    assert [shape(options, step, 10) for step in (1, 3, 4)] == [(8, 16), (8, 16), (2, 64)]
    assert shape(options, 1, None) == (2, 64)
    assert shape(dataclasses.replace(options, short_sequence_length=100), 1, 10) == (2, 64)
    assert next(evaluation_batches(text, options, 2)).inputs.shape == (2, 64)
    with pytest.raises(ValueError, match="short_share must be at least 0 and below 1, got 1"):
        dataclasses.replace(options, short_share=1)


def test_the_readme_gives_the_gpu_presets_result_as_measured() -> None:
    """In five minutes below 2.0 bits per byte and below what xz makes of the same text."""
    root = Path(config.__file__).parent.parent
    folder = root / "training/results/h100/run-32k"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    facts = json.loads((folder / "config.json").read_text())
    held_out = rows[-1]["held_out_bits_per_byte"]
    xz = facts["corpus"]["held_out_compressed_bits_per_byte"]["xz -9e"]
    readme = (root / "README.md").read_text()
    assert f"[{held_out:.2f} bits per byte](training/results/h100" in readme
    assert f"where xz has {xz:.2f}" in readme
    assert f"GPU {parameter_count(PRESETS['gpu']) / 1e6:.0f} million in bfloat16" in readme
    assert held_out < min(2.0, xz)
    assert sum(row.get("seconds", 0) for row in rows) < 300
    assert rows[-1]["step"] == PRESETS["gpu"].optimizer.steps
    assert facts["config"]["optimizer"] == dataclasses.asdict(PRESETS["gpu"].optimizer)
    assert facts["config"]["data"] == dataclasses.asdict(PRESETS["gpu"].data)


def test_the_readme_gives_the_rate_of_the_longest_sequence_as_measured() -> None:
    root = Path(config.__file__).parent.parent
    file = root / "training/results/h100/run-512k/metrics.jsonl"
    last = json.loads(file.read_text().splitlines()[-1])
    rate = last["tokens_per_second"]
    assert math.isclose(rate * last["seconds"], 524_288)
    assert (
        f"[{round(rate, -2):,.0f} a second]({file.relative_to(root)})"
        in (root / "README.md").read_text()
    )


def test_the_readme_gives_the_cpu_presets_result_as_measured() -> None:
    """The run was of the preset as it is; its time is that of a run with two cores to itself."""
    root = Path(config.__file__).parent.parent
    folder = root / "training/results/cpu/run"
    facts = json.loads((folder / "config.json").read_text())
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    held_out = last["held_out_bits_per_byte"]
    zlib = facts["corpus"]["held_out_compressed_bits_per_byte"]["zlib -9"]
    readme = (root / "README.md").read_text()
    assert f"[{held_out:.2f} bits per byte](training/results/cpu/run" in readme
    assert f"where zlib has {zlib:.2f}" in readme
    assert held_out < zlib
    assert last["step"] == PRESETS["cpu"].optimizer.steps
    for part in ("model", "optimizer", "data"):
        assert facts["config"][part] == dataclasses.asdict(getattr(PRESETS["cpu"], part))

    runs = json.loads((root / "training/results/cpu/presets.json").read_text())["runs"]
    measured, *variants = runs
    assert measured["changes"] == {}
    assert measured["steps"] == pytest.approx(PRESETS["cpu"].optimizer.steps, rel=0.05)
    assert measured["seconds"] < 180
    least = min(run["held_out_bits_per_byte"] for run in variants)
    assert measured["held_out_bits_per_byte"] < least


def test_short_steps_say_what_held_out_text_is_read_in() -> None:
    assert shape_line((8, 256), "bytes", 1024).endswith(
        "; held-out sequences are of 1,024, which the last steps are for"
    )
    assert shape_line((2, 1024), "bytes", 1024) == "2 x 1,024 bytes a step"
