"""Where queries stand among the keys, and how many of either there are: integers that never wrap.

    query i stands at key position offset + i        causal: keys up to it        window: around it

An offset known when traced becomes part of the band. Any other is an array beside it, (B,) int32.
Then the numbers that are added to positions, of T queries and S keys, are kept within T + S and so
within int32, without a change to what is seen.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export
from jax.typing import ArrayLike

from jattn.call.band import Band
from jattn.call.spec import Operands

__all__ = [
    "Offset",
    "as_ids",
    "as_integers",
    "band_and_offset",
    "bottom_right",
    "kept_near",
    "lengths",
    "query_offset",
]

type Offset = int | Array

INT32 = np.iinfo(np.int32)
# T + S: what is added up of positions and bounds is a few times that where offsets are arrays.
MOST_KNOWN, MOST = 2**31 - 2**10, 2**29


def as_integers(name: str, x: ArrayLike) -> Array | np.ndarray:
    """The array, an integer one; of jax if it is one already, as jax would cut 64 bits to 32."""
    if not isinstance(x, Array):
        try:
            x = np.asarray(x)
        except jax.errors.TracerArrayConversionError:  # a list of traced numbers
            x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, got {x.dtype}")
    return x


def lengths(
    name: str, given: ArrayLike | None, size: int, batch: int, *, has_batch: bool
) -> Array | None:
    """(B,) int32 from 0 to `size`, or None; negative ones are refused where they are known."""
    if given is None:
        return None
    x = as_integers(name, given)
    if x.shape != (batch,) and (has_batch or x.shape != ()):
        raise ValueError(f"{name} must have shape (B,) = ({batch},), got {x.shape}")
    known = _known(x)
    if known is not None and known.size and known.min() < 0:
        raise ValueError(f"{name} must not be negative, got {known.min()} in {known.tolist()}")
    return _int32(x, 0, INT32.max if export.is_symbolic_dim(size) else size).reshape(batch)


def as_ids(name: str, x: Array | np.ndarray) -> Array:
    """The integers as int32, equal where they were; of 64 bits refused where that is known not."""
    known = _known(x) if x.dtype.itemsize > 4 else None
    if known is not None and known.size:
        far = [int(n) for n in (known.min(), known.max()) if not INT32.min <= n <= INT32.max]
        if far:
            raise ValueError(f"{name} must be integers of 32 bits, got {far[0]}")
    return jnp.asarray(x.astype(np.int32))


def query_offset(given: ArrayLike | None, batch: int) -> Offset | None:
    """An int, as it is or from NumPy, or an array (B,) of integers."""
    if given is None:
        return None
    if isinstance(given, int | np.integer) and not isinstance(given, bool):
        return int(given)
    x = as_integers("query_offset", given)
    if x.ndim == 0 and isinstance(x, np.ndarray):
        return int(x)
    if x.shape not in ((), (batch,)):
        raise ValueError(
            f"query_offset must be an int or have shape () or (B,) = ({batch},), got {x.shape}"
        )
    return jnp.broadcast_to(_int32(x, INT32.min, INT32.max), (batch,))


def bottom_right(given: Offset | None, operands: Operands, queries: int, keys: int) -> Offset:
    """The offset with which the last query of each row stands at its last key; none is `given`."""
    if given is not None:
        raise ValueError(
            "query_offset and causal_alignment='bottom_right' both say where queries stand, give "
            "one of them: 'bottom_right' is the offset S - T, or where lengths are given each "
            f"row's key length - query length; got query_offset {given}"
        )
    last_key = keys if operands.key_lengths is None else operands.key_lengths
    offset = last_key - (queries if operands.query_lengths is None else operands.query_lengths)
    if isinstance(offset, int | Array):
        return offset
    return jnp.full(operands.query.shape[0], offset, jnp.int32)  # sizes that jax.export leaves free


def band_and_offset(
    *,
    is_causal: bool,
    window: tuple[int | None, int | None] | None,
    offset: Offset,
    queries: int,
    keys: int,
    in_parts: bool = False,
) -> tuple[Band, Array | None]:
    """The band of T `queries` and S `keys`, and the queries' offset if it is not part of it.

    in_parts: they are those of several devices, so that a kernel's are moved by an array.
    """
    known = isinstance(offset, int)
    diagonal = offset if isinstance(offset, int) else 0
    band = Band.of(is_causal=is_causal, window=window, diagonal=diagonal)
    if band == Band():
        return band, None
    most = MOST_KNOWN if known and not in_parts else MOST
    if any(map(export.is_symbolic_dim, (queries, keys))):
        queries = keys = most // 2  # a size that is free in an exported function is less
    if queries + keys > most:
        raise ValueError(
            f"lengths of query and key ({queries} + {keys}) must be at most {most} together with "
            "a causal mask or a window"
            + ("" if known else " and an offset that is an array")
            + (" over several devices" if in_parts else "")
        )
    if known:
        return band.within(queries, keys), None
    return _within(band, jnp.asarray(offset), queries, keys)


def _within(band: Band, offset: Array, queries: int, keys: int) -> tuple[Band, Array]:
    """A band around the queries' own position, and their offsets, with no far number.

    A bound so wide that the other side's has no effect wherever its own has one is cut to T + S,
    and offsets where it has one are moved by as much. Past the last that matter all are alike.
    """
    reach = queries + keys
    left = None if band.lower is None else -band.lower
    right = band.upper
    if left is not None and left > reach:
        nearest = left - queries  # offsets past it hide the first keys
        moved = jnp.minimum(offset, keys)
        if nearest < INT32.max:
            moved = jnp.where(offset > nearest, offset - (left - reach), moved)
        offset, left = moved, reach
    if right is not None and right > reach:
        nearest = keys - right  # offsets before it hide the last keys
        moved = jnp.maximum(offset, -queries)
        if nearest > INT32.min:
            moved = jnp.where(offset < nearest, offset + (right - reach), moved)
        offset, right = moved, reach
    offset = jnp.clip(offset, -queries - (right or 0), keys + (left or 0))
    return Band(None if left is None else -left, right), offset


def kept_near(band: Band, offset: Array, queries: int, keys: int) -> Array:
    """Offsets beyond which no bound shows or hides any more, of this many queries and keys."""
    bounds = [bound for bound in (band.lower, band.upper) if bound is not None]
    least = min((-queries - bound for bound in bounds), default=0)
    return jnp.clip(offset, least, max((keys - bound for bound in bounds), default=0))


def _known(x: Array | np.ndarray) -> np.ndarray | None:
    """The numbers, if they are known while tracing."""
    if isinstance(x, jax.core.Tracer) or (isinstance(x, Array) and not x.is_fully_addressable):
        return None
    return np.asarray(x)


def _int32(x: Array | np.ndarray, least: int, most: int) -> Array:
    """The integers clipped to these bounds, as int32, whatever their own dtype."""
    own = jnp.iinfo(x.dtype)  # type: ignore[no-untyped-call]
    bounds = (np.array(b, x.dtype) for b in (max(least, own.min), min(most, own.max)))
    cut = np.clip if isinstance(x, np.ndarray) else jnp.clip
    return jnp.asarray(cut(x, *bounds), jnp.int32)
