"""Whole runs of train.py: what they leave, stopping and resuming, and what they refuse."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import train
import training.loop
from tests.cases import first
from tests.promotion import of_others
from tests.tiny_training import LENGTH, OPTIONS, STEPS, results, rows, write_corpus
from training import cli
from training.checkpoints import Checkpoints
from training.data import load_corpus
from training.reports import layer

# In one process, which then trains the run that others are compared with once.
pytestmark = pytest.mark.xdist_group("train_runs")

REPOSITORY = Path(train.__file__).parent
TRAIN = [sys.executable, str(REPOSITORY / "train.py")]


@pytest.fixture(scope="module", autouse=True)
def optax_promotes() -> Iterator[None]:
    """The optimiser is of another library."""
    with of_others():
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted, with the memory report."""
    runs = tmp_path_factory.mktemp("whole") / "runs"
    report = ["--memory-report", "--memory-lengths", "32", "64"]
    assert train.main([*_options(corpus, runs), "--name", "whole", *report]) == 0
    return runs / "whole"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """The finished run, to damage."""
    shutil.copytree(whole, tmp_path / "copy")
    return tmp_path / "copy"


def _options(corpus: Path, runs: Path) -> list[str]:
    return [*OPTIONS, "--data", str(corpus), "--runs-dir", str(runs)]


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def _state(run: Path) -> list[np.ndarray[Any, Any]]:
    config = cli.read_config(run)
    corpus = load_corpus(config.data).fingerprint
    state = Checkpoints(run / "checkpoints", config, corpus).restore()
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def _stop_at(step: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the signal arrive while `step` is on its way."""
    draw = training.loop.training_batch

    def draw_and_signal(*arguments: Any, **named: Any) -> Any:
        if named["step"] == step + 1:
            os.kill(os.getpid(), number)
        return draw(*arguments, **named)

    monkeypatch.setattr(training.loop, "training_batch", draw_and_signal)


def test_a_run_leaves_its_configuration_metrics_checkpoints_and_plots(whole: Path) -> None:
    assert {path.name for path in whole.iterdir()} == {
        *("config.json", "metrics.jsonl", "checkpoints"),
        *("loss.png", "memory_scaling.png", "memory_scaling.json"),
    }
    assert sorted(int(path.name) for path in (whole / "checkpoints").iterdir()) == [250, STEPS]
    for name in ("loss.png", "memory_scaling.png"):
        assert (whole / name).read_bytes().startswith(b"\x89PNG")
    stored = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    assert stored["config"]["optimizer"]["steps"] == STEPS
    assert stored["corpus"]["held_out_files"]
    assert 0 < stored["corpus"]["held_out_compressed_bits_per_byte"]["xz -9e"] < 8


def test_metrics_have_each_step_once_and_held_out_text_gets_easier(whole: Path) -> None:
    found = rows(whole)
    assert [row["step"] for row in found] == list(range(STEPS + 1))
    held_out = {
        row["step"]: row["held_out_bits_per_byte"]
        for row in found
        if "held_out_bits_per_byte" in row
    }
    assert list(held_out) == [0, 75, 150, 225, STEPS]
    assert held_out[0] == pytest.approx(8, abs=1e-3)
    assert held_out[STEPS] < 5
    assert found[1]["loss"] == pytest.approx(np.log(256), abs=1e-3)
    assert found[12]["learning_rate"] == pytest.approx(0.01)
    assert found[STEPS]["learning_rate"] == pytest.approx(0.0005)
    assert all(row["tokens_per_second"] > 0 for row in found[2:])
    assert [row["step"] for row in found if "seconds_since_start" in row] == [1]
    assert found[1]["seconds_since_start"] > found[1]["seconds"]


@pytest.mark.parametrize("number", first(1, [signal.SIGTERM, signal.SIGINT]))
def test_a_signal_saves_and_the_run_resumes_bit_for_bit(
    number: signal.Signals,
    whole: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "runs" / "stopped"
    with monkeypatch.context() as patch:
        _stop_at(166, number, patch)
        status = train.main([*_options(corpus, run.parent), "--name", run.name])
    assert status == 128 + number
    out, err = capfd.readouterr()
    assert err == ""
    assert f"{number.name}: saved after step 166" in out
    assert out.rstrip().endswith(f"--resume {run}")
    assert results(run) == results(whole)[:167]

    assert train.main(["--resume", str(run)]) == 0
    assert results(run) == results(whole)
    for resumed, uninterrupted in zip(_state(run), _state(whole), strict=True):
        np.testing.assert_array_equal(resumed, uninterrupted)


def test_a_signal_during_the_memory_report_saves_the_start(
    whole: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = layer.measure

    def measure_and_signal(*arguments: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return measure(*arguments, **named)

    run = tmp_path / "stopped"
    options = [*_options(corpus, tmp_path), "--name", run.name, "--memory-report"]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "measure", measure_and_signal)
        assert train.main(options) == 130
    assert rows(run) == []
    assert not (run / "memory_scaling.json").exists()
    assert train.main(["--resume", str(run), "--memory-lengths", "32"]) == 0
    assert results(run) == results(whole)
    assert (run / "memory_scaling.json").exists()


def test_rows_after_the_checkpoint_are_not_repeated(whole: Path, copy: Path) -> None:
    shutil.rmtree(copy / "checkpoints" / str(STEPS))  # as if killed after step 275
    lines = (copy / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    cut = "".join(lines[:276]) + lines[276][:20]
    (copy / "metrics.jsonl").write_text(cut, encoding="utf-8")
    assert train.main(["--resume", str(copy)]) == 0
    assert results(copy) == results(whole)


def _shown(output: str) -> list[int]:
    """The steps that have a line."""
    return [int(step) for step in re.findall(rf"^step +(\d+)/{STEPS} ", output, flags=re.MULTILINE)]


def test_another_process_stops_at_ctrl_c_and_its_resume_command_works(
    whole: Path,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Its plain output is one line per interval, without warnings, before and after."""
    process = subprocess.Popen(
        [*TRAIN, *OPTIONS, "--data", str(corpus)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONWARNINGS": "default"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not any(
        '"step": 1,' in metrics.read_text() for metrics in tmp_path.glob("runs/*/metrics.jsonl")
    ):
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert err == ""
    (run,) = (tmp_path / "runs").iterdir()
    stopped = results(run)[-1]["step"]
    assert 1 <= stopped <= STEPS
    due = (0, 1, 50, 75, 100, 150, 200, 225, 250, STEPS)
    assert _shown(out) == [step for step in due if step <= stopped]
    *program, option, folder = shlex.split(out.splitlines()[-1])
    assert program == TRAIN
    monkeypatch.chdir(tmp_path)
    assert train.main([option, folder]) == 0
    more, err = capfd.readouterr()
    assert err == ""
    assert results(run) == results(whole)
    assert _shown(more) == sorted({stopped + 1, *(step for step in due if step > stopped)})
    assert "\x1b" not in out + more
    assert "tokens/s" in more
    assert "held-out bits/byte: 8.000 -> " in more
    assert "zlib -9" in more
    assert str(run.relative_to(tmp_path)) in out


def test_resuming_a_finished_run_changes_no_result(copy: Path) -> None:
    before = results(copy)
    assert train.main(["--resume", str(copy)]) == 0
    assert results(copy) == before


def _refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr."""
    assert train.main(list(arguments)) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("train.py: error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "/no/such/text"], "--data /no/such/text does not exist"),
        (["--sequence-length", "100000"], "is too short: "),
        (["--held-out-fraction", "0.0001", "--sequence-length", "2500"], "bytes held out, but"),
        (["--held-out-fraction", "1.5"], "held_out_fraction must be above 0 and below 1, got 1.5"),
        (["--num-heads", "3", "--num-key-value-heads", "2"], "num_heads (3) must be a multiple"),
        (["--head-dim", "7"], "head_dim must be even for rotary positions, got 7"),
        (["--batch-size", "0"], "batch_size must be at least 1, got 0"),
        (["--warmup-fraction", "1"], "warmup_fraction must be at least 0 and below 1, got 1.0"),
        (["--learning-rate", "nan"], "learning_rate must be at least 0, got nan"),
        (["--steps", "many"], "invalid literal for int() with base 10: 'many'"),
        (["--attn-implementation", "fast"], "invalid choice 'fast'"),
        (["--momentum", "0.9"], "--momentum"),
        (["--preset", "tpu"], "invalid choice 'tpu'"),
        (["--name", "../elsewhere"], "--name must be a plain folder name, got '../elsewhere'"),
        (["--memory-implementations", "fast"], "invalid choice 'fast'"),
        (["--memory-lengths", "0"], "memory_lengths must be positive"),
        (["--step-lengths", "0"], "error: step_lengths must be positive, got (0,)"),
        (["--model", ""], "error: model must name a folder, got an empty name"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_no_folder(
    arguments: list[str],
    message: str,
    corpus: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    runs = tmp_path / "deep" / "runs"
    assert message in _refused(capfd, *_options(corpus, runs), *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="flash runs on a GPU")
def test_an_implementation_that_cannot_is_refused_with_its_reason(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = _options(corpus, tmp_path / "runs")
    error = _refused(capfd, *options, "--attn-implementation", "flash")
    assert "flash: needs an NVIDIA GPU" in error
    assert f"T {LENGTH}" in error
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_refused(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    error = _refused(capfd, *_options(corpus, tmp_path / "file" / "runs"))
    assert "cannot write the run to" in error
    assert "Not a directory" in error


def test_an_existing_name_is_refused_and_its_run_left_alone(
    whole: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = _files(whole)
    error = _refused(capfd, *_options(corpus, whole.parent), "--name", whole.name)
    assert f"{whole} exists already; continue it with --resume {whole}" in error
    assert _files(whole) == before


def _largest(run: Path) -> Path:
    files = (path for path in (run / "checkpoints" / str(STEPS)).rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def _cut_a_file(run: Path) -> None:
    path = _largest(run)
    path.write_bytes(path.read_bytes()[:-100])


def _flip_a_bit(run: Path) -> None:
    path = _largest(run)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _lose_a_file(run: Path) -> None:
    _largest(run).unlink()


def _lose_the_digests(run: Path) -> None:
    (run / "checkpoints" / str(STEPS) / "digests.json").unlink()


def _edit_config(run: Path) -> None:
    path = run / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 16', '"hidden_size": 24'))


def _add_option(run: Path) -> None:
    path = run / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 0, "momentum": 1'))


def _wrong_type(run: Path) -> None:
    path = run / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": "zero"'))


def _cut_config(run: Path) -> None:
    (run / "config.json").write_text('{"config": {')


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (_cut_a_file, [], f"{STEPS} is corrupt (state/"),
        (_flip_a_bit, [], "delete that folder to resume from an earlier one"),
        (_lose_a_file, [], "changed or missing"),
        (_lose_the_digests, [], f"{STEPS} is corrupt (digests.json"),
        (_edit_config, [], "belongs to another configuration: hidden_size (was 16, now 24)"),
        (_add_option, [], "is not a configuration of this trainer: "),
        (_wrong_type, [], "is not a configuration of this trainer: "),
        (_cut_config, [], "config.json is corrupt"),
        (lambda run: shutil.rmtree(run / "checkpoints"), [], "holds no checkpoint"),
        (lambda run: shutil.rmtree(run), [], "is not a run: cannot read"),
        (lambda run: None, ["--learning-rate", "0.5"], "learning_rate (was 0.01, now 0.5)"),
        (lambda run: None, ["--name", "new"], "--name is for new runs"),
        (lambda run: None, ["--preset", "gpu"], "--preset is for new runs"),
    ],
)
def test_a_run_that_cannot_be_resumed_is_left_as_it_is(
    damage: Any,
    options: list[str],
    message: str,
    copy: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage(copy)
    before = _files(copy.parent)
    assert message in _refused(capfd, "--resume", str(copy), *options)
    assert _files(copy.parent) == before


def test_a_run_whose_corpus_changed_is_not_resumed(
    whole: Path, corpus: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = corpus / "file1.py"
    text = path.read_bytes()
    path.write_bytes(text + b"\n")
    try:
        error = _refused(capfd, "--resume", str(whole))
    finally:
        path.write_bytes(text)
    assert "was trained on other text than --data holds now" in error


def test_a_loss_that_is_not_finite_stops_the_run(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    options = [*_options(corpus, tmp_path), "--name", "hot", "--learning-rate", "1e30"]
    assert train.main(options) == 2
    error = capfd.readouterr().err
    assert "the loss at step" in error
    assert error.count("\n") == 1
    assert all(np.isfinite(row["loss"]) for row in rows(tmp_path / "hot")[1:])


def test_help_has_a_sentence_for_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(["--help"])
    assert stopped.value.code == 0
    words = [word for word in capsys.readouterr().out.split() if word.strip("─│-|+")]
    options = [i for i, word in enumerate(words) if word.startswith("--") and word != "--help"]
    starts = [i for i in options if not words[i].startswith("--no-")]
    assert len(starts) > 35
    for start, end in zip(starts, [*starts[1:], len(words)], strict=True):
        text = " ".join(words[start:end])
        assert "." in text, text
        assert "(default:" in text, text
