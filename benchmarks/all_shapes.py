"""The preset `all`: memory, squares, and shapes that users have; the parts by their worth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from benchmarks.cells import Cell, Mask, Pass
from benchmarks.plans import Plan, Preset

__all__ = ["PEERS", "all_shapes", "cell_of"]

# The rivals that a JAX user can install, then PyTorch's.
PEERS = (
    "jattn/flash",
    "jax.nn/cudnn",
    "flash-attn3-jax",
    "tokamax/mosaic",
    "torch/flash",
    "torch/cudnn",
)
BIAS_PEERS = ("jattn/flash", "jax.nn/cudnn", "tokamax/triton", "torch/efficient", "torch/cudnn")
MEMORY_PEERS = ("jattn/flash", "jattn/memory_efficient", "jax.nn/cudnn", "jax.nn/xla")
BOTH: tuple[Pass, ...] = ("forward", "gradient")


def all_shapes() -> Preset:
    """Every figure's cells on one GPU, bf16; `--part` runs a share, `--resume` what is missing."""
    plans = (*_memory(), *_squares(), *_users())
    peers = dict.fromkeys(peer for plan in plans for peer in plan.peers)
    return Preset(plans, tuple(peers))


def cell_of(
    head_dim: int,
    heads: str,
    mask: str,
    batch: int,
    length: int,
    *,
    keys: int | None = None,
    value_dim: int | None = None,
    bias: bool = False,
) -> Cell:
    """A cell in bfloat16; heads: "16", or "32/8" for 32 query heads and 8 key heads."""
    n, _, k = heads.partition("/")
    return Cell(
        batch=batch,
        queries=length,
        keys=keys or length,
        heads=int(n),
        kv_heads=int(k or n),
        head_dim=head_dim,
        mask=Mask.parse(mask),
        value_dim=value_dim,
        bias=bias,
    )


def _squares() -> Iterator[Plan]:
    """16,384 tokens, heads * head dim = 2048, as papers on attention show them."""
    for length, head_dim, mask in product((4096, 16384, 1024), (128, 64, 256), ("causal", "full")):
        cell = cell_of(head_dim, str(2048 // head_dim), mask, 16384 // length, length)
        yield Plan(cell, BOTH, PEERS, part="square")


def _users() -> Iterator[Plan]:
    """Shapes of models: the comment names where each is met."""
    for cell in (
        cell_of(128, "32/8", "causal", 2, 8192),  # Llama 3, Mistral: grouped queries
        cell_of(64, "12", "full", 128, 197),  # ViT-B/16 at 224 pixels
        cell_of(72, "16", "full", 32, 729),  # SigLIP So400m
        cell_of(128, "32/8", "window:4095", 1, 16384),  # Mistral's sliding window
        cell_of(128, "16", "packed:8", 1, 16384),  # documents packed into one row
        cell_of(192, "16", "causal", 4, 4096, value_dim=128),  # DeepSeek's latent attention
        cell_of(128, "16", "causal", 1, 12345),  # a length that no tile divides
        cell_of(64, "10", "full", 8, 4096, keys=77),  # Stable Diffusion's text
        cell_of(80, "16", "full", 16, 1000),  # ViT-H
        cell_of(96, "32", "causal", 2, 4096),  # Phi-3
        cell_of(64, "16", "full", 32, 577),  # ViT-L/16 at 384 pixels
        cell_of(128, "32/1", "causal", 2, 4096),  # one key head for all
        cell_of(256, "8/4", "causal", 2, 8192),  # Gemma
        cell_of(128, "16", "causal", 2, 5000),
        cell_of(128, "16", "causal", 16, 1000),
        cell_of(128, "16", "window:1023", 1, 16384),
        cell_of(64, "32/8", "causal", 2, 8192),  # Llama 3.2 1B
        cell_of(128, "32/8", "packed:16", 1, 16384),
    ):
        yield Plan(cell, BOTH, PEERS, part="users")
    for cell in (
        cell_of(32, "4", "full", 128, 512, bias=True),  # AlphaFold's pair bias
        cell_of(64, "16", "full", 4, 2048, bias=True),  # T5's and Swin's, whole
    ):
        yield Plan(cell, BOTH, BIAS_PEERS, part="users")
    for batch, heads, keys in ((16, "32/8", 32768), (1, "32/8", 32768), (64, "32/1", 8192)):
        cell = cell_of(128, heads, "full", batch, 1, keys=keys)  # one token against a cache
        yield Plan(cell, ("forward",), PEERS, part="users")


def _memory() -> Iterator[Plan]:
    """Compiled alone, batch 1, up to 1,048,576 tokens."""
    base = cell_of(128, "8", "causal", 1, 1024)
    for power in range(10, 21, 2):
        cell = replace(base, queries=2**power, keys=2**power)
        quadratic_ends = 2**power > 65536  # a head of it is 128 GiB at 2**18
        peers = MEMORY_PEERS[:-1] if quadratic_ends else MEMORY_PEERS
        yield Plan(cell, ("gradient",), peers, timed=False, part="memory")
