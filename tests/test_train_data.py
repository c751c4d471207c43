"""The corpus: which files, which part of them, and in what order."""

from __future__ import annotations

import dataclasses
import lzma
import zlib
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_training import write_corpus
from training.config import DataConfig
from training.data import (
    Corpus,
    Text,
    evaluation_batches,
    load_corpus,
    training_batch,
)
from training.errors import TrainingError

CONFIG = DataConfig(held_out_fraction=0.2, sequence_length=64, batch_size=4)


def _load(path: Path, **changes: float) -> Corpus:
    return load_corpus(dataclasses.replace(CONFIG, data=str(path), **changes))


def test_every_file_is_wholly_in_one_part(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "text")
    corpus = _load(folder)
    assert not set(corpus.train_files) & set(corpus.held_out_files)
    assert set(corpus.train_files) | set(corpus.held_out_files) == {
        path.name for path in folder.iterdir()
    }
    for names, text in (
        (corpus.train_files, corpus.train),
        (corpus.held_out_files, corpus.held_out),
    ):
        assert text.data.tobytes() == b"".join((folder / name).read_bytes() for name in names)


def test_the_split_follows_from_names_and_sizes_alone(tmp_path: Path) -> None:
    first, second = write_corpus(tmp_path / "one"), tmp_path / "two"
    second.mkdir()
    for path in sorted(first.iterdir(), reverse=True):
        (second / path.name).write_bytes(path.read_bytes())
    one, two = _load(first), _load(second)
    assert one.held_out_files == two.held_out_files
    assert one.fingerprint == two.fingerprint
    assert 0.05 < len(one.held_out.data) / (len(one.train.data) + len(one.held_out.data)) <= 0.2


def test_a_changed_byte_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "text")
    before = _load(folder).fingerprint
    path = folder / "file3.py"
    path.write_bytes(b"#" + path.read_bytes()[1:])
    assert _load(folder).fingerprint != before


def test_of_a_single_file_the_end_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "book"
    path.write_bytes(bytes(range(250)) * 4)
    corpus = _load(path)
    assert corpus.train.data.tobytes() == path.read_bytes()[:800]
    assert corpus.held_out.data.tobytes() == path.read_bytes()[800:]


def test_a_folder_of_large_files_still_holds_one_out(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "text", files=2)
    corpus = _load(folder, held_out_fraction=0.01)
    assert len(corpus.held_out_files) == len(corpus.train_files) == 1


def test_hidden_files_are_left_out_and_unreadable_ones_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_corpus(tmp_path / "text")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("secret")
    (folder / ".env").write_text("secret")
    read = Path.read_bytes

    def refuse_one(path: Path) -> bytes:
        if path.name == "file5.py":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse_one)
    corpus = _load(folder)
    assert {*corpus.train_files, *corpus.held_out_files} == {
        f"file{number}.py" for number in range(12) if number != 5
    }
    assert corpus.unreadable == 1
    assert "1 unreadable left out" in str(corpus)


def test_the_default_corpus_is_the_library_without_packages_and_tests() -> None:
    corpus = load_corpus(DataConfig())
    names = {*corpus.train_files, *corpus.held_out_files}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert all(name.endswith(".py") for name in names)
    assert not any("site-packages" in name or name.startswith("test/") for name in names)
    assert len(corpus.train.data) > 10 * len(corpus.held_out.data) > 1_000_000


def test_a_batch_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    corpus = _load(write_corpus(tmp_path / "text"))

    def inputs(seed: int, step: int) -> bytes:
        return training_batch(corpus.train, CONFIG, seed=seed, step=step).inputs.tobytes()

    assert inputs(1, 7) == inputs(1, 7)
    assert len({inputs(1, 7), inputs(1, 8), inputs(2, 7)}) == 3


def test_targets_are_the_bytes_that_follow(tmp_path: Path) -> None:
    corpus = _load(write_corpus(tmp_path / "text"))
    batches = [
        training_batch(corpus.train, CONFIG, seed=0, step=1),
        *evaluation_batches(corpus.held_out, CONFIG, 6),
    ]
    assert len(batches) == 3  # six windows in whole batches of four
    for batch in batches:
        assert batch.inputs.shape == batch.targets.shape == (4, 64)
        np.testing.assert_array_equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    text = corpus.held_out.data.tobytes()
    assert batches[1].inputs[0].tobytes() == text[:64]
    assert batches[2].targets[-1].tobytes() == text[-64:]


def test_every_start_is_drawn_the_first_and_the_last_too() -> None:
    text = Text.join([bytes(range(67))])
    drawn = {
        int(start)
        for step in range(40)
        for start in training_batch(text, CONFIG, seed=0, step=step).inputs[:, 0]
    }
    assert drawn == {0, 1, 2}


def test_segment_ids_tell_the_files_of_a_window_apart() -> None:
    text = Text.join([b"a" * 40, b"b" * 3, b"c" * 60])
    config = dataclasses.replace(CONFIG, pack_documents=True, batch_size=1)
    (batch,) = evaluation_batches(text, config, 1)
    assert batch.segment_ids is not None
    np.testing.assert_array_equal(batch.segment_ids, [[1] * 40 + [2] * 3 + [3] * 21])


def test_compressors_are_those_of_the_standard_library_on_all_held_out_bytes(
    tmp_path: Path,
) -> None:
    corpus = _load(write_corpus(tmp_path / "text"))
    text = corpus.held_out.data.tobytes()
    assert corpus.held_out_compressed == {
        "zlib -9": 8 * len(zlib.compress(text, level=9)) / len(text),
        "xz -9e": 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text),
    }
    assert 0 < corpus.held_out_compressed["xz -9e"] < 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "no readable, non-empty file"),
        (b"x" * 64, "is too short: 51 bytes to learn from"),
        (b"x" * 200, "is too short: 40 bytes held out, but one sequence .* take 65"),
    ],
)
def test_too_little_text_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TrainingError, match=message):
        _load(path)
