"""Exact attention for JAX with memory linear in sequence length."""

from jattn.attention import (
    dot_product_attention,
    eager_attention,
    memory_efficient_attention,
)
from jattn.backends.table import attention_backend
from jattn.call.context import context_parallel
from jattn.call.determinism import deterministic_gradients
from jattn.call.errors import UnsupportedAttentionError
from jattn.explain import explain
from jattn.flash_attention import flash_attention
from jattn.transforms.rematerialisation import CHECKPOINT_NAMES
from jattn.zigzag import unzigzag, zigzag

__all__ = [
    "CHECKPOINT_NAMES",
    "UnsupportedAttentionError",
    "attention_backend",
    "context_parallel",
    "deterministic_gradients",
    "dot_product_attention",
    "eager_attention",
    "explain",
    "flash_attention",
    "memory_efficient_attention",
    "unzigzag",
    "zigzag",
]
