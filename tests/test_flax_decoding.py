"""Decoding with Flax's cache through `attention_fn`: Flax's numbers, or a refusal that helps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jattn
from jattn.flax import attention_fn
from tests import tolerance
from tests.backends import quick_jit

B, T, FEATURES, HEADS = 2, 6, 16, 4
X = jnp.asarray(np.random.default_rng(0).standard_normal((B, T, FEATURES)), jnp.float32)
# Of the caller's own, for each step: the newest key is hidden from a row at some of them.
MASKS = jnp.asarray(np.random.default_rng(1).random((T, B, 1, 1, T)) < 0.7).at[..., 0].set(True)
IDS = jnp.ones((B, T), int)
SINKS = jnp.linspace(-1.0, 1.0, HEADS)


def formula(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    *,
    scale: float = 0.5,
    cap: float | None = None,
    sinks: jax.Array | None = None,
    key_lengths: tuple[int, ...] | None = None,
    **rest: Any,
) -> jax.Array:
    """Flax's attention with what Flax has not, by the formula."""
    logits = scale * jnp.einsum("bqhd,bkhd->bhqk", query, key, precision="highest")
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    seen = jnp.ones(logits.shape, bool) if mask is None else mask.astype(bool)
    if key_lengths is not None:
        lengths = jnp.asarray(key_lengths)[:, None, None, None]
        seen &= jnp.arange(key.shape[1])[None, None, None] < lengths
    weights = jnp.where(seen, jnp.exp(logits), 0)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(sinks)[None, :, None, None]
    return jnp.einsum("bhqk,bkhd->bqhd", weights / total, value, precision="highest")


def decode_nnx(function: Callable[..., Any] | None, masks: Any, **call: Any) -> jax.Array:
    options = {} if function is None else {"attention_fn": function}
    model = nnx.MultiHeadAttention(
        num_heads=HEADS, in_features=FEATURES, decode=True, rngs=nnx.Rngs(0), **options
    )
    model.init_cache(X.shape)
    graph, state = nnx.split(model)

    def step(state: Any, given: Any) -> Any:
        x, mask = given
        model = nnx.merge(graph, state)
        out = model(x[:, None], mask=mask, **call)
        return nnx.state(model), out[:, 0]

    return quick_jit(lambda x: jax.lax.scan(step, state, (x.swapaxes(0, 1), masks))[1])(X)


def decode_linen(function: Callable[..., Any] | None, masks: Any) -> jax.Array:
    options = {} if function is None else {"attention_fn": function}
    model = linen.MultiHeadDotProductAttention(num_heads=HEADS, decode=True, **options)
    plain = linen.MultiHeadDotProductAttention(num_heads=HEADS, decode=True)
    variables = plain.init(jax.random.key(0), X)

    def step(cache: Any, given: Any) -> Any:
        x, mask = given
        variables_ = {"params": variables["params"], "cache": cache}
        out, updated = model.apply(variables_, x[:, None], mask=mask, mutable=["cache"])
        return updated["cache"], out[:, 0]

    scanned = partial(jax.lax.scan, step, variables["cache"])
    return quick_jit(lambda x: scanned((x.swapaxes(0, 1), masks))[1])(X)


DECODE: dict[str, Callable[..., jax.Array]] = {"nnx": decode_nnx, "linen": decode_linen}
both = pytest.mark.parametrize("flavour", DECODE)
own_mask = pytest.mark.parametrize("masks", [None, MASKS], ids=["no_mask", "own_mask"])


def close(found: Any, expected: Any) -> None:
    # Two programs: products with a weight before and after, logits, and a row's output.
    largest = float(np.abs(expected).max())
    allowed = tolerance.of_sums(2 * FEATURES + FEATURES // HEADS + T, 1 + largest)
    np.testing.assert_allclose(found, expected, rtol=0, atol=allowed)


@both
@own_mask
def test_a_causal_layer_decodes_as_flax_does(flavour: str, masks: Any) -> None:
    expected = DECODE[flavour](None, masks)
    close(DECODE[flavour](attention_fn(is_causal=True), masks), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"causal_alignment": "bottom_right"},
        {"local_window_size": (T - 1, 0)},  # reaches the whole cache from anywhere in it
        {"local_window_size": (None, 0)},
        {"implementation": ("flash", "eager")},
        {"query_offset": T - 1},
    ],
    ids=str,
)
def test_what_needs_no_position_is_taken(options: dict[str, Any]) -> None:
    function = attention_fn(is_causal=True, **options)
    close(decode_nnx(function, MASKS), decode_nnx(None, MASKS))


