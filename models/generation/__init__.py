"""Text that goes on: tokens chosen one at a time, over a cache of keys and values."""

from models.generation.generate import Generated, generate, stream
from models.generation.text import TextStream

__all__ = ["Generated", "TextStream", "generate", "stream"]
