"""What is wrong with a folder, and lists short enough for one line."""

from collections.abc import Collection

__all__ = ["FolderError", "some"]

_SHOWN = 4


class FolderError(ValueError):
    """A model's folder that cannot be read or written; the text names the file and the tensor."""


def some(names: Collection[str]) -> str:
    """The first few names, and how many more there are.

    >>> some(["a", "b", "c", "d", "e", "f"])
    'a, b, c, d and 2 more'
    """
    shown = sorted(names)[:_SHOWN]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")
