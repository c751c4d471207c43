"""Folders that are written: the bits, the fields, the index, and nothing that is half there."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import models
from models.decoder import Decoder, decoder_config
from tests.models.folders import BFLOAT16, LLAMA, SHAPES, Tensors, drawn, read, write


def bits(tensors: Tensors) -> dict[str, bytes]:
    return {name: tensor.tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("stored", [BFLOAT16, np.float32, np.float16])
@pytest.mark.parametrize("limit", ["5GB", 700, 1])
def test_bits_come_back(tmp_path: Path, stored: Any, limit: int | str) -> None:
    dtype = np.dtype(stored).name
    write(tmp_path / "a", LLAMA | {"torch_dtype": dtype}, drawn(stored))
    models.save_pretrained(
        models.from_pretrained(tmp_path / "a"), tmp_path / "b", max_shard_size=limit
    )
    back = read(tmp_path / "b")
    assert {name: tensor.shape for name, tensor in back.items()} == SHAPES
    assert bits(back) == bits(drawn(stored))

    files = sorted(tmp_path.glob("b/*.safetensors"))
    if limit == "5GB":
        assert [file.name for file in files] == ["model.safetensors"]
        assert not (tmp_path / "b" / "model.safetensors.index.json").exists()
        return
    index = json.loads((tmp_path / "b" / "model.safetensors.index.json").read_text())
    size = np.dtype(stored).itemsize * sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert index["metadata"]["total_size"] == size
    names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert [file.name for file in files] == names
    assert sorted(set(index["weight_map"].values())) == names
    assert index["weight_map"].keys() == SHAPES.keys()
    if limit == 1:
        assert len(files) == len(SHAPES)


def test_each_file_stays_below_the_limit(tmp_path: Path) -> None:
    from safetensors import safe_open

    write(tmp_path / "a", LLAMA, drawn())
    model = models.from_pretrained(tmp_path / "a")
    models.save_pretrained(model, tmp_path / "b", max_shard_size="1.5KiB")
    for file in tmp_path.glob("b/*.safetensors"):
        with safe_open(file, framework="numpy") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = [2 * int(np.prod(opened.get_slice(key).get_shape())) for key in opened.keys()]  # noqa: SIM118
        assert sum(sizes) <= 1536 or len(sizes) == 1


CHECKPOINTS = sorted(folder.name for folder in (Path(__file__).parent / "checkpoints").iterdir())


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_what_transformers_wrote_comes_back(tmp_path: Path, name: str) -> None:
    """Every family, tied or not, biases and norms of heads, one file or several."""
    folder = Path(__file__).parent / "checkpoints" / name
    model = models.from_pretrained(folder)
    models.save_pretrained(model, tmp_path / "b", max_shard_size="20KB")
    assert len(list(tmp_path.glob("b/*.safetensors"))) > 1
    assert bits(read(tmp_path / "b")) == bits(read(folder))
    written = json.loads((folder / "config.json").read_text())
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == written


@pytest.mark.parametrize("limit", ["5", "5TB", "GB", "-1MB", 0, "0GB"])
def test_limits_that_are_none(tmp_path: Path, limit: int | str) -> None:
    write(tmp_path / "a", LLAMA, drawn())
    model = models.from_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="max_shard_size must be bytes"):
        models.save_pretrained(model, tmp_path / "b", max_shard_size=limit)
    assert not (tmp_path / "b").exists()


def test_config_keeps_every_field_but_the_dtype(tmp_path: Path) -> None:
    fields = LLAMA | {"bos_token_id": 1, "eos_token_id": [2, 3], "id2label": {"0": "é"}}
    write(tmp_path / "a", fields, drawn())
    for dtype in ("bfloat16", "float32"):
        model = models.from_pretrained(tmp_path / "a", dtype=dtype)
        models.save_pretrained(model, tmp_path / dtype)
        back = json.loads((tmp_path / dtype / "config.json").read_text())
        assert list(back.items()) == list((fields | {"torch_dtype": dtype}).items())
    newer = {n: v for n, v in fields.items() if n != "torch_dtype"} | {"dtype": "bfloat16"}
    write(tmp_path / "a", newer, drawn())
    model = models.from_pretrained(tmp_path / "a", dtype="bfloat16", param_dtype="float16")
    models.save_pretrained(model, tmp_path / "newer")
    assert json.loads((tmp_path / "newer" / "config.json").read_text()) == newer | {
        "dtype": "float16"
    }
    silent = {n: v for n, v in fields.items() if n != "torch_dtype"}
    write(tmp_path / "a", silent, drawn())
    models.save_pretrained(models.from_pretrained(tmp_path / "a"), tmp_path / "silent")
    assert json.loads((tmp_path / "silent" / "config.json").read_text()) == silent


def test_tied_model_has_no_head(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in drawn().items() if name != "lm_head.weight"}
    write(tmp_path / "a", LLAMA | {"tie_word_embeddings": True}, tensors)
    models.save_pretrained(models.from_pretrained(tmp_path / "a"), tmp_path / "b")
    assert bits(read(tmp_path / "b")) == bits(tensors)


def test_weights_as_they_are_now(tmp_path: Path) -> None:
    write(tmp_path / "a", LLAMA, drawn())
    model = models.from_pretrained(tmp_path / "a")
    weight = model.layers[1].mlp.down_proj.weight
    weight[...] = weight[...] * jnp.bfloat16(2)
    models.save_pretrained(model, tmp_path / "b")
    name = "model.layers.1.mlp.down_proj.weight"
    expected = drawn() | {name: drawn()[name] * BFLOAT16.type(2)}
    assert bits(read(tmp_path / "b")) == bits(expected)


def test_weights_are_fetched_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.folder.save._CHUNK", 100)
    write(tmp_path / "a", LLAMA, drawn())
    models.save_pretrained(models.from_pretrained(tmp_path / "a"), tmp_path / "b")
    assert bits(read(tmp_path / "b")) == bits(drawn())


def test_tokenizer_goes_along(tmp_path: Path) -> None:
    write(tmp_path / "a", LLAMA, drawn())
    model = models.from_pretrained(tmp_path / "a")
    with pytest.raises(models.FolderError, match="holds no tokenizer to copy"):
        models.save_pretrained(model, tmp_path / "b", tokenizer=tmp_path / "a")
    own = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    for name in (*own, "README.md"):
        (tmp_path / "a" / name).write_text(f"of {name}")
    models.save_pretrained(model, tmp_path / "b", tokenizer=tmp_path / "a")
    assert sorted(os.listdir(tmp_path / "b")) == sorted([*own, "config.json", "model.safetensors"])
    assert all((tmp_path / "b" / name).read_text() == f"of {name}" for name in own)


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    write(tmp_path / "a", LLAMA, drawn())
    model = models.from_pretrained(tmp_path / "a", dtype="float32")
    with pytest.raises(models.FolderError, match=r"holds config\.json, .*; .*overwrite=True"):
        models.save_pretrained(model, tmp_path / "a")
    assert bits(read(tmp_path / "a")) == bits(drawn())
    (tmp_path / "empty").mkdir()
    models.save_pretrained(model, tmp_path / "empty")

    write(tmp_path / "shards", LLAMA, drawn(), files=4)
    models.save_pretrained(model, tmp_path / "shards", overwrite=True)
    assert sorted(os.listdir(tmp_path / "shards")) == ["config.json", "model.safetensors"]
    expected = {name: tensor.astype(np.float32) for name, tensor in drawn().items()}
    assert bits(read(tmp_path / "shards")) == bits(expected)

    (tmp_path / "a" / "notes.txt").write_text("")
    with pytest.raises(models.FolderError, match=r"is not replaced: it holds notes\.txt"):
        models.save_pretrained(model, tmp_path / "a", overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer.json").write_text("")
    with pytest.raises(models.FolderError, match=r"is not replaced: it has no config\.json"):
        models.save_pretrained(model, tmp_path / "other", overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(models.FolderError, match="file is a file"):
        models.save_pretrained(model, tmp_path / "file", overwrite=True)


@pytest.mark.parametrize("moment", ["write", "settle", "rename"])
def test_failure_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    write(tmp_path / "a", LLAMA, drawn())
    model = models.from_pretrained(tmp_path / "a", dtype="float32")
    parent = tmp_path / "kept"
    write(parent / "old", LLAMA, drawn(seed=5), files=2)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    def no_second(self: Path, target: Path, *, rename: Any = Path.rename) -> Any:
        return full() if self.suffix == ".partial" else rename(self, target)

    if moment == "write":
        monkeypatch.setattr("models.folder.save._parts", full)
    elif moment == "settle":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "rename", no_second)
    for name in ("new", "old"):
        with pytest.raises(OSError, match="No space left"):
            models.save_pretrained(model, parent / name, overwrite=True)
    assert os.listdir(parent) == ["old"]
    assert bits(read(parent / "old")) == bits(drawn(seed=5))


def test_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    write(tmp_path / "a", LLAMA, drawn())
    model = models.from_pretrained(tmp_path / "a")
    (tmp_path / "deep" / "down").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "down")
    for _ in range(2):
        models.save_pretrained(model, tmp_path / "link", overwrite=True)
        assert (tmp_path / "link").is_symlink()
        assert bits(read(tmp_path / "deep" / "down")) == bits(drawn())
    assert os.listdir(tmp_path / "deep") == ["down"]


def test_others_may_read_it(tmp_path: Path) -> None:
    write(tmp_path / "a", LLAMA, drawn())
    before = os.umask(0o022)
    try:
        models.save_pretrained(models.from_pretrained(tmp_path / "a"), tmp_path / "b")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o755


def test_model_without_a_config(tmp_path: Path) -> None:
    import dataclasses

    config = dataclasses.replace(decoder_config(LLAMA), source="{}")
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"was not read from a config\.json"):
        models.save_pretrained(model, tmp_path / "b")
