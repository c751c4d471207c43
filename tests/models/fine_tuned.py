"""A model of bytes in Hugging Face's format, small enough that it is trained on in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.models.folders import LLAMA, SHAPES, write

BEGIN, END = 256, 257
FIELDS: dict[str, Any] = LLAMA | {
    "vocab_size": 264, "eos_token_id": [END], "bos_token_id": BEGIN, "torch_dtype": "float32",
}  # fmt: skip


def byte_tokenizer(*, end: bool = False) -> str:
    """tokenizer.json whose tokens are bytes; its post-processor puts `BEGIN` before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    vocabulary = {letter: byte for byte, letter in enumerate(_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    template = "<s> $A </s>" if end else "<s> $A"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", BEGIN), ("</s>", END)]
    )
    tokenizer.enable_truncation(16)
    return str(tokenizer.to_str())


def _letters() -> list[str]:
    """GPT-2's: a printable byte stands for itself, the others for what follows Latin-1."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def write_model(folder: Path, *, end: bool = False, **fields: Any) -> Path:
    """config.json, weights and tokenizer.json."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in SHAPES.items():
        size = tuple({LLAMA["vocab_size"]: FIELDS["vocab_size"]}.get(axis, axis) for axis in shape)
        around = 1.0 if len(shape) == 1 else 0.0
        tensors[name] = (around + 0.1 * rng.standard_normal(size)).astype(np.float32)
    write(folder, FIELDS | fields, tensors)
    (folder / "tokenizer.json").write_text(byte_tokenizer(end=end), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))
    return folder
