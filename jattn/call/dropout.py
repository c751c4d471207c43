"""The dropout mask: a fixed function of (key, batch row, head, query, key position).

A row of the logits has two words (a, c), a odd, derived from the random key, the batch row, the
head and the query; a key position has a word b. The element's bits are one multiplication,

    bits = a b + c  mod 2^32

of which the upper 16 count, so that a rate is a multiple of 2^-16: it is dropped if they are, as a
number, below rate 2^16. That is the hash
of Dietzfelbinger, "Universal hashing and k-wise independent random variables via integer
arithmetic without primes" (1996): over the rows' words, a key's bits are uniform, and two keys' all
but independent. Nothing is stored: forward, backward and every backend, whatever its blocks,
compute the same bits. The words are mixed by the "lowbias32" integer hash of C. Wellons,
"Prospecting for Hash Functions" (2018), whose two multipliers were found by search; it is a
bijection, so that no two keys have the same word.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

__all__ = [
    "element_bits",
    "keep",
    "key_words",
    "limit",
    "row_words",
    "seeds",
    "seeds_from_head",
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
    return seeds + _word(head) * jnp.array([[_GOLDEN, _SECOND]], jnp.uint32)


def keep(seed: tuple[Array, Array], head: Array, query: Array, key: Array, rate: float) -> Array:
    """True where the element stays. Everything broadcasts; indices are integers.

    seed: the two words of the batch row, from `seeds`; head, query, key: absolute positions.
    """
    bits = element_bits(row_words(seed, head, query), key_words(key))
    kept: Array = bits >= jnp.uint32(limit(rate))
    return kept


def limit(rate: float) -> int:
    """An element is dropped when its bits, as a number, are below this."""
    return min(round(rate * 2**16), 2**16 - 1) << 16


def row_words(seed: tuple[Array, Array], head: Array, query: Array) -> tuple[Array, Array]:
    """What `element_bits` needs of a row of the logits: an odd word, and another."""
    head, query = _word(head), _word(query)
    first = _mix(_mix(seed[0] + head * jnp.uint32(_GOLDEN)) ^ query * jnp.uint32(_SECOND))
    second = _mix(_mix(seed[1] + head * jnp.uint32(_SECOND)) + query * jnp.uint32(_GOLDEN))
    return first | jnp.full_like(first, 1), second


def key_words(key: Array) -> Array:
    """What `element_bits` needs of a key position."""
    return _mix(_word(key) * jnp.uint32(_GOLDEN) + jnp.uint32(_SECOND))


def element_bits(row: tuple[Array, Array], key_word: Array) -> Array:
    """Uint32 that are below `limit` where the element is dropped."""
    return row[0] * key_word + row[1]


def _mix(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _word(index: Array) -> Array:
    return index.astype(jnp.uint32)
