"""Failures that are told to the user in a line instead of a traceback."""

from jattn import UnsupportedAttentionError
from models import FolderError


class TrainingError(Exception):
    """Something the user can put right: a path, a value, a checkpoint; exit status 2."""


class AgreedError(TrainingError):
    """One that all of JAX's processes have, so that the first alone tells it."""


REFUSALS = (TrainingError, FolderError, UnsupportedAttentionError, OSError)
"""All that are told so."""


def one_line(error: BaseException) -> str:
    """The error's text with every run of whitespace as one space."""
    return " ".join(str(error).split())
