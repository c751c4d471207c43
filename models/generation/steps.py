"""The compiled functions of generation, kept for later calls of the same model's shape.

`prefill` puts a chunk of the prompt into the cache, `begin` chooses the first token, `step` puts a
token into the cache and chooses the next. The cache and what goes from step to step are donated:
they stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.cache import KVCache
from models.decoder import Decoder
from models.generation.sampling import Chance, Draw, choose

__all__ = ["Rows", "Steps", "steps_of"]

type Weights = list[Array]


class Rows(NamedTuple):
    """Where each row stands: what one step leaves to the next."""

    token: Array
    """int32 (B,): the newest, not in the cache yet."""

    recent: Array
    """int32 (B, L): the last tokens, as many as the longest of stop; -1 before the first."""

    stopped: Array
    """bool (B,)"""

    made: Array
    """int32 (): tokens of each row so far."""


class Ends(NamedTuple):
    """What ends a row, int32 (S, L), and the token behind its end, int32 ()."""

    stop: Array
    pad: Array


class Steps(NamedTuple):
    """The functions, and the weights in the form in which they are given to them."""

    weights: Weights
    prefill: Callable[[Weights, KVCache, Array, Array], tuple[Array, KVCache]]
    """tokens and mask (B, C) -> logits (B, V) of the last token."""

    begin: Callable[[Array, Rows, Draw, Ends], tuple[Rows, Array]]
    """logits -> the rows with a token more, and the report: int32 (B, 2), token and whether the row
    stopped with it or before."""

    step: Callable[[Weights, KVCache, Rows, Draw, Ends], tuple[KVCache, Rows, Array]]


def steps_of(model: Decoder, chance: Chance) -> Steps:
    """The functions for a model; compiled once for all models, and calls, of the same shapes."""
    graph, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    prefill, begin, step = _compiled(graph, structure, chance)
    # Once, not in each step: of weights that are not stored in the dtype of the computation.
    weights = [x.astype(model.dtype) if x.ndim == 2 else x for x in leaves]
    return Steps(weights, prefill, begin, step)


@lru_cache(maxsize=32)
def _compiled(graph: Any, structure: Any, chance: Chance) -> tuple[Any, Any, Any]:
    def logits_of(
        weights: Weights, cache: KVCache, tokens: Array, mask: Array | None
    ) -> tuple[Array, KVCache]:
        model: Decoder = nnx.merge(graph, jax.tree.unflatten(structure, weights))
        logits, cache = model(tokens, attention_mask=mask, cache=cache, logits_to_keep=1)
        return logits[:, 0], cache

    def begin(logits: Array, rows: Rows, draw: Draw, ends: Ends) -> tuple[Rows, Array]:
        token = choose(logits, chance, draw, rows.made)
        recent = jnp.concatenate([rows.recent[:, 1:], token[:, None]], axis=1)
        matches = (ends.stop[None] == recent[:, None]) | (ends.stop[None] < 0)
        stopped = rows.stopped | matches.all(axis=2).any(axis=1)
        shown = jnp.where(rows.stopped, ends.pad, token)
        report = jnp.stack([shown, stopped.astype(jnp.int32)], axis=1)
        return Rows(token, recent, stopped, rows.made + 1), report

    def step(
        weights: Weights, cache: KVCache, rows: Rows, draw: Draw, ends: Ends
    ) -> tuple[KVCache, Rows, Array]:
        logits, cache = logits_of(weights, cache, rows.token[:, None], None)
        return cache, *begin(logits, rows, draw, ends)

    prefill = jax.jit(logits_of, donate_argnames="cache")
    return prefill, jax.jit(begin), jax.jit(step, donate_argnames=("cache", "rows"))
