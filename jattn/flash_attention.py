"""`jattn.flash_attention`, which is also the name of a function: both can be imported."""

from jattn.attention import flash_attention
from jattn.backends.flash import interpreted

__all__ = ["flash_attention", "interpreted"]
