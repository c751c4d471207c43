"""The arguments of an attention call: checked, brought to one form, made an `AttentionSpec`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from jattn.call import dropout, positions
from jattn.call.band import Band
from jattn.call.context import Context, not_dealt, own_context
from jattn.call.spec import AttentionSpec, Operands, Shape4

__all__ = ["Alignment", "AttentionCall", "AttentionOptions", "Window", "attention_call"]

type Window = int | tuple[int | None, int | None]
Alignment = Literal["top_left", "bottom_right"]
DTYPES = ("bfloat16", "float16", "float32", "float64")


class AttentionOptions(TypedDict, total=False):
    """The keyword arguments of every attention function; `dot_product_attention` explains them."""

    scale: ArrayLike | None
    is_causal: bool
    query_seq_lengths: ArrayLike | None
    key_value_seq_lengths: ArrayLike | None
    local_window_size: Window | None
    return_residual: bool
    query_segment_ids: ArrayLike | None
    key_value_segment_ids: ArrayLike | None
    causal_alignment: Alignment
    query_offset: ArrayLike | None
    logits_soft_cap: float | None
    sinks: ArrayLike | None
    dropout_rate: float
    dropout_rng: ArrayLike | None
    broadcast_dropout: bool


@dataclass(frozen=True)
class AttentionCall:
    """One call: its static facts, its arrays, and the form its caller wants the result in."""

    spec: AttentionSpec
    operands: Operands
    has_batch: bool

    def result(self, out: Array, lse: Array) -> Array | tuple[Array, Array]:
        """The caller's result from a backend's output (B, T, N, D) and log-sum-exp (B, T, N)."""
        if not self.has_batch:
            out, lse = out[0], lse[0]
        return (out, lse) if self.spec.wants_residual else out


def attention_call(
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
) -> AttentionCall:
    """The call that these arguments describe; ValueError or TypeError names what is wrong."""
    q, k, v, has_batch = _query_key_value(query, key, value)
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    context = own_context(queries, keys)
    all_queries, all_keys = (queries, keys) if context is None else (context.queries, context.keys)
    logits_shape = (batch, heads, queries, all_keys)
    is_causal = _flag("is_causal", is_causal)
    return_residual = _flag("return_residual", return_residual)
    broadcast_dropout = _flag("broadcast_dropout", broadcast_dropout)
    if causal_alignment not in get_args(Alignment):
        allowed = " or ".join(map(repr, get_args(Alignment)))
        raise ValueError(f"causal_alignment must be {allowed}, got {causal_alignment!r}")
    rate = _number("dropout_rate", dropout_rate)
    if not 0 <= rate < 1:
        raise ValueError(f"dropout_rate must be in [0, 1), got {rate}")

    operands = Operands(
        query=q,
        key=k,
        value=v,
        bias=_bias(bias, logits_shape),
        mask=_mask(mask, logits_shape),
        query_lengths=positions.lengths(
            "query_seq_lengths", query_seq_lengths, all_queries, batch, has_batch=has_batch
        ),
        key_lengths=positions.lengths(
            "key_value_seq_lengths", key_value_seq_lengths, all_keys, batch, has_batch=has_batch
        ),
        query_segments=_segments("query_segment_ids", query_segment_ids, (batch, queries)),
        key_segments=_segments("key_value_segment_ids", key_value_segment_ids, (batch, keys)),
        sinks=_sinks(sinks, heads),
        dropout_seeds=_dropout_seeds(rate, dropout_rng, batch, shared=broadcast_dropout),
        scale=_array_scale(scale, q.dtype),
    )
    _check_together(operands, context)
    offset = positions.query_offset(query_offset, batch)
    if causal_alignment == "bottom_right":
        offset = positions.bottom_right(offset, operands, all_queries, all_keys)
    band, offset = positions.band_and_offset(
        is_causal=bool(is_causal),
        window=_window(local_window_size),
        offset=0 if offset is None else offset,
        queries=all_queries,
        keys=all_keys,
        in_parts=context is not None,
    )
    operands = operands._replace(query_offset=offset)
    spec = replace(
        _spec_of(operands),
        scale=None if operands.scale is not None else _static_scale(scale, q.shape[3]),
        band=band,
        logits_soft_cap=_soft_cap(logits_soft_cap),
        dropout_rate=rate,
        broadcast_dropout=broadcast_dropout,
        wants_residual=return_residual,
        context=context,
    )
    return AttentionCall(spec, operands, has_batch)


def _check_together(operands: Operands, context: Context | None) -> None:
    """What no argument shows alone."""
    if (operands.query_segments is None) != (operands.key_segments is None):
        raise ValueError("query_segment_ids and key_value_segment_ids must be given together")
    if context is not None and context.schedule == "heads":
        queries, kv_heads = operands.query.shape[1], operands.key.shape[2]
        shapes = (_shape4(operands.bias), _shape4(operands.mask))
        reason = not_dealt(context, queries, kv_heads, shapes)
        if reason is not None:
            raise ValueError(f"schedule 'heads' does not apply: {reason}")


def _spec_of(operands: Operands) -> AttentionSpec:
    """What the arrays say of a call."""
    batch, queries, heads, head_dim = operands.query.shape
    _, keys, kv_heads, value_dim = operands.value.shape
    return AttentionSpec(
        batch=batch,
        queries=queries,
        keys=keys,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=np.dtype(operands.query.dtype),
        precision=_precision(operands.query),
        scale=None,
        band=Band(),
        bias_shape=_shape4(operands.bias),
        bias_dtype=None if operands.bias is None else np.dtype(operands.bias.dtype),
        mask_shape=_shape4(operands.mask),
        has_query_lengths=operands.query_lengths is not None,
        has_key_lengths=operands.key_lengths is not None,
        has_segments=operands.query_segments is not None,
        has_query_offset=operands.query_offset is not None,
        has_sinks=operands.sinks is not None,
    )


def _array(name: str, x: ArrayLike) -> Array:
    """The array itself if it is one: to differentiate a conversion takes a millisecond."""
    if isinstance(x, Array):
        return x
    try:
        return jnp.asarray(x)
    except jax.errors.JAXTypeError:  # of a tracer
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"{name} must be an array, got {_kind(x)}") from error


def _query_key_value(
    query: ArrayLike, key: ArrayLike, value: ArrayLike
) -> tuple[Array, Array, Array, bool]:
    for name, given in {"query": query, "key": key, "value": value}.items():
        if given is None:
            raise TypeError(f"{name} must be an array, got None")
    q, k, v = _array("query", query), _array("key", key), _array("value", value)
    layouts = {"query": (q, "BTNH or TNH"), "key": (k, "BSKH or SKH"), "value": (v, "BSKD or SKD")}
    for name, (x, layout) in layouts.items():
        if x.ndim not in (3, 4):
            more = _folded(name, x.shape) if x.ndim > 4 else ""
            raise ValueError(f"{name} must have shape {layout}, got {x.shape}{more}")
        if x.ndim != q.ndim:
            raise ValueError(f"{name} must have query's rank ({q.ndim}), got shape {x.shape}")
        if 0 in x.shape[-2:]:
            raise ValueError(f"{name} must have heads and a head dim above 0, got shape {x.shape}")
        if x.dtype.name not in DTYPES:
            raise TypeError(f"{name} must have a dtype of {', '.join(DTYPES)}, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have query's dtype ({q.dtype}), got {x.dtype}")
    has_batch = q.ndim == 4
    if not has_batch:
        q, k, v = q[None], k[None], v[None]
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"key's batch size ({k.shape[0]}) must be query's ({q.shape[0]})")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"value must have key's batch, length and heads {k.shape[:3]}, got {v.shape[:3]}"
        )
    if k.shape[3] != q.shape[3]:
        raise ValueError(f"key's head dim ({k.shape[3]}) must be query's ({q.shape[3]})")
    if q.shape[2] % k.shape[2]:
        swapped = k.shape[2] > k.shape[1]
        raise ValueError(
            f"query heads ({q.shape[2]}) must be a multiple of key heads ({k.shape[2]})"
            + ("; arrays are read as (B, T, N, H), not (B, N, T, H)" if swapped else "")
        )
    return q, k, v, has_batch


def _folded(name: str, shape: tuple[int, ...]) -> str:
    """What to do with more than one axis before length, heads and head dim."""
    batch = math.prod(shape[:-3])
    vmap = "jax.vmap" if len(shape) == 5 else f"{len(shape) - 4} nested jax.vmap"
    return (
        f": {vmap} over its first axes (in_axes=None for a bias or mask that all share, which is "
        f"read where it is, in one call), or {name}.reshape({batch}, *{name}.shape[-3:])"
    )


def _bias(bias: ArrayLike | None, logits_shape: Shape4) -> Array | None:
    if bias is None:
        return None
    x = _array("bias", bias)
    if x.dtype == bool:
        raise TypeError("bias must be a number to add to the logits, got bool: pass it as mask")
    if jnp.issubdtype(x.dtype, jnp.integer):
        x = x.astype(jnp.float32)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"bias must be real numbers, got {x.dtype}")
    return _broadcastable("bias", x, logits_shape)


def _mask(mask: ArrayLike | None, logits_shape: Shape4) -> Array | None:
    if mask is None:
        return None
    x = _array("mask", mask)
    if x.dtype != bool:
        raise TypeError(
            f"mask must be bool (True: may attend), got {x.dtype}: mask.astype(bool) if it holds 0 "
            "and 1; if it holds 0 and -inf (or the like) to add, pass it as bias"
        )
    return _broadcastable("mask", x, logits_shape)


def _broadcastable(name: str, x: Array, logits_shape: Shape4) -> Array:
    full = x[(None,) * (4 - x.ndim)] if x.ndim < 4 else x
    if full.ndim > 4 or any(d not in (1, n) for d, n in zip(full.shape, logits_shape, strict=True)):
        raise ValueError(
            f"{name} must broadcast to (B, N, T, S) = {logits_shape}, got {x.shape}"
            + _made_4d(name, x.shape, logits_shape)
        )
    return full


def _made_4d(name: str, shape: tuple[int, ...], logits_shape: Shape4) -> str:
    """How to index what has one of the shapes that others take, so that it broadcasts."""
    b, n, t, s = logits_shape
    ways = (
        ((b, s), f"as (B, S), {name}[:, None, None, :]"),
        ((b, t), f"as (B, T), {name}[:, None, :, None]"),
        ((b, t, s), f"as (B, T, S), {name}[:, None]"),
        ((b, 1, s), f"as (B, 1, S), {name}[:, None]"),
        ((b, n, s), f"as (B, N, S), {name}[:, :, None]"),
        ((s, t), f"as (S, T), {name}.T"),
        ((b * n, t, s), f"as (B * N, T, S), {name}.reshape({b}, {n}, {t}, {s})"),
    )
    return next((f": {way}" for given, way in ways if given == shape), "")


def _segments(name: str, ids: ArrayLike | None, shape: tuple[int, int]) -> Array | None:
    if ids is None:
        return None
    x = positions.as_integers(name, ids)
    if x.shape != shape and (1, *x.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} (batch, length), got {x.shape}")
    return positions.as_ids(name, x).reshape(shape)


def _sinks(sinks: ArrayLike | None, heads: int) -> Array | None:
    if sinks is None:
        return None
    x = _array("sinks", sinks)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"sinks must be floating, got {x.dtype}")
    if x.shape != (heads,):
        raise ValueError(f"sinks must have shape (N,) = ({heads},), got {x.shape}")
    return x


def _dropout_seeds(rate: float, rng: ArrayLike | None, batch: int, *, shared: bool) -> Array | None:
    if rate == 0:
        return None
    if rng is None:
        raise ValueError(f"dropout_rng must be given when dropout_rate ({rate}) is above 0")
    source = type(rng).__name__
    if source in ("Rngs", "RngStream"):  # Flax's, which is not imported here
        raise TypeError(
            f"dropout_rng must be one jax.random key, got an nnx.{source}: rngs.dropout() draws one"
        )
    key = _array("dropout_rng", rng)
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not (typed and key.ndim == 0) and not (key.dtype == jnp.uint32 and key.ndim == 1):
        hint = ": jax.random.key(seed) makes one" if key.ndim == 0 else ""
        raise TypeError(
            f"dropout_rng must be one jax.random key, got {key.dtype}{list(key.shape)}{hint}"
        )
    return jnp.tile(dropout.seeds(key, 1), (batch, 1)) if shared else dropout.seeds(key, batch)


def _window(window: object) -> tuple[int | None, int | None] | None:
    if window is None:
        return None
    sides = (window, window) if isinstance(window, int | np.integer) else window
    if isinstance(sides, tuple | list) and len(sides) == 2 and all(map(_is_window_side, sides)):
        left, right = sides
        return None if left is None else int(left), None if right is None else int(right)
    for side in jax.tree.leaves(window):
        if isinstance(side, jax.core.Tracer):
            raise TypeError(
                f"local_window_size must be known when traced, got {_kind(side)}{_with_cond(side)}"
            )
    raise ValueError(
        "local_window_size must be an int or a (left, right) pair, each at least 0, "
        f"or None for no bound on that side; got {window!r}"
    )


def _is_window_side(side: object) -> bool:
    if side is None:
        return True
    return isinstance(side, int | np.integer) and not isinstance(side, bool) and int(side) >= 0


def _flag(name: str, x: object) -> bool:
    """What is True or False by now as one of them: 1, a NumPy bool, an array of one as well."""
    is_number = isinstance(x, bool | int | np.bool_ | np.integer)
    is_array = isinstance(x, np.ndarray | Array) and x.ndim == 0 and _is_integer(x.dtype)
    if isinstance(x, jax.core.Tracer) or not (is_number or is_array):
        raise TypeError(f"{name} must be True or False when traced, got {_kind(x)}{_with_cond(x)}")
    return bool(x)


def _is_integer(dtype: DTypeLike) -> bool:
    """Of booleans too."""
    return jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.bool_)


def _array_scale(scale: ArrayLike | None, dtype: np.dtype[np.generic]) -> Array | None:
    """Scale as an operand (1,), if it is a JAX array; numbers of Python's or NumPy's are not."""
    if scale is not None and hasattr(scale, "__jax_array__"):  # a parameter of Flax, say
        scale = _array("scale", scale)
    if isinstance(scale, np.ndarray | Array) and scale.size != 1:
        raise ValueError(
            f"scale must be one number, got shape {scale.shape}; multiply query by one that differs"
        )
    if not isinstance(scale, Array):
        return None
    if not (jnp.issubdtype(scale.dtype, jnp.floating) or jnp.issubdtype(scale.dtype, jnp.integer)):
        raise TypeError(f"scale must be a real number, got {scale.dtype}")
    return scale.reshape(1).astype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _static_scale(scale: object, head_dim: int) -> float:
    if scale is None:
        return 1 / math.sqrt(head_dim)
    return _number("scale", scale.reshape(()) if isinstance(scale, np.ndarray) else scale)


def _soft_cap(cap: float | None) -> float | None:
    if cap is None:
        return None
    number = _number("logits_soft_cap", cap)
    if number <= 0:
        raise ValueError(f"logits_soft_cap must be positive, or None for no cap, got {number}")
    return number


def _number(name: str, x: object) -> float:
    if isinstance(x, jax.core.Tracer | bool):
        raise TypeError(f"{name} must be a number known when traced, got {_kind(x)}{_with_cond(x)}")
    try:
        number = float(x)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {_kind(x)}") from None
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def _precision(query: Array) -> str | None:
    """jax's default if the user set it, else full precision for float32.

    Read once, so that a backward pass traced later, outside the user's context, agrees.
    """
    default: str | None = jax.config.jax_default_matmul_precision
    return default or (None if query.dtype.itemsize < 4 else "highest")


def _shape4(x: Array | None) -> Shape4 | None:
    if x is None:
        return None
    b, n, t, s = x.shape
    return b, n, t, s


def _kind(x: object) -> str:
    if isinstance(x, jax.core.Tracer):
        return "a traced array"
    if isinstance(x, np.ndarray | Array) and (x.ndim or not jnp.issubdtype(x.dtype, np.number)):
        return f"an array, {x.dtype}{list(x.shape)}"
    return f"{x!r} ({type(x).__name__})"


def _with_cond(x: object) -> str:
    traced = isinstance(x, jax.core.Tracer)
    return "; where layers of a scan differ in it, jax.lax.cond chooses the call" if traced else ""
