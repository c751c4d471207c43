"""What the tests ask of dtypes and ranks, and who need not do it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import jax

__all__ = ["be_strict", "of_others"]


def be_strict() -> None:
    """As JAX's own tests run, and careful users: no dtype and no rank is promoted in silence."""
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")


@contextmanager
def of_others() -> Generator[None]:
    """For code of other libraries, which promotes as JAX does by default."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
