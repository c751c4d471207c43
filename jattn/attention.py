"""The attention functions: arguments -> one `AttentionSpec` -> a backend."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Never, Unpack

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from jattn.backends import memory_efficient, table
from jattn.backends.table import Implementation
from jattn.call.arguments import Alignment, AttentionCall, AttentionOptions, Window, attention_call
from jattn.call.keywords import check_keywords
from jattn.call.target import target_of

__all__ = [
    "dot_product_attention",
    "eager_attention",
    "flash_attention",
    "memory_efficient_attention",
]


def with_full_signature[**P, R](function: Callable[P, R]) -> Callable[P, R]:
    """Shows `help` and inspection the keywords that `**options` stands for, and no `**unknown`."""
    own = inspect.signature(function)
    named = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if "options" in own.parameters:
        names = {p.name for p in named} | {"implementation"}
        full = inspect.signature(dot_product_attention)
        named += [p for p in full.parameters.values() if p.name not in names]
    function.__signature__ = own.replace(parameters=named)  # type: ignore[attr-defined]
    return function


@with_full_signature
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: ArrayLike | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: Window | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    causal_alignment: Alignment = "top_left",
    query_offset: ArrayLike | None = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: ArrayLike | None = None,
    broadcast_dropout: bool = False,
    **unknown: Never,
) -> Array | tuple[Array, Array]:
    """Exact attention, softmax(Q Kᵀ * scale + bias) V, on the best backend that can do the call.

    A drop-in superset of `jax.nn.dot_product_attention` (Vaswani et al., 2017, section 3.2.1).
    Letters: B batch, T queries, S keys, N query heads, K key/value heads (N a multiple of K),
    H head dim, D value head dim. The arrays share one dtype: bfloat16, float16 or float32
    (float64 too, where the backend can); sums and softmax run in float32.

    A query that may see no key gives output 0, log-sum-exp -inf and no gradient, as does a query
    past its length. What is hidden changes no output and no gradient: past the lengths whatever
    stands there, NaN and infinity too; under a mask, segments, causal or a window any finite
    number; under a bias of -inf any whose product with the query is finite. A NaN or an infinity
    that lengths do not hide may reach the rest of its row of the batch, as may in cuDNN's gradients
    a number whose products overflow float32.

    It has every derivative that JAX can ask for, of every floating argument, in both modes and of
    any order, in linear memory on every backend but "eager".

    Args:
      query: (B, T, N, H) or (T, N, H).
      key: (B, S, K, H) or (S, K, H).
      value: (B, S, K, D) or (S, K, D).
      bias: added to the logits; broadcastable to (B, N, T, S). Its gradient is exact, summed over
        broadcast axes.
      mask: bool, True where a query may see a key; broadcastable to (B, N, T, S).
      scale: a number that multiplies Q Kᵀ; 1 / sqrt(H) if None. A JAX array of one element,
        which may be traced, has a gradient.
      is_causal: query i sees keys up to its own position (see `causal_alignment`).
      query_seq_lengths: (B,) integers, not negative (traced negative ones are 0); queries past them
        are padding.
      key_value_seq_lengths: likewise; keys past them are padding.
      local_window_size: (left, right), query i sees keys from i - left to i + right, inclusive; an
        int is both; None on a side leaves it open. Any int from 0 on.
      implementation: a backend's name ("flash", "cudnn", "memory_efficient", "eager"), several to
        be tried in order, or None for the best that can; see `explain` and `attention_backend`.
      return_residual: also return the log-sum-exp of each row's logits; that of a query which sees
        no key is infinite, which `jax_debug_infs` reports.
      query_segment_ids: (B, T) integers of 32 bits; a query sees the keys of its own segment.
      key_value_segment_ids: (B, S), likewise. Sorted ids (packed documents) are skipped by block.
      causal_alignment: "top_left" puts query i at key i; "bottom_right" puts the last query at the
        last key (flash-attn's): query i at key i + S - T, or with lengths at i + key length - query
        length of its row. For causal and window alike.
      query_offset: an int, or int32 () or (B,), traced too: the key position of query 0, from which
        causal and window count, query i being at query_offset + i (a cache's length so far, the
        start of a chunk or shard). May be negative, or past the keys. Positions in bias, mask,
        lengths and dropout stay those of the arrays. A Python or NumPy int is part of the compiled
        program, an array is not.
      logits_soft_cap: cap * tanh(Q Kᵀ scale / cap), to which bias and mask are then added: what
        they hide no cap shows (Gemma 2, section 2.2).
      sinks: (N,) a learnable logit that joins each row's softmax and has no value (StreamingLLM;
        gpt-oss). One of -inf is none; one of inf takes its rows whole: output 0, log-sum-exp inf.
      dropout_rate: the share of weights dropped, in [0, 1), in steps of 2^-16; the rest grow by
        1 / (1 - rate).
      dropout_rng: a `jax.random` key. The mask is a fixed function of it and of the position, the
        same on every backend.
      broadcast_dropout: one dropout mask for all batch rows and heads (Flax's).

    Returns:
      (B, T, N, D) or (T, N, D), in query's dtype; with `return_residual`, also the natural
      log-sum-exp, float32, (B, T, N) or (T, N), which has a gradient.

    Raises:
      ValueError, TypeError: an argument is wrong; the text names it, its value and what is allowed.
      UnsupportedAttentionError: no backend that may run can do the call; the text has each reason.

    >>> import jax.numpy as jnp, jattn
    >>> x = jnp.ones((1, 4, 2, 8))
    >>> jattn.dot_product_attention(x, x, x, is_causal=True).shape
    (1, 4, 2, 8)
    """
    check_keywords("dot_product_attention", unknown)
    call = attention_call(
        query,
        key,
        value,
        bias,
        mask,
        scale=scale,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        return_residual=return_residual,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        causal_alignment=causal_alignment,
        query_offset=query_offset,
        logits_soft_cap=logits_soft_cap,
        sinks=sinks,
        dropout_rate=dropout_rate,
        dropout_rng=dropout_rng,
        broadcast_dropout=broadcast_dropout,
    )
    return _run(call, implementation)


@with_full_signature
def flash_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    **options: Unpack[AttentionOptions],
) -> Array | tuple[Array, Array]:
    """Blocked online-softmax attention in a GPU kernel (Dao, "FlashAttention-2", 2023).

    Takes the arguments of `dot_product_attention` but `implementation`, returns the same, and
    raises UnsupportedAttentionError, with the reasons, rather than run anything else.

    >>> import jax, jax.numpy as jnp, jattn
    >>> x = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    >>> if jax.default_backend() == "gpu":
    ...     out = jattn.flash_attention(x, x, x, is_causal=True)
    """
    check_keywords("flash_attention", options)
    return _run(attention_call(query, key, value, bias, mask, **options), "flash")


@with_full_signature
def eager_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    **options: Unpack[AttentionOptions],
) -> Array | tuple[Array, Array]:
    """Attention by the formula (Vaswani et al., 2017, section 3.2.1); O(T * S) memory.

    Takes the arguments of `dot_product_attention` but `implementation`, and returns the same.

    >>> import jax.numpy as jnp, jattn
    >>> x = jnp.ones((1, 4, 2, 8))
    >>> jattn.eager_attention(x, x, x).shape
    (1, 4, 2, 8)
    """
    check_keywords("eager_attention", options)
    return _run(attention_call(query, key, value, bias, mask, **options), "eager")


@with_full_signature
def memory_efficient_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    query_chunk_size: int | None = None,
    key_chunk_size: int | None = None,
    **options: Unpack[AttentionOptions],
) -> Array | tuple[Array, Array]:
    """Query-chunked attention, O(T + S) memory, on any device (Rabe and Staats, 2021).

    Takes the arguments of `dot_product_attention` but `implementation`, and returns the same.

    Args:
      query: as in `dot_product_attention`, like all arguments but the chunk sizes.
      key: as there.
      value: as there.
      bias: as there.
      mask: as there.
      query_chunk_size: queries held at once; chosen by shape and platform if None. Asking for a
        size asks for the form in XLA, on a GPU too.
      key_chunk_size: keys visited at once; likewise.
      **options: as there.

    >>> import jax.numpy as jnp, jattn
    >>> x = jnp.ones((1, 5, 2, 8))
    >>> jattn.memory_efficient_attention(x, x, x, is_causal=True, query_chunk_size=2).shape
    (1, 5, 2, 8)
    """
    check_keywords("memory_efficient_attention", options)
    call = attention_call(query, key, value, bias, mask, **options)
    if (query_chunk_size is None and key_chunk_size is None) or call.spec.is_empty:
        return _run(call, "memory_efficient")
    sizes = (query_chunk_size, key_chunk_size)
    target = target_of(call.operands)
    return call.result(*memory_efficient.attend(call.spec, call.operands, target, *sizes))


def _run(call: AttentionCall, implementation: Implementation | None) -> Array | tuple[Array, Array]:
    target = target_of(call.operands)
    form = table.choose(call.spec, target, implementation)
    if call.spec.is_empty:
        return call.result(*_of_nothing(call))
    return call.result(*form.attend(call.spec, call.operands, target))


def _of_nothing(call: AttentionCall) -> tuple[Array, Array]:
    """What queries give that see no key, or none of them: no backend has to know of it."""
    spec, query = call.spec, call.operands.query
    rows = (spec.batch, spec.queries, spec.heads)
    out = jnp.zeros((*rows, spec.value_dim), query.dtype)
    return out, jnp.full(rows, -jnp.inf if spec.wants_residual else 0, spec.accumulator)
