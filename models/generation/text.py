"""Tokens of one row to text, as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["TextStream"]

_BROKEN = "\ufffd"  # what a decoder gives for bytes that are no character (yet)
_BEFORE = 8  # tokens of the prompt that say how the first new one is written
_MOST_HELD = 16  # tokens without a whole character: they are not going to make one


class TextStream:
    """Writes new tokens out as soon as they are whole characters, spaces as the full text has them.

    A token alone is not text: a character may take several, and whether a space stands before it
    depends on what came before. So a few tokens are decoded twice, with and without the new ones,
    and the difference is what they say.

    Args:
        decode: ids to text, as `Tokenizer.decode`.
        prompt: the tokens that the new ones follow.

    Example:
        >>> words = {1: "one", 2: "two"}
        >>> stream = TextStream(lambda ids: " ".join(words[i] for i in ids), prompt=[1])
        >>> stream.push(2)
        ' two'
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids = list(prompt)[-_BEFORE:]
        if _BROKEN in decode(self._ids):  # begins or ends within a character
            self._ids = list(prompt)
        self._written = len(self._ids)

    def push(self, token: int) -> str:
        """What can be written with one token more; often "", if it does not end a character."""
        self._ids.append(token)
        held = len(self._ids) - self._written
        return self._take(hold=held <= _MOST_HELD)

    def end(self) -> str:
        """What was held back, where no token follows."""
        return self._take(hold=False)

    def _take(self, *, hold: bool) -> str:
        before = self._decode(self._ids[: self._written])
        now = self._decode(self._ids)
        if len(now) <= len(before) or (hold and now.endswith(_BROKEN)):
            return ""
        # What is written now says how the next is written.
        self._ids = self._ids[self._written :]
        self._written = len(self._ids)
        return now[len(before) :]
