"""What the Hopper kernels' calls pad."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

import jattn
from jattn.backends.flash import interpreted
from tests.cases import Case
from tests.shapes import arguments

__all__ = ["pads"]


def pads(case: Case, *, gradient: bool) -> list[str]:
    """Operands in bfloat16 that are padded in what is traced of a call; no vectors of float32."""
    floats, rest, static = arguments(case)

    def total(floats: Any, rest: Any) -> Any:
        with interpreted():
            out = jattn.flash_attention(**floats, **rest, **static)
        return out.astype(jnp.float32).sum()

    text = str(jax.make_jaxpr(jax.grad(total) if gradient else total)(floats, rest))
    return re.findall(r"bf16\[[\d,]*\] = pad\[", text)
