"""generate.py: the text that the tokens say, as they come, and errors in a line."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import generate as command
from models import from_pretrained
from models.generation import generate
from tests.models import folders

TEXT = "zé 🙂"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model over bytes; all 256, so that what it says is rarely UTF-8."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("model") / "tiny"
    fields = folders.LLAMA | {"vocab_size": 256, "torch_dtype": "float32", "eos_token_id": 3}
    tensors = folders.drawn(np.float32)
    rng = np.random.default_rng(1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = rng.standard_normal((256, 16)).astype(np.float32)
    folders.write(path, fields, tensors)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def run(*arguments: Any) -> int:
    return command.main([str(x) for x in arguments])


def test_the_command_prints_what_the_tokens_say(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from models import load_tokenizer

    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(TEXT).ids
    options: dict[str, Any] = dict(max_new_tokens=24, temperature=0.9, seed=2, stop=())
    new = np.asarray(generate(from_pretrained(folder), [ids], **options))[0]
    arguments = ("--max-new-tokens", 24, "--temperature", 0.9, "--seed", 2, "--stop")
    assert run(folder, TEXT, *arguments) == 0
    printed = capsys.readouterr()
    assert printed.out == tokenizer.decode(new.tolist()) + "\n"
    assert printed.err == ""
    standard_input = io.TextIOWrapper(io.BytesIO(TEXT.encode()))
    monkeypatch.setattr("sys.stdin", standard_input)
    assert run(folder, "-", *arguments, "--echo") == 0
    assert capsys.readouterr().out == TEXT + printed.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{folder}"], "TEXT"),
        (["{folder}", "x", "--top-p", "2"], "top_p must be above 0 and at most 1, got 2.0"),
        (["{folder}", "x", "--temperature", "-1"], "temperature must be 0"),
        (["{folder}", "x", "--max-new-tokens", "many"], "--max-new-tokens"),
        (["{folder}", "x", "--stop", "999"], "stop has 999"),
        (["{folder}", ""], "the text has no token"),
        (["{folder}", "\udcff"], "the text is not UTF-8"),
        (["{folder}/absent", "x"], "absent"),
        (["{folder}", "x", "--no-such-option", "1"], "--no-such-option"),
    ],
    ids=str,
)
def test_errors_are_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert run(*[argument.format(folder=folder) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("generate.py: error: ")
    assert words in line


def test_ctrl_c_ends_the_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "texts_of", interrupted)
    assert run(folder, "x") == 130
    assert capsys.readouterr() == ("\n", "")


def test_warnings_are_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        monkeypatch.setattr(command, "texts_of", lambda *_: [])
        assert run(folder, "x", "--max-new-tokens", 4000) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("generate.py: warning: prompt and max_new_tokens come to 4001 tokens")
