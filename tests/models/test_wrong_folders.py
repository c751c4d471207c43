"""Folders that cannot be read: one line, which names the file and the tensor."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import models
from models.folder.tensors import read_header
from tests.models.folders import LLAMA, drawn, write

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SECOND = "model-00002-of-00002.safetensors"


def cut(path: Path, count: int) -> None:
    os.truncate(path, path.stat().st_size - count)


def with_header(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def of_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def entry(**changes: Any) -> dict[str, Any]:
    return {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


NORM = "model.norm.weight"
DATA = b"x" * 8
BROKEN = f"{SINGLE} has a broken header"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"

# What is done to a folder with a single file, and what the error then says.
SINGLE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no_config": (lambda f: (f / "config.json").unlink(), r"config\.json is missing; .* model"),
    "config_not_json": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama",\n}'),
        r"config\.json is not JSON: .* line 2, column 1",
    ),
    "config_cut_off": (
        lambda f: cut(f / "config.json", 20),
        r"config\.json is not JSON: .* in line",
    ),
    "config_empty": (lambda f: (f / "config.json").write_text(""), r"config\.json is not JSON"),
    "config_a_list": (lambda f: (f / "config.json").write_text("[1]"), "a JSON object, is list"),
    "config_latin": (
        lambda f: (f / "config.json").write_bytes(b'{"a": "\xe9"}'),
        r"config\.json is not JSON: byte 7 is not UTF-8",
    ),
    "config_twice": (
        lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'),
        r"config\.json .* 'a' stands there twice",
    ),
    "config_deep": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        r"config\.json is not JSON of a model",
    ),
    "config_pointer": (lambda f: (f / "config.json").write_text(POINTER), "pointer of Git LFS"),
    "unknown_architecture": (
        lambda f: write(f, LLAMA | {"model_type": "mamba"}, drawn()),
        r"config\.json: model_type 'mamba'",
    ),
    "unknown_rope": (
        lambda f: write(f, LLAMA | {"rope_scaling": {"rope_type": "spiral"}}, drawn()),
        r"config\.json: .*spiral",
    ),
    "quantised": (
        lambda f: write(f, LLAMA | {"quantization_config": {"bits": 4}}, drawn()),
        r"config\.json: .*quantization_config",
    ),
    "no_weights": (lambda f: (f / SINGLE).unlink(), f"holds no weights: neither {SINGLE} nor"),
    "other_format": (
        lambda f: (f / SINGLE).rename(f / "pytorch_model.bin"),
        r"weights in pytorch_model\.bin; only model\.safetensors",
    ),
    "adapter_alone": (
        lambda f: (f / SINGLE).rename(f / "adapter_model.safetensors"),
        r"weights in adapter_model\.safetensors; only",
    ),
    "shards_without_index": (
        lambda f: (f / SINGLE).rename(f / SECOND),
        rf"{INDEX} is missing, which says what {SECOND}",
    ),
    "dangling_link": (
        lambda f: (f / SINGLE).unlink() or (f / SINGLE).symlink_to(f / "gone"),
        rf"{SINGLE} cannot be read: No such file",
    ),
    "weights_a_folder": (
        lambda f: (f / SINGLE).unlink() or (f / SINGLE).mkdir(),
        rf"{SINGLE} cannot be read: Is a directory",
    ),
    "weights_pointer": (lambda f: (f / SINGLE).write_text(POINTER), rf"{SINGLE} is a pointer"),
    "weights_empty": (lambda f: (f / SINGLE).write_bytes(b""), rf"{SINGLE} is cut off: it has 0"),
    "one_byte_less": (
        lambda f: cut(f / SINGLE, 1),
        rf"{SINGLE} is cut off: its tensors take 10,400 bytes, it has 10,399",
    ),
    "half": (lambda f: cut(f / SINGLE, 5000), rf"{SINGLE} is cut off: its tensors take"),
    "header_cut": (
        lambda f: os.truncate(f / SINGLE, 100),
        rf"{SINGLE} is cut off .* it has 100 bytes, its header",
    ),
    "a_zip": (lambda f: (f / SINGLE).write_bytes(b"PK\3\4" * 40), f"{SINGLE} is cut off or no"),
    "a_byte_more": (
        lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes() + b"x"),
        rf"{SINGLE} has bytes that no tensor owns",
    ),
    "header_broken": (lambda f: with_header(f / SINGLE, b'{"x": '), BROKEN),
    "header_a_list": (lambda f: with_header(f / SINGLE, [1]), BROKEN),
    "header_of_text": (
        lambda f: with_header(f / SINGLE, {"x": "y"}),
        BROKEN,
    ),
    "no_shape": (
        lambda f: with_header(f / SINGLE, {"x": {"dtype": "F32", "data_offsets": [0, 8]}}, DATA),
        BROKEN,
    ),
    "shape_too_large": (
        lambda f: with_header(f / SINGLE, entry(shape=[2**40, 2**40]), b"8" * 8),
        BROKEN,
    ),
    "shape_negative": (
        lambda f: with_header(f / SINGLE, entry(shape=[-2]), b"8" * 8),
        BROKEN,
    ),
    "offsets_backwards": (
        lambda f: with_header(f / SINGLE, entry(data_offsets=[8, 0])),
        BROKEN,
    ),
    "overlapping": (
        lambda f: with_header(
            f / SINGLE, entry() | {"y": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
            b"8" * 12,
        ),
        BROKEN,
    ),
    "unknown_dtype": (
        lambda f: with_header(f / SINGLE, entry(dtype="F31"), b"8" * 8),
        BROKEN,
    ),
    "missing_weight": (
        lambda f: write(f, LLAMA, {n: t for n, t in drawn().items() if n != NORM}),
        rf"not those of its config\.json; missing: {NORM}$",
    ),
    "unexpected_weight": (
        lambda f: write(f, LLAMA, drawn() | {"model.extra.bias": np.ones(3, np.float32)}),
        r"unexpected: model\.extra\.bias$",
    ),
    "bias_that_config_denies": (
        lambda f: write(
            f, LLAMA, drawn() | {"model.layers.1.self_attn.q_proj.bias": np.ones(16, np.float32)}
        ),
        r"unexpected: model\.layers\.1\.self_attn\.q_proj\.bias$",
    ),
    "misshapen_weight": (
        lambda f: write(f, LLAMA, drawn() | {NORM: np.ones(17, np.float32)}),
        rf"of another shape: {NORM} is \(17,\), not \(16,\)$",
    ),
    "all_at_once": (
        lambda f: write(
            f,
            LLAMA,
            {n: t for n, t in drawn().items() if "layers.1." not in n}
            | {NORM: np.ones((16, 1), np.float32), "odd": np.ones(1, np.float32)},
        ),
        r"missing: .* and 5 more; unexpected: odd; of another shape: model\.norm",
    ),
    "integers": (
        lambda f: write(f, LLAMA, drawn() | {NORM: np.ones(16, np.int8)}),
        rf"{NORM} is stored as I8; weights may be F64, F32, F16, BF16",
    ),
    "integers_of_an_ignored_name": (
        lambda f: write(f, LLAMA, drawn() | {"model.inv_freq": np.ones(16, np.int8)}),
        r"unexpected: model\.inv_freq$",
    ),
}  # fmt: skip

INDEX_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "not_json": (lambda f: (f / INDEX).write_text("{"), rf"{INDEX} is not JSON"),
    "no_map": (lambda f: (f / INDEX).write_text("{}"), rf"{INDEX} has no weight_map"),
    "map_a_list": (lambda f: (f / INDEX).write_text('{"weight_map": []}'), "has no weight_map"),
    "file_a_number": (
        lambda f: of_index(f, lambda m: m.update({NORM: 3})),
        rf"{INDEX} places {NORM} in 3, no safetensors file",
    ),
    "file_outside": (
        lambda f: of_index(f, lambda m: m.update({NORM: "../model.safetensors"})),
        rf"places {NORM} in '\.\./model\.safetensors', no safetensors file of its folder",
    ),
    "file_of_torch": (
        lambda f: of_index(f, lambda m: m.update({NORM: "pytorch_model.bin"})),
        rf"places {NORM} in 'pytorch_model\.bin', no safetensors file",
    ),
    "file_missing": (lambda f: (f / SECOND).unlink(), rf"{INDEX} names {SECOND}, which is missing"),
    "file_cut_off": (lambda f: cut(f / SECOND, 2), rf"{SECOND} is cut off: its tensors take"),
    "file_not_downloaded": (lambda f: (f / SECOND).write_text(POINTER), rf"{SECOND} is a pointer"),
    "entry_missing": (
        lambda f: of_index(f, lambda m: m.pop(NORM)),
        rf"{INDEX} has no entry for {NORM} of model-0000",
    ),
    "entry_too_many": (
        lambda f: of_index(f, lambda m: m.update({"model.ghost": SECOND})),
        rf"{INDEX} places model\.ghost in {SECOND}, which does not hold it",
    ),
    "entry_of_the_other_file": (
        lambda f: of_index(f, lambda m: m.update({NORM: "model-00001-of-00002.safetensors"})
                           if m[NORM] == SECOND else m.update({NORM: SECOND})),
        rf"places {NORM} in model-0000\d-of-00002\.safetensors, which does not hold it",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    parent = tmp_path_factory.mktemp("sound")
    return {files: write(parent / str(files), LLAMA, drawn(), files=files) for files in (1, 2)}


def refusal(folder: Path) -> str:
    with pytest.raises(models.FolderError) as raised:
        models.from_pretrained(folder)
    text = str(raised.value)
    assert "\n" not in text
    assert len(text) < 600
    assert str(folder) in text
    assert isinstance(raised.value, ValueError)
    return text


@pytest.mark.parametrize("name", SINGLE_FAULTS)
def test_folder_with_one_file(tmp_path: Path, sound: dict[int, Path], name: str) -> None:
    spoil, expected = SINGLE_FAULTS[name]
    shutil.copytree(sound[1], tmp_path / "model")
    spoil(tmp_path / "model")
    text = refusal(tmp_path / "model")
    assert re.search(expected, text), text


@pytest.mark.parametrize("name", INDEX_FAULTS)
def test_folder_with_an_index(tmp_path: Path, sound: dict[int, Path], name: str) -> None:
    spoil, expected = INDEX_FAULTS[name]
    shutil.copytree(sound[2], tmp_path / "model")
    spoil(tmp_path / "model")
    text = refusal(tmp_path / "model")
    assert re.search(expected, text), text


def test_file_that_shrinks_while_it_is_read(sound: dict[int, Path], tmp_path: Path) -> None:
    shutil.copytree(sound[1], tmp_path / "model")
    tensors = read_header(tmp_path / "model" / SINGLE)
    last = list(tensors.values())[-1]
    cut(tmp_path / "model" / SINGLE, 4)
    with pytest.raises(models.FolderError, match=f"ends inside {re.escape(last.name)}"):
        last.read(tuple(slice(None) for _ in last.shape), np.dtype(np.float32))


def test_names_that_are_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("meta-llama/Llama-3.2-1B", "gpt2"):
        with pytest.raises(models.FolderError, match=f"'{name}' is no folder here; .*download"):
            models.from_pretrained(name)
    for name in ("./gone", str(tmp_path / "gone"), "a/b/c"):
        with pytest.raises(models.FolderError, match="does not exist"):
            models.from_pretrained(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(models.FolderError, match="file is a file; name the folder"):
        models.from_pretrained("file")


def test_options_that_are_none(sound: dict[int, Path]) -> None:
    with pytest.raises(ValueError, match=r"attn_implementation must be one of .*; got 'paged'"):
        models.from_pretrained(sound[1], attn_implementation="paged")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype must be one of .*int8"):
        models.from_pretrained(sound[1], dtype="int8")
