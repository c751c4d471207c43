"""The dropout mask: a fixed function of (key, batch row, head, query, key position).

Each element's 32 bits come from a counter-based hash: a row of the logits has two words, derived
from the random key, the batch row, the head and the query; the key position is mixed into them
with two multiplications. Nothing is stored: forward, backward and every backend, whatever its
blocks, compute the same bits. The mixer is the "lowbias32" integer hash of C. Wellons,
"Prospecting for Hash Functions" (2018), whose two multipliers were found by search.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

__all__ = [
    "keep",
    "keep_of_words",
    "key_words",
    "row_words",
    "seeds",
    "seeds_from_head",
    "threshold",
]

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: spreads consecutive counters over the range
_SECOND = 0x85EBCA6B  # another odd constant, so that the two words of a row are unrelated


def seeds(rng: Array, batch: int) -> Array:
    """Two words for each batch row: (batch, 2) uint32. `rng` is a typed or raw key."""
    words = jax.random.bits(rng, (2,), jnp.uint32)
    row = jnp.arange(batch, dtype=jnp.uint32)
    first = _mix(words[0] ^ row * jnp.uint32(_GOLDEN))
    second = _mix(words[1] + row * jnp.uint32(_SECOND))
    return jnp.stack([first, second], axis=-1)


def seeds_from_head(seeds: Array, head: Array) -> Array:
    """The seeds (batch, 2) with which head i has the mask of head `head` + i."""
    return seeds + _word(head) * jnp.array([_GOLDEN, _SECOND], jnp.uint32)


def threshold(rate: float) -> int:
    """An element is dropped when its 32 bits, as a number, are below this."""
    return min(round(rate * 2**32), 2**32 - 1)


def keep(seed: tuple[Array, Array], head: Array, query: Array, key: Array, rate: float) -> Array:
    """True where the element stays. Everything broadcasts; indices are integers.

    seed: the two words of the batch row, from `seeds`; head, query, key: absolute positions.
    """
    return keep_of_words(row_words(seed, head, query), key_words(key), rate)


def row_words(seed: tuple[Array, Array], head: Array, query: Array) -> tuple[Array, Array]:
    """What `keep_of_words` needs of a row of the logits."""
    head, query = _word(head), _word(query)
    first = _mix(_mix(seed[0] + head * jnp.uint32(_GOLDEN)) ^ query * jnp.uint32(_SECOND))
    second = _mix(_mix(seed[1] + head * jnp.uint32(_SECOND)) + query * jnp.uint32(_GOLDEN))
    return _shifted(first), second


def key_words(key: Array) -> Array:
    """What `keep_of_words` needs of a key."""
    return _shifted(_word(key) * jnp.uint32(_GOLDEN))


def keep_of_words(row: tuple[Array, Array], key: Array, rate: float) -> Array:
    """`keep`, of words made once for each row and each key: both had the mixer's first shift."""
    x = (row[0] ^ key) * jnp.uint32(0x7FEB352D) + row[1]
    x = x ^ (x >> 15)
    x = x * jnp.uint32(0x846CA68B)
    # The last matters only where the upper half is equal to the limit's, and is then known.
    limit = threshold(rate)
    kept: Array = (x ^ jnp.uint32(limit >> 16)) >= jnp.uint32(limit)
    return kept


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _shifted(x: Array) -> Array:
    return x ^ (x >> 16)


def _word(index: Array) -> Array:
    return index.astype(jnp.uint32)
