"""What tyro says of bad arguments, in one line."""

import itertools

__all__ = ["message_of"]


def message_of(box: str) -> str:
    """The message in tyro's frame: what stands between its title and the next rule."""
    lines = [line.strip("│| ") for line in box.splitlines()[1:]]
    is_text = itertools.groupby(lines, key=lambda line: bool(line.strip("─╰╯-+")))
    return next((" ".join(group) for text, group in is_text if text), "bad arguments")
