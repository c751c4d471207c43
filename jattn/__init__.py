"""Exact attention for JAX with memory linear in sequence length."""

from jattn.attention import (
    dot_product_attention,
    eager_attention,
    flash_attention,
    memory_efficient_attention,
)
from jattn.backends import attention_backend
from jattn.determinism import deterministic_gradients
from jattn.errors import UnsupportedAttentionError
from jattn.explain import explain

__all__ = [
    "UnsupportedAttentionError",
    "attention_backend",
    "deterministic_gradients",
    "dot_product_attention",
    "eager_attention",
    "explain",
    "flash_attention",
    "memory_efficient_attention",
]
