"""Rotary positions: the frequencies of each kind that config.json names, and the tables they make.

A pair of a head's elements turns by position * frequency. A kind says what a model trained for
short sequences does to the frequencies of long ones:

    default   theta^(-2 i / H)                                       (Su et al. 2021, section 3.2)
    linear    the same / factor
    llama3    long wavelengths / factor, short as they are, a ramp between    (Llama 3.1's release)
    yarn      likewise, the ramp over i; and cos and sin times a factor      (Peng et al. 2023, 3)
    dynamic   theta grows with the sequence, once that is longer than the model was trained for

H head dim, i = 0 ... H / 2 - 1. Arithmetic is float32, in the order in which Hugging Face's is: at
position 100,000 a last bit of a frequency is a hundredth of a turn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.positions import RotaryTable, table_of

__all__ = ["KINDS", "Dynamic", "Rope", "rotary_table"]

Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Dynamic:
    """What makes frequencies depend on the length of the sequence."""

    factor: float
    length: int
    """The longest sequence that the frequencies are for as they are."""


@dataclass(frozen=True)
class Rope:
    """One layer's rotary positions."""

    frequencies: tuple[float, ...]
    """Radians per position of each pair of elements, H / 2 float32 values."""

    attention_factor: float = 1.0
    """What multiplies cos and sin."""

    dynamic: Dynamic | None = None


def rotary_table(positions: jax.Array, rope: Rope) -> RotaryTable:
    """The cosines and sines that queries and keys at these positions turn by.

    With dynamic frequencies each row has those of its own length, its largest position + 1.

    Args:
        positions: int32 (B or 1, T).
        rope: the frequencies.
    """
    frequencies = jnp.asarray(rope.frequencies, jnp.float32)[None, None]
    if rope.dynamic is not None:
        frequencies /= _growth(rope.dynamic, positions, len(rope.frequencies))
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cosine, sine = (f(angles) * rope.attention_factor for f in (jnp.cos, jnp.sin))
    return table_of(cosine, sine)


def _growth(dynamic: Dynamic, positions: jax.Array, pairs: int) -> jax.Array:
    """What divides the frequencies (B or 1, 1, H / 2) of rows as long as their positions say.

    A base that is g^(H / (H - 2)) times as large divides frequency i by g^(2 i / (H - 2)): by 1
    exactly, where the sequence is not longer than what the model was trained for.
    """
    length = jnp.maximum(positions.max(axis=-1) + 1, dynamic.length).astype(jnp.float32)
    growth = 1 + dynamic.factor * (length - dynamic.length) / dynamic.length
    return growth[:, None, None] ** (jnp.arange(pairs, dtype=jnp.float32) / (pairs - 1))[None, None]


def _wavelengths(theta: float, head_dim: int) -> Floats:
    """theta^(2 i / H): positions per radian of each pair, float32."""
    exponents = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    # The power of float32 numbers, rounded once, as a good float32 library has it.
    return np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)


type Fields = Mapping[str, Any]


def _default(fields: Fields, head_dim: int) -> Rope:
    return _rope(1 / _wavelengths(fields["rope_theta"], head_dim))


def _linear(fields: Fields, head_dim: int) -> Rope:
    plain = 1 / _wavelengths(fields["rope_theta"], head_dim)
    return _rope(plain / np.float32(fields["factor"]))


def _dynamic(fields: Fields, head_dim: int) -> Rope:
    if head_dim <= 2:
        raise ValueError(f"rope type dynamic needs a head_dim above 2, got {head_dim}")
    grows = Dynamic(fields["factor"], fields["max_position_embeddings"])
    return _rope(1 / _wavelengths(fields["rope_theta"], head_dim), dynamic=grows)


def _llama3(fields: Fields, head_dim: int) -> Rope:
    factor, length = fields["factor"], fields["original_max_position_embeddings"]
    low, high = fields["low_freq_factor"], fields["high_freq_factor"]
    if high <= low:
        raise ValueError(f"high_freq_factor ({high}) must be greater than low_freq_factor ({low})")
    plain = 1 / _wavelengths(fields["rope_theta"], head_dim)
    turn = np.float32(2 * math.pi) / plain  # positions in a whole turn
    share = (np.float32(length) / turn - np.float32(low)) / np.float32(high - low)
    ramp = (1 - share) * plain / np.float32(factor) + share * plain
    slow, fast = turn > length / low, turn < length / high
    return _rope(np.where(slow, plain / np.float32(factor), np.where(fast, plain, ramp)))


def _yarn(fields: Fields, head_dim: int) -> Rope:
    theta, length = fields["rope_theta"], fields["original_max_position_embeddings"]
    factor = fields["factor"]
    if factor is None:
        factor = fields["max_position_embeddings"] / length
    wavelengths = _wavelengths(theta, head_dim)

    def pair_that_turns(times: float) -> float:
        """The (fractional) i of the pair that turns so often within the trained length."""
        return head_dim * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))

    first = pair_that_turns(fields["beta_fast"] or 32)
    last = pair_that_turns(fields["beta_slow"] or 1)
    if fields["truncate"]:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    pairs = np.arange(head_dim // 2, dtype=np.float32)
    stretched = np.clip((pairs - np.float32(first)) / np.float32(last - first), 0, 1)
    kept = 1 - stretched
    frequencies = 1 / (np.float32(factor) * wavelengths) * (1 - kept) + 1 / wavelengths * kept
    return _rope(frequencies, attention_factor=_yarn_attention_factor(fields, factor))


def _yarn_attention_factor(fields: Fields, factor: float) -> float:
    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1

    if fields["attention_factor"] is not None:
        return float(fields["attention_factor"])
    if fields["mscale"] and fields["mscale_all_dim"]:
        return of(fields["mscale"]) / of(fields["mscale_all_dim"])
    return of(1)


def _rope(
    frequencies: np.ndarray[Any, Any],
    *,
    attention_factor: float = 1.0,
    dynamic: Dynamic | None = None,
) -> Rope:
    assert frequencies.dtype == np.float32
    return Rope(tuple(frequencies.tolist()), attention_factor, dynamic)


@dataclass(frozen=True)
class Kind:
    """A kind of rotary positions: what it reads, and the frequencies it makes of that."""

    make: Callable[[Fields, int], Rope]
    required: tuple[str, ...] = ()
    optional: Mapping[str, Any] = field(default_factory=dict)
    """Fields that may be absent, and what they are then."""

    nullable: tuple[str, ...] = ()
    """Required fields that may be null."""


KINDS = {
    "default": Kind(_default),
    "linear": Kind(_linear, ("factor",)),
    "dynamic": Kind(_dynamic, ("factor",)),
    "llama3": Kind(_llama3, ("factor", "low_freq_factor", "high_freq_factor")),
    "yarn": Kind(
        _yarn,
        ("factor",),
        {
            "attention_factor": None,
            "beta_fast": None,
            "beta_slow": None,
            "mscale": None,
            "mscale_all_dim": None,
            "truncate": True,
        },
        nullable=("factor",),
    ),
}
"""By `rope_type`. All read `rope_theta`, `max_position_embeddings` and
`original_max_position_embeddings` besides."""
