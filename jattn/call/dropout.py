"""The dropout mask: a fixed function of (key, batch row, head, query, key position).

A counter-based hash: a row of the logits has two words, derived from the random key, the batch row,
the head and the query; the key position is mixed into them with two multiplications. Nothing is
stored: forward, backward and every backend, whatever its blocks, compute the same bits. The mixer
is the "lowbias32" integer hash of C. Wellons, "Prospecting for Hash Functions" (2018), whose two
multipliers were found by search.

The 32 bits are for two keys, 16 for each, so a rate is a multiple of 2^-16. The two are 8 apart:

    key          0 1 2 3 4 5 6 7   8 9 10 11 12 13 14 15   16 17 ..
    hash of      0 1 2 3 4 5 6 7   0 1  2  3  4  5  6  7   16 17 ..
    half           the lower             the upper         the lower

A thread of a GPU's matrix instructions holds both, whether keys lie across or down the tile, and
so makes their hash once (PTX ISA, "wgmma": accumulator fragments).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

__all__ = [
    "KEYS_A_HASH",
    "element_bits",
    "keep",
    "limit",
    "pairs",
    "row_words",
    "seeds",
    "seeds_from_head",
]

KEYS_A_HASH = 16  # positions after which the pairs of keys begin again
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
    return seeds + _word(head) * jnp.array([[_GOLDEN, _SECOND]], jnp.uint32)


def keep(seed: tuple[Array, Array], head: Array, query: Array, key: Array, rate: float) -> Array:
    """True where the element stays. Everything broadcasts; indices are integers.

    seed: the two words of the batch row, from `seeds`; head, query, key: absolute positions.
    """
    bits = element_bits(row_words(seed, head, query), *pairs(key))
    kept: Array = bits >= jnp.uint32(limit(rate))
    return kept


def limit(rate: float) -> int:
    """An element is dropped when its bits, as a number, are below this."""
    return min(round(rate * 2**16), 2**16 - 1) << 16


def row_words(seed: tuple[Array, Array], head: Array, query: Array) -> tuple[Array, Array]:
    """What `keep_of_words` needs of a row of the logits."""
    head, query = _word(head), _word(query)
    first = _mix(_mix(seed[0] + head * jnp.uint32(_GOLDEN)) ^ query * jnp.uint32(_SECOND))
    second = _mix(_mix(seed[1] + head * jnp.uint32(_SECOND)) + query * jnp.uint32(_GOLDEN))
    return first, second


def pairs(key: Array) -> tuple[Array, Array]:
    """Of each key the one whose hash it has, itself or 8 before, and whether it is the latter."""
    return key & jnp.full_like(key, ~8), (key & 8) != 0


def element_bits(row: tuple[Array, Array], pair: Array, is_second: Array) -> Array:
    """Uint32 of which the upper 16 bits count, from a row's words and `pairs` of its keys."""
    x = (row[0] ^ _word(pair) * jnp.uint32(_GOLDEN)) * jnp.uint32(0x7FEB352D) + row[1]
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return jnp.where(is_second, x, x << 16)


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _word(index: Array) -> Array:
    return index.astype(jnp.uint32)
