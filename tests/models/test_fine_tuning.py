"""train.py --model: text in the folder's tokens, the losses, resuming, and what is saved."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
import train
from models.decoder import decoder_config
from tests.models.fine_tuned import BEGIN, END, FIELDS, write_model
from tests.models.folders import read, write
from tests.promotion import of_others
from tests.tiny_training import results, rows, write_corpus
from training import cli, step
from training.config import FINE_TUNING, DataConfig, FineTuneConfig, TrainConfig
from training.data import NO_TARGET, Batch, load_corpus, training_batch
from training.errors import TrainingError
from training.throughput import step_flops
from training.tokens import TokenCorpus, tokenized

pytestmark = pytest.mark.xdist_group("fine_tuning")
LENGTH = 48


@pytest.fixture(scope="module", autouse=True)
def optax_promotes() -> Iterator[None]:
    """The optimiser is of another library."""
    with of_others():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


def arguments(folder: Path, text: Path, *more: str) -> list[str]:
    return [
        *("--preset", "cpu", "--model", str(folder), "--data", str(text)),
        *("--steps", "8", "--sequence-length", str(LENGTH), "--batch-size", "2"),
        *("--learning-rate", "0.003", "--evaluate-every", "4", "--evaluation-windows", "4"),
        *("--checkpoint-every", "4", *more),
    ]


@pytest.fixture(scope="module")
def whole(folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    assert train.main(arguments(folder, text, "--runs-dir", str(runs), "--name", "a")) == 0
    return runs / "a"


def corpus_of(folder: Path, text: Path, **data: Any) -> tuple[TokenCorpus, TrainConfig]:
    config = TrainConfig(
        fine_tune=FineTuneConfig(str(folder)),
        data=DataConfig(data=str(text), sequence_length=LENGTH, pack_documents=True, **data),
    )
    return tokenized(load_corpus(config.data), config), config


def test_a_run_learns_and_saves_what_loads_again(whole: Path, folder: Path) -> None:
    held_out = [r["held_out_bits_per_byte"] for r in rows(whole) if "held_out_bits_per_byte" in r]
    assert len(held_out) == 3
    assert held_out[-1] < held_out[0] - 0.3
    saved = whole / "model"
    assert (saved / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert (saved / "generation_config.json").exists()
    assert json.loads((saved / "config.json").read_text()) == FIELDS
    before, after = read(folder), read(saved)
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    assert not any(np.array_equal(before[name], after[name]) for name in before)
    model = models.from_pretrained(saved)
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(model.layers[1].mlp.up_proj.weight[...], after[name])
    stored = json.loads((whole / "config.json").read_text())
    assert stored["fine_tuned"] == FIELDS
    assert stored["weights"] == sum(tensor.size for tensor in before.values())


def test_resuming_goes_on_bit_for_bit(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "8")
    shutil.rmtree(tmp_path / "b" / "model")
    assert train.main(["--resume", str(tmp_path / "b")]) == 0
    assert results(tmp_path / "b") == results(whole)
    first, second = read(whole / "model"), read(tmp_path / "b" / "model")
    assert {n: t.tobytes() for n, t in first.items()} == {n: t.tobytes() for n, t in second.items()}
    assert train.main(["--resume", str(tmp_path / "b")]) == 0  # nothing left but to save


def test_resuming_needs_the_folder_as_it_was(
    whole: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    shutil.move(folder, tmp_path / "model")
    try:
        write_model(folder, end=True, rms_norm_eps=1e-3)
        step.fine_tuning._read.cache_clear()
        assert train.main(["--resume", str(whole)]) == 2
        assert "was trained on other text" in capsys.readouterr().err
        shutil.rmtree(folder)
        step.fine_tuning._read.cache_clear()
        assert train.main(["--resume", str(whole)]) == 2
        assert f"{folder} does not exist" in capsys.readouterr().err
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.move(tmp_path / "model", folder)
        step.fine_tuning._read.cache_clear()
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_first_loss_is_that_of_the_folders_logits(whole: Path, folder: Path, text: Path) -> None:
    """Each document by itself, from position 0; what follows a document is not learnt."""
    config = cli.read_config(whole)
    corpus = tokenized(load_corpus(config.data), config)
    batch = training_batch(corpus.train, config.data, seed=0, step=1)
    model, losses = models.from_pretrained(folder), []
    assert batch.segment_ids is not None
    for inputs, targets, ids in zip(batch.inputs, batch.targets, batch.segment_ids, strict=True):
        for document in np.unique(ids):
            own, after = inputs[ids == document], targets[ids == document]
            logits = np.asarray(model(jnp.asarray(own)[None]), np.float64)[0]
            shifted = logits - logits.max(axis=1, keepdims=True)
            log = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
            losses += [-log[i, t] for i, t in enumerate(after) if t != NO_TARGET]
    measured = rows(whole)[1]
    assert measured["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    density = len(corpus.train.data) / len(corpus.text.train.data)
    assert measured["bits_per_byte"] == pytest.approx(np.mean(losses) / np.log(2) * density)


def test_files_are_documents_with_a_beginning_and_an_end(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(6):
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number} é " * 40, encoding="utf-8")
    (tmp_path / "text" / "latin.txt").write_bytes(b"caf\xe9 " * 30)
    corpus, config = corpus_of(folder, tmp_path / "text", held_out_fraction=0.3)
    assert corpus.not_text == 1
    data, starts = corpus.train.data, corpus.train.starts
    assert data.dtype == np.int32
    assert len(starts) + len(corpus.held_out.starts) == 6
    ends = [*starts[1:], len(data)]
    for start, end in zip(starts, ends, strict=True):
        document = data[start:end]
        assert (document[0], document[-1]) == (BEGIN, END)
        content = bytes(document[1:-1].astype(np.uint8)).decode("utf-8")
        assert content == content[:4] * 40  # longer than the file says texts are cut to
    size = sum(len(f"{n} é ".encode()) * 40 for n in range(6))
    assert len(corpus.text.train.data) + len(corpus.text.held_out.data) == size
    assert corpus.units_per_byte[0] == len(data) / len(corpus.text.train.data)

    batch = training_batch(corpus.train, config.data, seed=3, step=1)
    assert batch.segment_ids is not None
    one = dataclasses.replace(config.data, pack_documents=False)
    plain = training_batch(corpus.train, one, seed=3, step=1)
    assert plain.segment_ids is None
    np.testing.assert_array_equal(plain.inputs, batch.inputs)
    last = plain.inputs == END
    np.testing.assert_array_equal(batch.targets == NO_TARGET, last)
    np.testing.assert_array_equal(batch.targets[~last], plain.targets[~last])


def test_end_is_not_put_twice(tmp_path: Path, text: Path) -> None:
    folder = write_model(tmp_path / "model", end=True)
    corpus, _ = corpus_of(folder, text)
    assert np.count_nonzero(corpus.train.data == END) == len(corpus.train.starts)


def test_single_file_is_cut_between_letters(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("€" * 401, encoding="utf-8")
    corpus, _ = corpus_of(folder, tmp_path / "one.txt", held_out_fraction=0.25)
    assert corpus.not_text == 0
    for part in (corpus.train, corpus.held_out):
        assert set(bytes(part.data[1:-1].astype(np.uint8)).decode("utf-8")) == {"€"}


def test_text_that_is_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.bin").write_bytes(b"\xff\xfe\x00" * 3000)
    with pytest.raises(TrainingError, match=r"one\.bin holds no text in UTF-8"):
        corpus_of(folder, tmp_path / "one.bin")


def test_tokenizer_with_more_tokens_than_the_model(tmp_path: Path, text: Path) -> None:
    folder = write_model(tmp_path / "model", vocab_size=200)
    with pytest.raises(TrainingError, match="has a token 257, its model 200 tokens"):
        corpus_of(folder, text)


def test_flops_of_a_decoder_with_windows() -> None:
    config = decoder_config(
        {
            "model_type": "gemma2", "vocab_size": 50, "hidden_size": 12, "intermediate_size": 20,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 6, "sliding_window": 3,
        }
    )  # fmt: skip
    ids = [[0, 0, 0, 0, 0, 1], [2, 2, 2, 3, 3, 3]]
    batch = Batch(np.zeros((2, 6), np.int32), np.zeros((2, 6), np.int32), np.asarray(ids, np.int32))

    def pairs(window: int) -> int:
        each = ((row, q, k) for row in ids for q in range(6) for k in range(6))
        return sum(row[q] == row[k] and 0 <= q - k < window for row, q, k in each)

    assert [layer.window for layer in config.layers] == [3, None, 3]
    weights = 3 * (12 * 24 + 2 * 12 * 12 + 24 * 12 + 3 * 12 * 20) + 50 * 12
    seen = 2 * pairs(3) + pairs(6)
    assert step_flops(config, batch) == 6 * weights * 12 + 12 * 24 * seen


def test_gains_do_not_decay(folder: Path) -> None:
    """With a gradient of zero a matrix shrinks by the decay, and a gain stays."""
    options = dataclasses.replace(
        FINE_TUNING["cpu"].optimizer, steps=1, warmup_fraction=0.0, weight_decay=0.5,
        learning_rate=0.1, final_learning_rate_ratio=0.9,
    )  # fmt: skip
    config = TrainConfig(fine_tune=FineTuneConfig(str(folder)), optimizer=options)
    state = step.initial_state(config)
    before = jax.device_get(state.params)
    tokens = jnp.zeros((1, 8), jnp.int32)
    state, scalars = step.train_step(
        state, tokens, jnp.full((1, 8), NO_TARGET), None, config=options
    )
    assert scalars.loss == 0
    shrunk = 1 - float(scalars.learning_rate) * options.weight_decay
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(state.params), strict=True)
    for old, new in pairs:
        np.testing.assert_allclose(new, old * (shrunk if old.ndim > 1 else 1.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--hidden-size", "64"], "--hidden-size describes a new model; --model"),
        (["--tie-embeddings"], "--tie-embeddings describes a new model"),
        (["--optimizer", "muon"], "--optimizer muon is for new models"),
        (["--report", "memory"], "reports measure the trainer's own model"),
        (["--memory-report"], "reports measure the trainer's own model"),
        (["--model", "org/name"], "'org/name' is no folder here"),
        (["--model", ""], "must name a folder"),
        (["--sequence-length", "20000"], "is too short: "),
    ],
)
def test_what_does_not_apply_is_refused(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    options: list[str], expected: str,
) -> None:  # fmt: skip
    runs = ["--runs-dir", str(tmp_path / "runs")]
    assert train.main([*arguments(folder, text), *runs, *options]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_folder_without_a_tokenizer(
    folder: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").unlink()
    assert train.main(arguments(tmp_path / "model", text, "--runs-dir", str(tmp_path / "r"))) == 2
    assert "tokenizer.json is missing" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_head_unlike_the_embedding_it_is_tied_to(folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "model", FIELDS | {"tie_word_embeddings": True}, read(folder))
    config = TrainConfig(fine_tune=FineTuneConfig(str(tmp_path / "model")))
    with (
        pytest.warns(UserWarning, match="not tied"),
        pytest.raises(TrainingError, match="unlike the embedding it is tied to"),
    ):
        step.initial_state(config)
