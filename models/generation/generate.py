"""`generate` and `stream`: prefill in chunks, then a compiled step for each token.

The host stays ahead of the device: it gives out step i + AHEAD before it reads what step i found,
so that the device never waits for it, and a batch that has ended costs AHEAD steps too many.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from models.cache import KVCache
from models.decoder import Decoder
from models.generation.arguments import Prompt, Request, Stop, request_of
from models.generation.sampling import draw_of
from models.generation.steps import Ends, Rows, Steps, steps_of

__all__ = ["Generated", "generate", "stream"]

AHEAD = 2
_LEAST_CHUNK = 16
_CAPACITY_STEP = 256  # capacities are multiples of it, so that fewer of them are compiled for


class Generated(NamedTuple):
    """One more token of each row."""

    tokens: np.ndarray[Any, np.dtype[np.int32]]
    """(B,); of a row that had ended before, the token that fills."""

    is_new: np.ndarray[Any, np.dtype[np.bool_]]
    """(B,): whether the row had not ended before. The token that ends a row is new."""


def generate(
    model: Decoder,
    tokens: ArrayLike,
    *,
    max_new_tokens: int,
    attention_mask: ArrayLike | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | ArrayLike = 0,
    stop: Stop | None = None,
    prefill_chunk: int | None = None,
    on_token: Callable[[Generated], object] | None = None,
) -> Array:
    """Continues each row of tokens.

    One step is compiled for the shapes of model, batch and capacity (the longest row and
    `max_new_tokens`, rounded up to a multiple of 256), and used for every token and later calls. A
    row's result does not depend on its neighbours nor on padding, beyond rounding.

    Args:
        model: a `Decoder`, as `from_pretrained` returns.
        tokens: integers (B, T).
        max_new_tokens: of each row, at most. Together with the prompt they may exceed the
            `max_position_embeddings` that the model was trained for, with a warning.
        attention_mask: bool, or 0 and 1, (B, T): False for padding, which stands to the left.
        temperature: what divides the logits; 0 takes the likeliest token (of equals the lowest id),
            whatever top_k, top_p and seed say.
        top_k: draw from so many of the likeliest tokens; of equals the lowest ids. More than there
            are is all.
        top_p: draw from the smallest set of the likeliest tokens whose mass reaches this share, in
            (0, 1], at least one.
        seed: an integer, from which each row draws its own numbers by its place in the batch; or
            integers (B,): row b then draws what it would alone with `seed=seed[b]`.
        stop: token ids, and sequences of token ids, that end a row; None for `eos_token_ids` of
            the configuration, () for nothing. They are part of the result.
        prefill_chunk: how many tokens of each row go through the model at once before the first new
            one, which bounds the memory for it; None for about 4096 in all. A model with dynamic
            rotary frequencies takes the whole prompt at once.
        on_token: called with a `Generated` for each new token, while the next are computed.

    Returns:
        int32 (B, n), n at most `max_new_tokens`: the new tokens. Where a row ended, itself followed
        by the configuration's `pad_token_id`, or if it has none by the first single token of
        `stop`. n is where the last row ended.

    Raises:
        ValueError, TypeError: an argument is wrong, such as no token, a token that the vocabulary
            lacks, or padding elsewhere than to the left; the text names it.
        jattn.UnsupportedAttentionError: the model's attention cannot run at this size.
    """
    steps = stream(
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        attention_mask=attention_mask,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        prefill_chunk=prefill_chunk,
    )
    columns = []
    for generated in steps:
        if on_token is not None:
            on_token(generated)
        columns.append(generated.tokens)
    if not columns:
        return jnp.zeros((np.shape(tokens)[0], 0), jnp.int32)
    return jnp.asarray(np.stack(columns, axis=1))


def stream(
    model: Decoder,
    tokens: ArrayLike,
    *,
    max_new_tokens: int,
    attention_mask: ArrayLike | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | ArrayLike = 0,
    stop: Stop | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[Generated]:
    """What `generate` returns, token by token as they come; the same arguments but `on_token`.

    They are checked at once; the work begins with the first token that is asked for, and ends where
    no more are.
    """
    request = request_of(
        model.config,
        tokens,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        sampling=dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
        stop=stop,
        prefill_chunk=prefill_chunk,
    )
    return _generated(model, request)


def _generated(model: Decoder, request: Request) -> Iterator[Generated]:
    if request.max_new_tokens == 0:
        return
    batch = len(request.prompt.tokens)
    chance, draw = draw_of(request.sampling, batch)
    steps = steps_of(model, chance)
    ends = Ends(jnp.asarray(request.stop), jnp.int32(request.pad))
    cache, logits = _prefilled(model, steps, request)
    rows = Rows(
        token=jnp.zeros(batch, jnp.int32),
        recent=jnp.full((batch, request.stop.shape[1]), -1, jnp.int32),
        stopped=jnp.zeros(batch, bool),
        made=jnp.int32(0),
    )
    rows, report = steps.begin(logits, rows, draw, ends)
    reports = deque([_on_its_way(report)])
    given, ended = 1, np.zeros(batch, bool)
    while reports:
        while len(reports) <= AHEAD and given < request.max_new_tokens:
            cache, rows, report = steps.step(steps.weights, cache, rows, draw, ends)
            reports.append(_on_its_way(report))
            given += 1
        found = np.asarray(reports.popleft())
        yield Generated(found[:, 0], ~ended)
        ended = found[:, 1] != 0
        if ended.all():
            return


def _on_its_way(report: Array) -> Array:
    report.copy_to_host_async()
    return report


def _prefilled(model: Decoder, steps: Steps, request: Request) -> tuple[KVCache, Array]:
    """A cache with the whole prompt in it, and the logits (B, V) of what follows."""
    longest = int(request.prompt.mask.sum(axis=1).max())
    # The last token is never put into the cache.
    needed = longest + request.max_new_tokens - 1
    cache = KVCache.empty(
        model.config,
        batch=len(request.prompt.tokens),
        capacity=-(-needed // _CAPACITY_STEP) * _CAPACITY_STEP,
        dtype=model.dtype,
    )
    logits = None
    for tokens, mask in _chunks(request.prompt, request.chunk):
        logits, cache = steps.prefill(steps.weights, cache, tokens, mask)
    assert logits is not None
    return cache, logits


def _chunks(prompt: Prompt, size: int) -> Iterator[tuple[Array, Array]]:
    """The prompt's columns from left to right, as tokens and mask (B, C).

    All have `size` columns but the first, which has what is left over, behind padding that makes it
    a power of two: prompts of any length need few compiled functions.
    """
    length = prompt.tokens.shape[1]
    rest = (length - 1) % size + 1
    first = min(size, max(_LEAST_CHUNK, 1 << (rest - 1).bit_length()))
    padding = ((0, 0), (first - rest, 0))
    tokens, mask = (np.pad(x, padding) for x in (prompt.tokens, prompt.mask.astype(np.int32)))
    for start in (0, *range(first, tokens.shape[1], size)):
        columns = slice(start, first if start == 0 else start + size)
        yield jnp.asarray(tokens[:, columns]), jnp.asarray(mask[:, columns])
