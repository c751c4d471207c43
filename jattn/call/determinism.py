"""Whether gradients must be bitwise the same each time they are computed."""

from __future__ import annotations

import os
import re
from collections.abc import Generator
from contextlib import contextmanager

import jax

__all__ = ["deterministic_gradients", "is_deterministic"]

_asked = jax.make_user_context(None)


@contextmanager
def deterministic_gradients(on: bool = True) -> Generator[None]:
    """Makes gradients of the calls inside bitwise repeatable; part of `jax.jit`'s cache key.

    Only `flash`'s Hopper kernels are ever anything else, for head dims up to 128 without a soft
    cap: their thread blocks add to a query's gradient, and of grouped heads to a key's and a
    value's, in whatever order they come. Inside, they take turns at the first, or it has a kernel
    of its own, seven products instead of five; the others are summed in one order. Outside, XLA's
    own flag `--xla_gpu_deterministic_ops` decides.

    Args:
      on: False allows any order, whatever the flag says.

    >>> import jax, jax.numpy as jnp, jattn
    >>> x = jnp.ones((1, 4, 2, 8))
    >>> with jattn.deterministic_gradients():
    ...     gradient = jax.grad(lambda x: jattn.dot_product_attention(x, x, x).sum())(x)
    """
    with _asked(on):
        yield


def is_deterministic() -> bool:
    """What the innermost context asks for, or else XLA's flag."""
    asked: bool | None = _asked.value
    if asked is not None:
        return asked
    flag = re.findall(r"--xla_gpu_deterministic_ops(?:=(\w+))?", os.environ.get("XLA_FLAGS", ""))
    return bool(flag) and flag[-1].lower() in ("", "true", "1")
