"""The arguments of `generate`: checked where they are given, and brought to one form."""

from __future__ import annotations

import math
import numbers
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from models.decoder.config import DecoderConfig

__all__ = ["Prompt", "Request", "Sampling", "request_of"]

type Integers = np.ndarray[Any, np.dtype[np.int32]]
type Stop = Sequence[int | Sequence[int]]


@dataclass(frozen=True)
class Prompt:
    """Rows of tokens that end together, padding to their left."""

    tokens: Integers
    """(B, T)"""

    mask: np.ndarray[Any, np.dtype[np.bool_]]
    """(B, T), True where a token is real."""


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits."""

    temperature: float
    top_k: int | None
    top_p: float | None
    seeds: tuple[int, ...]
    """One for each row, or one for all, of which each row then takes its own share."""

    @property
    def is_greedy(self) -> bool:
        """Whether it is the likeliest token, without chance."""
        return self.temperature == 0


@dataclass(frozen=True)
class Request:
    """What one call is to do."""

    prompt: Prompt
    max_new_tokens: int
    sampling: Sampling
    stop: Integers
    """(S, L): sequences that end a row, their last token on the right, -1 before the first."""

    pad: int
    """What stands behind a row's end."""

    chunk: int
    """Tokens a row of one prefill call."""


def request_of(
    config: DecoderConfig,
    tokens: Any,
    *,
    attention_mask: Any,
    max_new_tokens: Any,
    sampling: dict[str, Any],
    stop: Any,
    prefill_chunk: Any,
) -> Request:
    """All of a call's arguments, or one line that says which of them is wrong.

    Raises:
        ValueError, TypeError: see `generate`.
    """
    prompt = _prompt(tokens, attention_mask, config.vocab_size)
    batch, length = prompt.tokens.shape
    count = _integer("max_new_tokens", max_new_tokens, least=0)
    if prefill_chunk is not None:
        chunk = _integer("prefill_chunk", prefill_chunk, least=1)
    else:
        chunk = max(_CHUNK_TOKENS // batch, 64)
    if any(layer.rope.dynamic is not None for layer in config.layers):
        chunk = length  # its frequencies are those of the whole prompt
    elif int(prompt.mask.sum(axis=1).max()) + count > config.max_position_embeddings:
        warnings.warn(
            f"prompt and max_new_tokens come to {int(prompt.mask.sum(axis=1).max()) + count}"
            f" tokens, the model was trained for {config.max_position_embeddings}"
            " (max_position_embeddings)",
            stacklevel=3,
        )
    ends = _ends(config, stop)
    pad = config.pad_token_id
    if pad is None or not 0 <= pad < config.vocab_size:
        pad = next((ids[0] for ids in ends if len(ids) == 1), 0)
    table = _stop_table(ends, never=config.vocab_size)
    return Request(prompt, count, _sampling(config, batch, **sampling), table, pad, chunk)


_STOP_ROWS = 8
_CHUNK_TOKENS = 4096  # of all rows: enough to fill a GPU, and a small part of its memory


def _prompt(tokens: Any, mask: Any, vocabulary: int) -> Prompt:
    given = _concrete("tokens", tokens)
    if given.ndim != 2 or 0 in given.shape:
        raise ValueError(
            f"tokens must be (B, T), at least one row of at least one token; got {given.shape}"
        )
    if not np.issubdtype(given.dtype, np.integer):
        raise TypeError(f"tokens must be integers, got {given.dtype}")
    real = _mask(mask, given.shape)
    outside = real & ((given < 0) | (given >= vocabulary))
    if outside.any():
        row, column = map(int, np.argwhere(outside)[0])
        raise ValueError(
            f"tokens[{row}, {column}] is {given[row, column]}: the vocabulary is 0 to"
            f" {vocabulary - 1}"
        )
    first = int(real.any(axis=0).argmax())  # columns of padding alone
    kept = np.where(real, given, 0).astype(np.int32)
    return Prompt(kept[:, first:], real[:, first:])


def _mask(mask: Any, shape: tuple[int, ...]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    if mask is None:
        return np.ones(shape, bool)
    real = _concrete("attention_mask", mask)
    if real.shape != shape:
        raise ValueError(f"attention_mask must have the tokens' shape {shape}, got {real.shape}")
    if real.dtype != bool and not np.isin(real, (0, 1)).all():
        raise ValueError("attention_mask must be bool, or 1 for real tokens and 0 for padding")
    real = real.astype(bool)
    for row, values in enumerate(real):
        if not values.any():
            raise ValueError(f"attention_mask: row {row} has no token")
        if not values[-1]:
            raise ValueError(
                f"attention_mask: row {row} ends with padding, which must stand to the left"
            )
        if not values[int(values.argmax()) :].all():
            raise ValueError(f"attention_mask: row {row} has padding between its tokens")
    return real


def _concrete(name: str, x: Any) -> np.ndarray[Any, Any]:
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"{name} is traced: generate runs its steps itself, call it outside jit")
    try:
        return np.asarray(x)
    except ValueError as error:
        raise ValueError(f"{name} must be a rectangular array: {error}") from None


def _sampling(
    config: DecoderConfig, batch: int, *, temperature: Any, top_k: Any, top_p: Any, seed: Any
) -> Sampling:
    number = _number("temperature", temperature)
    if not (number >= 0 and math.isfinite(number)):
        raise ValueError(f"temperature must be 0 (greedy) or above and finite, got {temperature}")
    if top_k is not None:
        top_k = min(_integer("top_k", top_k, least=1), config.vocab_size)
        top_k = None if top_k == config.vocab_size else top_k
    if top_p is not None:
        top_p = _number("top_p", top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        top_p = None if top_p == 1 else top_p
    seeds = np.asarray(seed)
    if not np.issubdtype(seeds.dtype, np.integer) or seeds.shape not in ((), (batch,)):
        raise ValueError(f"seed must be an integer, or one for each of {batch} rows; got {seed!r}")
    return Sampling(number, top_k, top_p, tuple(seeds.reshape(-1).tolist()))


def _ends(config: DecoderConfig, stop: Any) -> list[list[int]]:
    """The sequences that end a row."""
    if stop is None:
        return [[each] for each in config.eos_token_ids if 0 <= each < config.vocab_size]
    if isinstance(stop, str | bytes) or not isinstance(stop, Sequence | np.ndarray | set):
        raise TypeError(f"stop must be token ids, or sequences of them; got {stop!r}")
    ends = []
    for each in stop:
        given = list(each) if isinstance(each, Sequence | np.ndarray) else [each]
        ids = [_integer("a token of stop", x, least=0) for x in given]
        if not ids or max(ids) >= config.vocab_size:
            raise ValueError(
                f"stop has {each!r}: a sequence needs a token, the vocabulary is 0 to"
                f" {config.vocab_size - 1}"
            )
        ends.append(ids)
    return ends


def _stop_table(ends: list[list[int]], *, never: int) -> Integers:
    """`Request.stop`, with rows that no token matches up to a multiple of _STOP_ROWS.

    So few and many of them, and none, take the same compiled step.
    """
    longest = max(map(len, ends), default=1)
    table = np.full((-(-max(len(ends), 1) // _STOP_ROWS) * _STOP_ROWS, longest), -1, np.int32)
    table[:, -1] = never
    for row, ids in zip(table, ends, strict=False):
        row[longest - len(ids) :] = ids
    return table


def _integer(name: str, x: Any, *, least: int) -> int:
    try:
        value = operator.index(x)
    except TypeError:
        value = None
    if value is None or isinstance(x, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {x!r}")
    return value


def _number(name: str, x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, numbers.Real | np.ndarray | jax.Array):
        raise TypeError(f"{name} must be a number, got {x!r}")
    return float(x)
