"""Names that other libraries give their implementations, and the nearest of jattn's."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

__all__ = ["nearest"]

_FLASH = "'flash' is the nearest"
_BEST = "None takes the best that can"
_FORMULA = "'eager' is the formula, quadratic"
_LINEAR = "'memory_efficient' is the nearest"
_NEAREST = {
    _FLASH: (
        "flash_attention", "flash_attention_2", "flash_attention_3", "flash_attn", "flashattention",
        "fa", "fa2", "fa3", "flash2", "flash3", "mha", "splash", "tpu_flash",
    ),
    "'flash' has the Pallas kernels, for Hopper and portable": (
        "triton", "mosaic", "mosaic_gpu", "pallas", "pallas_triton", "pallas_mosaic_gpu", "hopper",
        "portable", "kernel",
    ),
    "'memory_efficient' runs in XLA, in linear memory; 'eager' is jax.nn's quadratic formula": (
        "xla", "jax", "jnp",
    ),
    _LINEAR: (
        "xla_chunked", "chunked", "efficient_attention", "efficient", "mem_efficient", "xformers",
        "cutlass", "rabe", "blockwise",
    ),
    _FORMULA: (
        "math", "naive", "reference", "vanilla", "standard", "dot_product", "dot_product_attention",
    ),
    "'cudnn' is cuDNN's": ("cudnn_attention", "cudnn_flash", "cudnn_flash_te", "fused", "te"),
    _BEST: ("sdpa", "auto", "autoselected", "default", "best", "fastest", "none", "any", ""),
}  # fmt: skip
_ADVICE = {name: advice for advice, names in _NEAREST.items() for name in names}


def nearest(name: object, names: Sequence[str]) -> str | None:
    """What to write instead of a name that is none of these; None if nothing comes near."""
    if not isinstance(name, str):
        return None
    plain = name.strip().casefold().replace("-", "_").replace(" ", "_")
    if plain in names:
        return f"did you mean {plain!r}?"
    if plain in _ADVICE:
        return _ADVICE[plain]
    near = get_close_matches(plain, [*names, *_ADVICE], n=1, cutoff=0.7)
    if not near:
        return None
    return f"did you mean {near[0]!r}?" if near[0] in names else _ADVICE[near[0]]
