"""What is written for another library gets an error that says how it is written here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn.backends import table
from jattn.backends.names import nearest
from jattn.call import keywords

B, T, S, N, H = 2, 4, 5, 3, 8
Q, K = jnp.ones((B, T, N, H)), jnp.ones((B, S, N, H))
CALLS: dict[str, Callable[..., Any]] = {
    "dot_product_attention": jattn.dot_product_attention,
    "flash_attention": jattn.flash_attention,
    "memory_efficient_attention": jattn.memory_efficient_attention,
    "eager_attention": jattn.eager_attention,
    "explain": jattn.explain,
}


def message(error: type[Exception], call: Callable[..., Any], **arguments: Any) -> str:
    with pytest.raises(error) as caught:
        call(**arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("function", CALLS)
@pytest.mark.parametrize(
    ("theirs", "ours"),
    {
        "causal": "here it is is_causal",
        "window_size": "here it is local_window_size=(left, right), with None for an open side",
        "softcap": "here it is logits_soft_cap",
        "softmax_scale": "here it is scale",
        "attn_mask": "here it is mask where it is bool (True: may attend), bias where",
        "sliding_window": "here it is local_window_size=(w - 1, 0)",
        "num_key_value_groups": "fewer key heads than query heads",
        "key_padding_mask": "~key_padding_mask[:, None, None, :]",
        "cu_seqlens_q": "query_segment_ids",
        "dropout_p": "dropout_rate",
        "need_weights": "never stored",
        "deterministic": "jattn.deterministic_gradients()",
        "is_casual": "did you mean 'is_causal'?",
        "masks_": "here it is",
    }.items(),
)
def test_an_unknown_keyword_is_named_as_it_is_here(function: str, theirs: str, ours: str) -> None:
    call = partial(CALLS[function], Q, K, K)
    text = message(TypeError, call, **{theirs: 1})
    assert text.startswith(f"{function}() got an unexpected keyword argument {theirs!r}; ")
    assert ours in text


@pytest.mark.parametrize("function", CALLS)
def test_what_is_like_nothing_is_left_to_pythons_own_words(function: str) -> None:
    text = message(TypeError, partial(CALLS[function], Q, K, K), colour=1)
    assert text == f"{function}() got an unexpected keyword argument 'colour'"


def test_every_answer_names_an_argument_that_there_is() -> None:
    parameters = inspect.signature(jattn.dot_product_attention).parameters
    for name, advice in keywords._ADVICE.items():
        assert name not in ("query", "key", "value", "bias", "mask")
        if advice.startswith("here it is "):
            word = advice.removeprefix("here it is ").split()[0].split("=")[0].rstrip(",")
            chunks = ("query_chunk_size", "key_chunk_size", "query_offset")
            assert word in parameters or word in chunks, advice


@pytest.mark.parametrize("function", CALLS)
def test_the_signature_shows_every_argument_and_nothing_else(function: str) -> None:
    shown = inspect.signature(CALLS[function]).parameters
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in shown.values())
    options = keywords.KNOWN | {"query", "key", "value", "bias", "mask"}
    assert options <= set(shown)
    takes = function in ("dot_product_attention", "explain")
    assert ("implementation" in shown) == takes


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("xla", ("'memory_efficient' runs in XLA", "'eager' is jax.nn's quadratic formula")),
        ("XLA", ("'memory_efficient' runs in XLA",)),
        ("flash_attention", ("'flash'",)),
        ("flash_attention_2", ("'flash'",)),
        ("cuDNN", ("did you mean 'cudnn'?",)),
        ("sdpa", ("None takes the best",)),
        ("triton", ("'flash' has the Pallas kernels",)),
        ("mosaic", ("'flash' has the Pallas kernels",)),
        ("math", ("'eager' is the formula",)),
        ("mem_efficient", ("'memory_efficient'",)),
        ("memory-efficient", ("did you mean 'memory_efficient'?",)),
        ("memmory_eficient", ("did you mean 'memory_efficient'?",)),
        ("eagre", ("did you mean 'eager'?",)),
        ("flahs", ("did you mean 'flash'?",)),
    ],
)
def test_a_name_of_no_backend_is_answered_with_the_nearest(
    name: str, words: tuple[str, ...]
) -> None:
    call = partial(jattn.dot_product_attention, Q, K, K)
    for given in (name, ("eager", name)):
        text = message(ValueError, call, implementation=given)
        assert text.startswith("implementation must be one of 'flash', 'cudnn', ")
        assert repr(name) in text
        assert all(word in text for word in words), text


def test_a_name_like_nothing_has_no_answer() -> None:
    assert nearest("qwertz", table.NAMES) is None
    assert nearest(3, table.NAMES) is None


def test_heads_that_look_like_lengths_are_told_the_order_of_axes() -> None:
    query, key = jnp.ones((2, 8, 4, 16)), jnp.ones((2, 8, 12, 16))  # (B, N, T, H)
    text = message(ValueError, partial(jattn.dot_product_attention, query, key, key))
    assert text.startswith("query heads (4) must be a multiple of key heads (12)")
    assert text.endswith("read as (B, T, N, H), not (B, N, T, H)")


class TestMasks:
    call = staticmethod(partial(jattn.dot_product_attention, Q, K, K))

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int32])
    def test_numbers_have_two_ways_out(self, dtype: Any) -> None:
        text = message(TypeError, self.call, mask=jnp.ones((T, S), dtype))
        assert jnp.dtype(dtype).name in text
        assert "mask.astype(bool)" in text
        assert "pass it as bias" in text

    @pytest.mark.parametrize(
        ("shape", "way"),
        [
            ((B, S), "[:, None, None, :]"),
            ((B, T, S), "[:, None]"),
            ((B, 1, S), "[:, None]"),
            ((B, T), "[:, None, :, None]"),
            ((B * N, T, S), ".reshape(2, 3, 4, 5)"),
            ((S, T), ".T"),
        ],
    )
    def test_a_shape_that_lacks_axes_comes_with_the_index_that_adds_them(
        self, shape: tuple[int, ...], way: str
    ) -> None:
        mask = jnp.asarray(np.random.default_rng(0).random(shape) < 0.7)
        for name, given in {"mask": mask, "bias": mask.astype(jnp.float32)}.items():
            text = message(ValueError, self.call, **{name: given})
            assert str(shape) in text
            assert text.endswith(name + way)
            indexed = eval(f"given{way}", {"given": given})
            jax.eval_shape(lambda x, name=name: self.call(**{name: x}), indexed)

    def test_with_as_many_queries_as_keys_two_axes_are_a_padding_mask(self) -> None:
        call = partial(jattn.dot_product_attention, K, K, K)
        text = message(ValueError, call, mask=jnp.ones((B, S), bool))
        assert text.endswith("mask[:, None, None, :]")


@pytest.mark.parametrize("given", ["rngs", "stream"])
def test_flaxs_streams_are_to_be_drawn_from(given: str) -> None:
    rngs = nnx.Rngs(0)
    call = partial(jattn.dot_product_attention, Q, K, K, dropout_rate=0.5)
    text = message(TypeError, call, dropout_rng={"rngs": rngs, "stream": rngs.dropout}[given])
    assert "rngs.dropout()" in text
    jax.eval_shape(lambda key: call(dropout_rng=key), rngs.dropout())


def test_a_seed_is_to_be_made_a_key() -> None:
    call = partial(jattn.dot_product_attention, Q, K, K, dropout_rate=0.5)
    assert "jax.random.key(seed)" in message(TypeError, call, dropout_rng=3)


def test_what_layers_of_a_scan_differ_in_is_for_cond_to_choose() -> None:
    def of_layers(name: str, values: Any, option: Callable[[Any], Any]) -> None:
        def layer(x: jax.Array, one: Any) -> tuple[jax.Array, None]:
            return jattn.dot_product_attention(x, x, x, **{name: option(one)}), None

        with pytest.raises(TypeError, match=rf"{name} must be .* when traced.*jax\.lax\.cond"):
            jax.lax.scan(layer, Q, values)

    windows = jnp.asarray([1, 3])
    of_layers("local_window_size", windows, lambda w: w)
    of_layers("local_window_size", windows, lambda w: (w, 0))
    of_layers("is_causal", windows > 1, lambda x: x)
    of_layers("logits_soft_cap", windows.astype(jnp.float32), lambda x: x)

    def chosen(x: jax.Array, is_local: jax.Array) -> tuple[jax.Array, None]:
        attend = partial(jattn.dot_product_attention, is_causal=True)
        local = partial(attend, local_window_size=(1, 0))
        return jax.lax.cond(is_local, local, attend, x, x, x), None

    jax.eval_shape(partial(jax.lax.scan, chosen), Q, windows > 1)
