"""One token of each row from its logits: the likeliest, or one by chance.

p = softmax(logits / temperature), of the top_k likeliest; then the smallest set of the likeliest
whose mass reaches top_p (nucleus sampling, Holtzman et al. 2020, section 3.1). Among equals, the
lower id comes first.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.generation.arguments import Sampling

__all__ = ["Chance", "Draw", "choose", "draw_of"]


_TINY = float(np.finfo(np.float32).tiny)


class Chance(NamedTuple):
    """What of sampling a compiled step is made for."""

    is_greedy: bool
    top_k: int | None
    has_top_p: bool


class Draw(NamedTuple):
    """What of sampling is given to it: keys (B,), and two numbers in float32."""

    keys: Array
    temperature: Array
    top_p: Array


def draw_of(sampling: Sampling, batch: int) -> tuple[Chance, Draw]:
    """Both parts, for `batch` rows."""
    chance = Chance(
        sampling.is_greedy,
        None if sampling.is_greedy else sampling.top_k,
        not sampling.is_greedy and sampling.top_p is not None,
    )
    if len(sampling.seeds) == batch:  # a row of a batch as if it were alone
        keys = [jax.random.fold_in(jax.random.key(seed), 0) for seed in sampling.seeds]
    else:
        base = jax.random.key(sampling.seeds[0])
        keys = [jax.random.fold_in(base, row) for row in range(batch)]
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    return chance, Draw(jnp.stack(keys), jnp.float32(sampling.temperature), jnp.float32(top_p))


def choose(logits: Array, chance: Chance, draw: Draw, count: Array) -> Array:
    """Each row's next token.

    Args:
        logits: float32 (B, V).
        chance: how; static.
        draw: the rows' keys and the numbers.
        count: int32 (), how many tokens came before; a row's draw depends on it and its key alone.

    Returns:
        int32 (B,).
    """
    if chance.is_greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(draw.keys, count)
    # From the largest down, so that no temperature overflows: what is not it is then -inf.
    logits = logits - logits.max(axis=-1, keepdims=True)
    logits = logits / jnp.maximum(draw.temperature, _TINY)
    if chance.top_k is None and not chance.has_top_p:
        return _drawn(keys, logits)
    logits, tokens = jax.lax.top_k(logits, chance.top_k or logits.shape[-1])
    if chance.has_top_p:
        mass = jnp.cumsum(jax.nn.softmax(logits, axis=-1), axis=-1)
        before = jnp.pad(mass[:, :-1], ((0, 0), (1, 0)))
        logits = jnp.where(before < draw.top_p, logits, -jnp.inf)
    place = _drawn(keys, logits)
    return jnp.take_along_axis(tokens, place[:, None], axis=1)[:, 0].astype(jnp.int32)


def _drawn(keys: Array, logits: Array) -> Array:
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
