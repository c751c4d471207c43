"""One run in several processes: the losses of one, what each may do alone, and who speaks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

import train
from tests import two_processes
from tests.promotion import of_others
from tests.tiny_training import OPTIONS, rows, write_corpus
from training import processes
from training.config import DataConfig
from training.devices import Devices
from training.errors import AgreedError, TrainingError
from training.interrupt import Signals, StopRequest

PROGRAM = """
import contextlib, io, os, runpy, signal, sys
from tests.promotion import of_others

options = {options!r}
sys.argv = ["train.py", *options, "--name", "2", "--sequence-parallel", "2"]
sys.argv += ["--coordinator-address", ADDRESS, "--num-processes=2", f"--process-id={{NUMBER}}"]
with of_others():
    try:
        runpy.run_path("train.py", run_name="__main__")
    except SystemExit as ended:
        assert ended.code == 0

import train

def main(*options):  # in processes that have joined
    error = io.StringIO()
    with of_others(), contextlib.redirect_stderr(error):
        status = train.main(options)
    return status, error.getvalue()

found = main(*options, "--name", "4", "--sequence-parallel", "4")
assert found == (0, ""), found
found = main("--resume", {folder!r} + "/one", "--sequence-parallel", "2")
assert found == (0, ""), found

for more, said in (
    (["--sequence-parallel", "8"], "1 to the number of devices, 4; got 8"),
    (["--sequence-parallel", "2", "--batch-size", "3"], "--batch-size (3) must be a multiple of 2"),
    (["--sequence-parallel", "4", "--seed", str(NUMBER)], "process 1 has other options than proc"),
    (["--sequence-parallel", "4", "--data", "none" if NUMBER else "train.py"],
     "process 1: --data none does not exist"),
    (["--sequence-parallel", "4", "--name", "4"], "4 exists already; continue it with --resume"),
    (["--report", "memory"], "a report is of one process"),
):
    status, error = main(*options, *more)
    assert status == 2
    assert said in error and error.count("\\n") == 1 if NUMBER == 0 else error == "", error

if NUMBER == 1:
    write = train.MetricsLog.write
    def and_stop(self, row):
        write(self, row)
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    train.MetricsLog.write = and_stop
found = main(*options, "--sequence-parallel", "4", "--name", "stopped")
assert found == (128 + signal.SIGTERM, ""), found
"""


@pytest.mark.thorough
def test_two_processes_train_as_one_and_resume_each_others_runs(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    few = ["--data", str(corpus), "--steps", "6", "--checkpoint-every", "3", "--pack-documents"]
    options = [*OPTIONS, *few, "--runs-dir", str(tmp_path)]

    def go_on_from_step_3(run: Path) -> None:
        shutil.rmtree(run / "checkpoints" / "6")

    with of_others():
        assert train.main([*options, "--name", "one"]) == 0
    alone = rows(tmp_path / "one")
    go_on_from_step_3(tmp_path / "one")
    two_processes.run(PROGRAM.format(options=options, folder=str(tmp_path)))
    found = {name: rows(tmp_path / name) for name in ("one", "2", "4")}
    go_on_from_step_3(tmp_path / "4")
    with of_others():
        assert train.main(["--resume", str(tmp_path / "4")]) == 0
        stopped = [row["step"] for row in rows(tmp_path / "stopped")]
        assert stopped == [0, 1, 2]
        assert train.main(["--resume", str(tmp_path / "stopped")]) == 0
    found |= {"resumed alone": rows(tmp_path / "4"), "stopped": rows(tmp_path / "stopped")}
    for name, steps in found.items():
        assert [row["step"] for row in steps] == list(range(7)), name
        for row, expected in zip(steps, alone, strict=True):
            for key in ("loss", "gradient_norm", "held_out_bits_per_byte"):
                if key in expected:
                    # Sums over 128 bytes in another order, through a few steps.
                    np.testing.assert_allclose(row[key], expected[key], rtol=1e-4, err_msg=name)


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What two further processes say, next time; this one is the first."""
    said = ["", ""]
    monkeypatch.setattr(processes, "are_several", lambda: True)
    monkeypatch.setattr(processes, "gather", lambda own: [own, *said])
    return said


def test_what_one_refuses_all_do_in_its_words(others: list[str]) -> None:
    def refuse() -> None:
        raise TrainingError("too short")

    assert processes.together(lambda: 3) == 3
    with pytest.raises(AgreedError, match=r"^too short$"):
        processes.together(refuse)
    others[1] = "no such file"
    with pytest.raises(AgreedError, match=r"^process 2: no such file$"):
        processes.together(lambda: 3)


def test_all_stop_where_one_does(others: list[str]) -> None:
    stop = StopRequest()
    others[:] = ["0", "0"]
    assert not stop.anywhere()
    assert stop.signal is None
    others[0] = str(int(Signals.SIGTERM))
    assert stop.anywhere()
    assert stop.signal == Signals.SIGTERM


def test_devices_that_cannot_be_shared_out_are_refused(
    others: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jax.devices", lambda: [None] * 12)
    data = DataConfig(batch_size=6, sequence_length=64 * 8 * 3, short_share=0)
    assert Devices.checked(4, data) == Devices(along_sequence=4, along_rows=3)
    with pytest.raises(TrainingError, match=r"\(8\) must divide .* of all processes \(12\)"):
        Devices.checked(8, data)
    with pytest.raises(TrainingError, match=r"\(6\) must be a multiple of 4: .* \(3\)"):
        Devices.checked(3, data)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, "2", None), "--num-processes goes with --coordinator-address HOST:PORT"),
        (("host", "2", "0"), "must be HOST:PORT or auto, got host"),
        (("auto", None, None), r"auto: .* \(JAX finds no scheduler here: name HOST:PORT\)"),
        (("host:1", "two", "0"), "--num-processes must be an integer, got two"),
        (("host:1", "2", "2"), "host:1: .* process_id=2, num_processes=2"),
    ],
)
def test_a_process_that_cannot_join_says_why(
    given: tuple[str | None, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    found = "jax._src.clusters.ClusterEnv.auto_detect_unset_distributed_params"
    monkeypatch.setattr(found, lambda *given: given[:4])  # no scheduler, wherever this runs
    with pytest.raises(TrainingError, match=message):
        processes.join(*given)
