"""Attention for Flax's attention modules, `flax.nnx` and `flax.linen` alike."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from jattn.attention import dot_product_attention
from jattn.backends import table
from jattn.backends.table import Implementation
from jattn.call.arguments import AttentionOptions, Window, attention_call
from jattn.call.errors import UnsupportedAttentionError
from jattn.call.keywords import check_keywords
from jattn.call.options import Options, frozen, thawed

__all__ = ["AttentionFn", "attention_fn"]

# What Flax passes at each call, so that setting it here would be overruled in silence.
_SET_ON_THE_MODULE = (
    "dropout_rate", "dropout_rng", "broadcast_dropout", "deterministic", "dtype", "precision",
    "module", "mask", "bias",
)  # fmt: skip
_PER_ROW = ("query_seq_lengths", "key_value_seq_lengths", "query_offset")
_ARRAYS = (*_PER_ROW, "query_segment_ids", "key_value_segment_ids", "sinks")


def attention_fn(
    *,
    implementation: Implementation | None = None,
    **options: Unpack[AttentionOptions],
) -> AttentionFn:
    """An `attention_fn` for `nnx.MultiHeadAttention` and `linen.MultiHeadDotProductAttention`.

    Equal to Flax's own attention within rounding, for any number of batch dimensions, except for a
    query that may see no key (0 here, the mean of the values there) and for which elements dropout
    drops. What this attention cannot do (sowing the weights, custom einsums) it refuses.

    Decoding with Flax's cache (`decode=True`): one query comes with a mask of the keys up to its
    own. `is_causal` is then in the mask. Where the query stands Flax does not pass, so an option
    that needs to know is refused: a window belongs into the mask that the module is called with.
    `query_offset` says it, where set, and then everything is measured from there.

    Args:
      implementation: as in `jattn.dot_product_attention`.
      **options: of `jattn.dot_product_attention`, but dropout, which the module sets, and
        `return_residual`. Attention is causal if `is_causal` is set here or in the module's call.
        Arrays are constants of the model; batch axes count as one, their product.

    Returns:
      A callable that compares, hashes and pickles by its options, arrays by their elements: models
      built alike share one trace, and `jax.tree.map` goes over two of them.

    Raises:
      TypeError, ValueError: an option that the module sets, or that is wrong.
      UnsupportedAttentionError, when called: a feature that needs the attention weights, or the
        position of a query at Flax's cache.

    >>> from flax import nnx
    >>> import jax.numpy as jnp, jattn.flax
    >>> layer = nnx.MultiHeadAttention(
    ...     num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0),
    ...     attention_fn=jattn.flax.attention_fn(is_causal=True),
    ... )
    >>> layer(jnp.ones((1, 4, 8))).shape
    (1, 4, 8)
    """
    for name in options:
        if name in _SET_ON_THE_MODULE:
            raise TypeError(f"{name} is for the Flax module to set, not for attention_fn")
    check_keywords("attention_fn", options)
    if options.get("return_residual"):
        raise TypeError("return_residual: a Flax module takes one array from its attention_fn")
    table.candidates(implementation)
    _check(options)
    named = implementation if isinstance(implementation, str | None) else tuple(implementation)
    return AttentionFn(named, frozen(options))


@dataclass(frozen=True, repr=False)
class AttentionFn:
    """What `attention_fn` makes."""

    implementation: str | tuple[str, ...] | None
    options: Options

    # Every keyword is named because linen passes only those that it finds in the signature.
    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        bias: Array | None = None,
        mask: Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Any = None,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
        input_positions: Any = None,
    ) -> Array:
        """Attention of query (batch..., T, N, H) over key and value, as Flax calls for it."""
        del force_fp32_for_softmax  # it always is
        _refuse_what_needs_weights(
            module=module,
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
            input_positions=input_positions,
        )
        _check_batches(query, key, value)
        options = thawed(self.options)
        said = "query_offset" in options
        if query.shape[-3] == 1 < key.shape[-3] and mask is not None and not said:
            _make_a_cached_step(options, key.shape[-3], is_causal=is_causal)
        options["is_causal"] = options.get("is_causal", False) or is_causal
        common = jnp.result_type(query, key, value) if dtype is None else dtype
        batch = query.shape[:-3]
        with _matmul_precision(precision):
            out = dot_product_attention(
                _one_batch_axis(query.astype(common)),
                _one_batch_axis(key.astype(common)),
                _one_batch_axis(value.astype(common)),
                bias=None if bias is None else _logits_like("bias", bias, batch),
                mask=None if mask is None else _logits_like("mask", mask, batch).astype(bool),
                implementation=self.implementation,
                dropout_rate=0.0 if deterministic else dropout_rate,
                dropout_rng=dropout_rng,
                broadcast_dropout=broadcast_dropout,
                **options,
            )
        return cast(Array, out).reshape(*batch, *out.shape[-3:])  # type: ignore[union-attr]

    def __repr__(self) -> str:
        named = () if self.implementation is None else (("implementation", self.implementation),)
        shown = (*named, *thawed(self.options).items())
        return f"attention_fn({', '.join(f'{name}={x!r}' for name, x in shown)})"


def _check(options: AttentionOptions) -> None:
    """Raises what a call with these options raises, of the smallest shapes that they fit."""
    shapes = {name: np.shape(cast(Any, options.get(name))) for name in _ARRAYS}
    query_ids, key_ids = (shapes[name] for name in ("query_segment_ids", "key_value_segment_ids"))
    per_row = (shapes[name] for name in _PER_ROW)
    batch = max((shape[0] for shape in (query_ids, key_ids, *per_row) if shape), default=1)
    (heads, *_) = shapes["sinks"] or (1,)

    def zeros(ids: tuple[int, ...]) -> Array:
        return jnp.zeros((batch, ids[-1] if ids else 1, heads, 1))

    def call() -> Any:
        query, key = zeros(query_ids), zeros(key_ids)
        return attention_call(query, key, key, **options).operands

    jax.eval_shape(call)


def _make_a_cached_step(options: dict[str, Any], keys: int, *, is_causal: bool) -> None:
    """Fits the options to one query and a mask over several keys: a step of Flax's decoding.

    The query stands at the cache's index and the mask ends there. So causal is in the mask, and
    would be wrong measured from key 0. The index is not passed, and cannot be read off the mask,
    where the caller's own may hide the newest key.
    """
    left, right = _sides(options.get("local_window_size"))
    causal = options.pop("is_causal", False)
    hides_none = (left is None or left >= keys - 1) and (
        causal or right is None or right >= keys - 1
    )
    if hides_none:
        options.pop("local_window_size", None)
    advice = {
        "local_window_size": "leave it out of attention_fn, and give the module's call a mask: "
        f"(jnp.arange({keys}) >= index - {left})[None, None, None]",
        "query_seq_lengths": "leave it out: what a row past its length gives is not used",
        "query_segment_ids": "leave it out, and give the module's call a mask of the segments",
    }
    found = [name for name in advice if name in options]
    if is_causal:
        found.append("is_causal")
        advice["is_causal"] = "leave it out of the module's call: the cache's mask is causal"
    if found:
        raise UnsupportedAttentionError(
            f"one query and a mask over {keys} keys, as in decoding with Flax's cache, do not say "
            "at which key the query stands, which is needed for "
            + "; ".join(f"{name} ({advice[name]})" for name in found)
            + "; where this is no cache, query_offset=0 in attention_fn says so"
        )


def _sides(window: Window | None) -> tuple[int | None, int | None]:
    return window if isinstance(window, tuple) else (window, window)


def _refuse_what_needs_weights(**given: Any) -> None:
    advice = {
        "module": "sow_weights needs the attention weights, which are never stored",
        "input_positions": "apply the rotary embedding before attention",
    }
    for name, x in given.items():
        if x is not None:
            reason = advice.get(name, "the products run inside the attention backend")
            raise UnsupportedAttentionError(
                f"jattn.flax.attention_fn cannot take {name}: {reason}; "
                "Flax's own dot_product_attention can"
            )


def _check_batches(query: Array, key: Array, value: Array) -> None:
    for name, x in {"query": query, "key": key, "value": value}.items():
        if x.ndim < 3:
            raise ValueError(
                f"{name} must have shape (batch..., length, heads, dim), got {x.shape}"
            )
        if x.shape[:-3] != query.shape[:-3]:
            raise ValueError(
                f"{name}'s batch dimensions {x.shape[:-3]} must be query's {query.shape[:-3]}"
            )


def _matmul_precision(precision: Any) -> contextlib.AbstractContextManager[object]:
    if precision is None:
        return contextlib.nullcontext()
    if isinstance(precision, jax.lax.Precision):
        precision = precision.name.lower()
    if not isinstance(precision, str):
        raise TypeError(f"precision must be a jax.lax.Precision or its name, got {precision!r}")
    manager: contextlib.AbstractContextManager[object] = jax.default_matmul_precision(precision)
    return manager


def _one_batch_axis(x: Array) -> Array:
    """(batch..., length, heads, dim) with the batch axes made one, always."""
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])


def _logits_like(name: str, x: Array, batch: tuple[int, ...]) -> Array:
    """A bias or mask broadcastable to (batch..., N, T, S) with one batch axis, of 1 if possible."""
    x = x[(None,) * (len(batch) + 3 - x.ndim)]
    own = x.shape[:-3]
    if math.prod(own) == 1:
        return x.reshape(1, *x.shape[-3:])
    if len(own) > len(batch) or any(d not in (1, n) for d, n in zip(own, batch, strict=True)):
        raise ValueError(f"{name}'s batch dimensions {own} must broadcast to query's {batch}")
    x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
    return x.reshape(math.prod(batch), *x.shape[-3:])
