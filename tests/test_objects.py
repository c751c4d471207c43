"""What users hold of jattn compares, hashes, copies and pickles by what it is."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jattn
from jattn.flax import AttentionFn, attention_fn
from tests import tolerance

OPTIONS: dict[str, Any] = {
    "none": dict,
    "plain": lambda: {"is_causal": True, "local_window_size": (3, 0), "logits_soft_cap": 5.0},
    "named": lambda: {"implementation": ["flash", "memory_efficient"], "scale": 0.25},
    "arrays": lambda: {
        "sinks": jnp.arange(2.0),
        "key_value_seq_lengths": np.asarray([3, 4]),
        "query_offset": jnp.asarray([1, 0]),
    },
}
every = pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS)


@every
def test_equal_options_make_equal_functions(make: Any) -> None:
    one, other = attention_fn(**make()), attention_fn(**make())
    assert one == other
    assert hash(one) == hash(other)
    for again in (copy.copy(one), copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert again == one
        assert hash(again) == hash(one)
    others = [attention_fn(**OPTIONS[name]()) for name in OPTIONS]
    assert sum(one == x for x in others) == 1


def test_one_option_has_one_form() -> None:
    assert attention_fn(is_causal=False, scale=None, query_seq_lengths=None) == attention_fn()
    assert attention_fn(is_causal=np.True_) == attention_fn(is_causal=True)
    assert repr(attention_fn(is_causal=np.True_)) == repr(attention_fn(is_causal=True))
    windows = [(np.int64(3), 0), [3, 0], (3, np.int32(0))]
    made = [attention_fn(local_window_size=window) for window in windows]  # type: ignore[arg-type]
    assert len(set(made)) == len(set(map(repr, made))) == 1
    assert attention_fn(implementation=["eager"]) == attention_fn(implementation=("eager",))
    assert repr(attention_fn(is_causal=True, scale=0.5)) == (
        "attention_fn(is_causal=True, scale=0.5)"
    )


def test_arrays_differ_by_their_elements_and_are_kept_as_they_were() -> None:
    lengths = np.asarray([3, 4])
    one = attention_fn(key_value_seq_lengths=lengths)
    assert one != attention_fn(key_value_seq_lengths=np.asarray([3, 5]))
    assert one != attention_fn(key_value_seq_lengths=np.asarray([3, 4], np.int8))
    lengths[0] = 1
    assert one == attention_fn(key_value_seq_lengths=np.asarray([3, 4]))


def test_learned_sinks_keep_their_gradient() -> None:
    x = jnp.ones((1, 4, 2, 8))

    def total(sinks: jax.Array) -> jax.Array:
        return attention_fn(sinks=sinks)(x, x, x).sum()

    # The weights of four equal keys of logit sqrt(8) beside the sink's are a share p of 1.
    share = 4 * np.exp(np.sqrt(8)) / (4 * np.exp(np.sqrt(8)) + 1)
    exact = np.full(2, 4 * 8 * -share * (1 - share))
    found = jax.grad(total)(jnp.zeros(2))
    np.testing.assert_allclose(found, exact, rtol=tolerance.of_sums(4 * 8 + 8, 1.0))


def test_the_signature_has_every_keyword_of_flax() -> None:
    shown = set(inspect.signature(attention_fn()).parameters)
    ours = {"query", "key", "value", "bias", "mask", "is_causal", "input_positions"}
    assert ours <= shown
    for theirs in (linen.dot_product_attention, nnx.dot_product_attention):
        assert set(inspect.signature(theirs).parameters) - {"promote_dtype"} <= shown


def nnx_layer(**options: Any) -> nnx.MultiHeadAttention:
    made = attention_fn(**options)
    return nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0), attention_fn=made)


class TestModels:
    x = jnp.ones((1, 4, 8))

    def test_of_nnx_built_alike_share_one_trace(self) -> None:
        traces = []

        @nnx.jit
        def run(model: nnx.MultiHeadAttention, x: jax.Array) -> jax.Array:
            traces.append(model)
            return model(x)

        outs = [run(nnx_layer(is_causal=True, sinks=jnp.zeros(2)), self.x) for _ in range(3)]
        assert len(traces) == 1
        np.testing.assert_array_equal(outs[0], outs[2])
        run(nnx_layer(is_causal=True, sinks=jnp.ones(2)), self.x)
        assert len(traces) == 2

    def test_of_nnx_go_through_split_merge_and_map(self) -> None:
        one, other = nnx_layer(is_causal=True), nnx_layer(is_causal=True)
        both = jax.tree.map(lambda a, b: a + b, one, other)
        np.testing.assert_allclose(both.query.kernel[...], 2 * one.query.kernel[...])
        graph, state = nnx.split(one)
        assert graph == nnx.split(other)[0]
        assert nnx.merge(graph, state).attention_fn == one.attention_fn
        assert copy.deepcopy(one).attention_fn == one.attention_fn
        assert pickle.loads(pickle.dumps(graph)) == graph

    def test_of_linen_built_alike_are_equal_and_share_one_trace(self) -> None:
        def made() -> linen.Module:
            return linen.MultiHeadDotProductAttention(
                num_heads=2, attention_fn=attention_fn(is_causal=True)
            )

        assert made() == made()
        assert hash(made()) == hash(made())
        variables = made().init(jax.random.key(0), self.x)
        traces = []

        def run(model: linen.Module, variables: Any, x: jax.Array) -> Any:
            traces.append(model)
            return model.apply(variables, x)

        run = jax.jit(run, static_argnums=0)
        for _ in range(3):
            run(made(), variables, self.x)
        assert len(traces) == 1


class TestOptionsAreCheckedWhenMade:
    @pytest.mark.parametrize(
        ("error", "words", "options"),
        [
            (ValueError, "implementation", {"implementation": "xla"}),
            (ValueError, "causal_alignment", {"causal_alignment": "centre"}),
            (ValueError, "local_window_size", {"local_window_size": -1}),
            (ValueError, "local_window_size", {"local_window_size": ((1, 2), 3)}),
            (ValueError, "logits_soft_cap", {"logits_soft_cap": 0.0}),
            (TypeError, "is_causal", {"is_causal": "yes"}),
            (TypeError, "scale", {"scale": "auto"}),
            (TypeError, "here it is is_causal", {"causal": True}),
            (TypeError, "attention_fn.. got an unexpected", {"is_casual": True}),
            (TypeError, "for the Flax module", {"dropout_rate": 0.1}),
            (TypeError, "for the Flax module", {"deterministic": True}),
            (TypeError, "return_residual", {"return_residual": True}),
            (TypeError, "sinks", {"sinks": jnp.zeros(2, int)}),
            (ValueError, "sinks", {"sinks": jnp.zeros((1, 2))}),
            (TypeError, "key_value_seq_lengths", {"key_value_seq_lengths": jnp.ones(2)}),
            (ValueError, "key_value_segment_ids", {"query_segment_ids": jnp.ones((2, 3), int)}),
        ],
        ids=str,
    )
    def test_not_when_called(
        self, error: type[Exception], words: str, options: dict[str, Any]
    ) -> None:
        with pytest.raises(error, match=words):
            attention_fn(**options)

    def test_what_is_right_is_taken(self) -> None:
        ids = jnp.ones((3, 5), int)
        made = attention_fn(
            query_segment_ids=ids, key_value_segment_ids=ids[:, :4], sinks=jnp.zeros(4),
            query_seq_lengths=jnp.ones(3, int), local_window_size=(None, 3),
        )  # fmt: skip
        assert isinstance(made, AttentionFn)

    def test_no_device_is_asked_for(self) -> None:
        code = (
            "import jattn.flax; from jax._src import xla_bridge;"
            "jattn.flax.attention_fn(is_causal=True, local_window_size=3);"
            "assert not xla_bridge.backends_are_initialized()"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


class TestReports:
    def test_an_explanation(self) -> None:
        x = jax.ShapeDtypeStruct((1, 8, 2, 16), jnp.float32)
        one, other = (jattn.explain(x, x, x, is_causal=True) for _ in range(2))
        assert one == other
        assert hash(one) == hash(other)
        for again in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            assert again == one
            assert again.reports[0] == one.reports[0]
            assert str(again) == str(one)

    def test_a_refusal(self) -> None:
        x = jnp.ones((1, 8, 2, 16))
        with pytest.raises(jattn.UnsupportedAttentionError) as caught:
            jattn.dot_product_attention(
                x, x, x, implementation=("flash", "cudnn"), sinks=x[0, 0, :, 0]
            )
        again = pickle.loads(pickle.dumps(caught.value))
        assert type(again) is jattn.UnsupportedAttentionError
        assert again.args == caught.value.args


@pytest.mark.parametrize(
    "make",
    [lambda: jattn.attention_backend("eager"), lambda: jattn.deterministic_gradients()],
    ids=["attention_backend", "deterministic_gradients"],
)
def test_a_context_decorates_a_function_called_often(make: Any) -> None:
    from jattn.backends import table
    from jattn.call.determinism import is_deterministic

    @make()
    def inside() -> tuple[Any, bool]:
        return table.candidates(None)[0].name, is_deterministic()

    outside = (table.candidates(None)[0].name, is_deterministic())
    first = inside()
    assert first != outside
    assert inside() == first
    assert (table.candidates(None)[0].name, is_deterministic()) == outside
