"""Tokens to text as they come: whole characters alone, and every space."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from models.generation import TextStream

TEXT = "naïve 你好 — 🙂🙂 fin, e\u0301 ."


def of_bytes(ids: Sequence[int]) -> str:
    """A byte-level tokenizer's: a token is a byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def of_words(ids: Sequence[int]) -> str:
    """A tokenizer's that marks words by the space before them, and strips that of the text's."""
    return "".join(" ab" if i == 0 else " c" if i == 1 else "d" for i in ids).removeprefix(" ")


def of_fallback(ids: Sequence[int]) -> str:
    """Llama 2's: a run of byte tokens that is not UTF-8 as a whole is one mark for each."""
    try:
        return bytes(ids).decode("utf-8")
    except UnicodeDecodeError:
        return "\ufffd" * len(ids)


@pytest.mark.parametrize("decode", [of_bytes, of_fallback])
@pytest.mark.parametrize("prompt", ["", "é", "🙂 and so on 🙂"])
def test_no_character_is_broken_and_none_is_lost(decode: object, prompt: str) -> None:
    stream = TextStream(decode, list(prompt.encode()))  # type: ignore[arg-type]
    parts = [stream.push(token) for token in TEXT.encode()]
    assert "".join([*parts, stream.end()]) == TEXT
    assert not any("\ufffd" in part for part in parts)
    assert parts[0] == "n"


def test_spaces_are_those_of_the_whole_text() -> None:
    prompt, new = [0, 2], [1, 0, 0, 2, 1]
    stream = TextStream(of_words, prompt)
    found = "".join(map(stream.push, new))
    assert of_words(prompt) + found == of_words(prompt + new) == "abd c ab abd c"
    assert "".join(map(TextStream(of_words).push, new)) == of_words(new)


def test_an_unfinished_character_is_shown_at_the_end() -> None:
    stream = TextStream(of_bytes)
    assert [stream.push(token) for token in "a🙂".encode()[:-1]] == ["a", "", "", ""]
    assert stream.end() == "\ufffd"
    assert stream.end() == ""


def test_what_is_no_text_is_not_held_for_ever() -> None:
    stream = TextStream(of_bytes)
    parts = [stream.push(0xFF) for _ in range(60)]
    assert any(parts)
    assert "".join([*parts, stream.end()]) == "\ufffd" * 60