@both
def test_options_that_flax_has_not_are_those_of_the_formula(flavour: str) -> None:
    ours = attention_fn(
        is_causal=True, logits_soft_cap=0.7, sinks=SINKS, scale=0.8,
        key_value_seq_lengths=jnp.asarray([T, 3]),
    )  # fmt: skip
    theirs = partial(formula, cap=0.7, sinks=SINKS, scale=0.8, key_lengths=(T, 3))
    close(DECODE[flavour](ours, MASKS), DECODE[flavour](theirs, MASKS))


@both
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"is_causal": True, "local_window_size": (2, 0)}, "(jnp.arange(6) >= index - 2)"),
        ({"local_window_size": 2}, "local_window_size"),
        ({"is_causal": True, "local_window_size": (2, 0), "causal_alignment": "bottom_right"},
         "local_window_size"),
        ({"query_seq_lengths": jnp.asarray([T, 3])}, "query_seq_lengths (leave it out"),
        ({"query_segment_ids": IDS, "key_value_segment_ids": IDS}, "a mask of the segments"),
    ],
    ids=["window", "both_sides", "bottom_right", "query_lengths", "segments"],
)  # fmt: skip
def test_what_needs_the_position_is_refused(
    flavour: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(jattn.UnsupportedAttentionError) as caught:
        DECODE[flavour](attention_fn(**options), None)
    assert words in str(caught.value)


def test_causal_in_the_call_is_refused_at_the_cache() -> None:
    with pytest.raises(jattn.UnsupportedAttentionError, match="leave it out of the module's call"):
        decode_nnx(attention_fn(), None, is_causal=True)


def test_the_mask_that_the_refusal_names_is_the_window() -> None:
    window = jnp.stack([(jnp.arange(T) >= index - 2)[None, None, None] for index in range(T)])
    found = decode_nnx(attention_fn(is_causal=True), jnp.broadcast_to(window, (T, B, 1, 1, T)))
    windowed = attention_fn(is_causal=True, local_window_size=(2, 0))
    layer = nnx.MultiHeadAttention(
        HEADS, FEATURES, decode=False, rngs=nnx.Rngs(0), attention_fn=windowed
    )
    close(found.swapaxes(0, 1), layer(X))


def test_one_query_elsewhere_is_as_ever() -> None:
    q, k = (jnp.asarray(np.random.default_rng(n).standard_normal((B, n, HEADS, 8))) for n in (1, 5))
    mask = jnp.ones((B, 1, 1, 5)).at[0, ..., 3:].set(0)
    call = partial(nnx.dot_product_attention, q, k, k)
    close(attention_fn()(q, k, k, mask=mask), call(mask=mask))
    first, second = (jnp.arange(5)[None, None, None] < n for n in (1, 2))
    close(attention_fn(is_causal=True)(q, k, k), call(mask=first))
    at_first = attention_fn(local_window_size=(1, 1), query_offset=0)
    close(at_first(q, k, k, mask=mask), call(mask=mask.astype(bool) & second))


class TestBatches:
    q = jnp.ones((2, 3, T, HEADS, 4))

    @pytest.mark.parametrize("batch", [(3, 2), (6,), (2,), (1, 3), (2, 1, 3)], ids=str)
    def test_those_of_keys_and_values_are_the_queries(self, batch: tuple[int, ...]) -> None:
        x = jnp.ones((*batch, T, HEADS, 4))
        words = rf"'s batch dimensions .*{batch[0]}.* must be query's \(2, 3\)"
        with pytest.raises(ValueError, match="key" + words):
            attention_fn()(self.q, x, x)
        with pytest.raises(ValueError, match="value" + words):
            attention_fn()(self.q, self.q, x)

    def test_those_of_masks_and_biases_broadcast_to_the_queries(self) -> None:
        for shape in [(3, 2), (6,), (2,), (2, 1, 3)]:
            mask = jnp.ones((*shape, 1, T, T), bool)
            with pytest.raises(ValueError, match=r"mask's batch .* must broadcast to .*\(2, 3\)"):
                attention_fn()(self.q, self.q, self.q, mask=mask)
            with pytest.raises(ValueError, match=r"bias's batch .* must broadcast to .*\(2, 3\)"):
                attention_fn()(self.q, self.q, self.q, bias=mask.astype(jnp.float32))

    def test_heads_and_lengths_there_must_be(self) -> None:
        x = jnp.ones((T, 4))
        with pytest.raises(ValueError, match=r"query must have shape \(batch"):
            attention_fn()(x, x, x)
