"""The folder's tokenizer: its post-processor, neither padding nor cutting, and what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import models

WORDS = ["<unk>", "<s>", "</s>", "▁the", "▁cat", "▁sat", "▁", "t", "h", "e", "c", "a", "s"]
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        "strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0,
        "pad_type_id": 0, "pad_token": "<unk>",
    },
    "added_tokens": [
        {"id": i, "content": WORDS[i], "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i in range(3)
    ],
    "normalizer": None,
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always",
                      "split": True},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    },
    "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(WORDS)},
              "unk_token": "<unk>"},
}  # fmt: skip


def test_ids_with_and_without_the_post_processor(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    tokenizer = models.load_tokenizer(tmp_path)
    assert tokenizer.encode("the cat sat on").ids == [1, 3, 4, 5, 0]
    assert tokenizer.encode("the cat", add_special_tokens=False).ids == [3, 4]
    assert tokenizer.decode([1, 3, 4]) == "the cat"


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        (None, "", r"tokenizer\.json is missing: the folder holds no tokenizer"),
        (
            "tokenizer.model",
            "\x0a",
            r"json is missing, and tokenizer\.model is not read",
        ),
        ("tokenizer.json", "{", r"tokenizer\.json is no tokenizer"),
        ("tokenizer.json", '{"a": 1}', r"tokenizer\.json is no tokenizer"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"),
    ],
)
def test_folders_without_one(tmp_path: Path, file: str | None, content: str, expected: str) -> None:
    if file is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(models.FolderError, match=expected) as raised:
        models.load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


def test_names_that_are_no_folder() -> None:
    with pytest.raises(models.FolderError, match="'meta-llama/Llama-3' is no folder here"):
        models.load_tokenizer("meta-llama/Llama-3")
