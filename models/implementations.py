"""Attention by the names that Hugging Face gives its implementations, and what each is in jattn."""

from typing import Literal

AttnImplementation = Literal["eager", "sdpa", "flash", "memory_efficient", "flash_attention_2"]

# -> jattn's `implementation=`; None lets jattn pick.
JATTN_NAMES: dict[str, str | None] = {
    "eager": "eager",
    "sdpa": None,
    "flash": "flash",
    "memory_efficient": "memory_efficient",
    "flash_attention_2": "flash",
}
