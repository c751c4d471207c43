"""The one kind of failure that is told to the user in a line instead of a traceback."""


class TrainingError(Exception):
    """Something the user can put right: a path, a value, a checkpoint; exit status 2."""


def one_line(error: BaseException) -> str:
    """The error's text with every run of whitespace as one space."""
    return " ".join(str(error).split())
