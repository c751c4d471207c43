"""Memory: nothing of size T x S, growth linear in T, and blocks nobody sees are not visited."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests.backends import arrays_in, largest_array
from tests.cases import first, thorough

MIB = 2**20


def shaped(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def gradient(*, residual: bool = False, **options: Any) -> Any:
    """The gradient with respect to q, k, v and, where it is given, the bias."""

    def loss(floats: dict[str, Any], rest: dict[str, Any]) -> jax.Array:
        result = jattn.memory_efficient_attention(
            **floats, **rest, **options, return_residual=residual
        )
        return sum(x.astype(jnp.float32).sum() for x in jax.tree.leaves(result))

    return jax.grad(loss)


def temp_bytes(function: Any, *shapes: Any) -> int:
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


CALLS: dict[str, Any] = {
    "full": ({}, {}),
    "causal": ({}, {"is_causal": True}),
    "window": ({}, {"is_causal": True, "local_window_size": (256, 0)}),
    "bias_keys": ({"bias": "1N1S"}, {"is_causal": True}),
    "bias_heads": ({"bias": "1N11"}, {"logits_soft_cap": 5.0}),
    "lengths": ({"query_seq_lengths": "B", "key_value_seq_lengths": "B"}, {}),
    "segments": ({"query_segment_ids": "BT", "key_value_segment_ids": "BS"}, {"is_causal": True}),
    "mask_keys_sinks_dropout": (
        {"mask": "B11S", "sinks": "N", "dropout_rng": ""},
        {"dropout_rate": 0.1, "residual": True},
    ),
}


ORDINARY = ("bias_keys", "segments", "mask_keys_sinks_dropout")


def arguments(
    operands: dict[str, str], *, length: int, batch: int = 1, heads: int = 2, kv_heads: int = 1
) -> tuple[dict[str, Any], dict[str, Any]]:
    sizes = {"B": batch, "N": heads, "K": kv_heads, "T": length, "S": length, "H": 16, "1": 1}

    def of(form: str, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return shaped(*(sizes[letter] for letter in form), dtype=dtype)

    floats = {"query": of("BTNH"), "key": of("BSKH"), "value": of("BSKH")}
    rest = {}
    for name, form in operands.items():
        if name in ("bias", "sinks"):
            floats[name] = of(form)
        elif name == "dropout_rng":
            rest[name] = jax.eval_shape(lambda: jax.random.key(0))
        else:
            rest[name] = of(form, jnp.bool_ if name == "mask" else jnp.int32)
    return floats, rest


EVERY = [*ORDINARY, *thorough(*((name,) for name in CALLS if name not in ORDINARY))]


@pytest.mark.parametrize("name", EVERY)
def test_temporary_memory_of_the_gradient_is_linear(name: str) -> None:
    operands, options = CALLS[name]
    sizes = [
        temp_bytes(gradient(**options), *arguments(operands, length=length))
        for length in (2048, 8192)
    ]
    assert sizes[1] <= 2.1**2 * sizes[0]
    assert sizes[1] < 8192**2 * 4 / 4, "a quarter of one head's logits"


@pytest.mark.parametrize("causal", [False, True])
def test_the_gradient_at_4096_takes_at_most_160_mib(causal: bool) -> None:
    x = shaped(1, 4096, 8, 64)
    floats = {"query": x, "key": x, "value": x}
    assert temp_bytes(gradient(is_causal=causal), floats, {}) <= 160 * MIB


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("differentiate", first(1, [True, False]))
def test_no_array_of_queries_by_keys_exists(name: str, differentiate: bool) -> None:
    operands, options = CALLS[name]
    length = 512
    chunks = {"query_chunk_size": 32, "key_chunk_size": 64}
    floats, rest = arguments(operands, length=length)
    function = gradient(**options, **chunks)
    if not differentiate:
        options = {n: x for n, x in options.items() if n != "residual"}
        call = partial(jattn.memory_efficient_attention, **options, **chunks)

        def function(floats: dict[str, Any], rest: dict[str, Any]) -> Any:
            return call(**floats, **rest)

    assert largest_array(function, floats, rest) < length * length / 8
    eager = partial(jattn.eager_attention, **{n: x for n, x in options.items() if n != "residual"})
    assert largest_array(lambda f, r: eager(**f, **r), floats, rest) >= length * length


@pytest.mark.parametrize("operand", ["bias", "mask"])
@pytest.mark.parametrize("form", ["11TS", "B1TS", "1NTS"])
def test_a_bias_or_mask_is_never_broadcast_up(operand: str, form: str) -> None:
    length, batch, heads = 512, 3, 5
    floats, rest = arguments({operand: form}, length=length, batch=batch, heads=heads)
    chunks = {"query_chunk_size": 32, "key_chunk_size": 32}
    own = (floats | rest)[operand].size
    others = [
        array.size for array in arrays_in(gradient(**chunks), floats, rest) if array.size != own
    ]
    assert max(others) < length * length
    assert own < batch * heads * length * length


class TestSkipping:
    """A block that no query of a chunk may see is not computed: NaN there would spread."""

    length, chunk = 64, 8

    def visited(self, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """Which key blocks each query chunk computes, in forward and in backward.

        A NaN value times a weight of zero is NaN, so it shows in the rows that multiplied it.
        """
        count = self.length // self.chunk
        x = jnp.asarray(
            np.random.default_rng(0).standard_normal((1, self.length, 1, 4)), jnp.float32
        )
        attend = partial(
            jattn.memory_efficient_attention,
            **options,
            query_chunk_size=self.chunk,
            key_chunk_size=self.chunk,
        )

        @jax.jit
        def forward(value: jax.Array) -> jax.Array:
            return attend(x, x, value)

        @jax.jit
        def backward(value: jax.Array) -> jax.Array:
            _, vjp = jax.vjp(lambda q: attend(q, x, value), x)
            return vjp(x)[0]

        found = []
        for function in (forward, backward):
            columns = []
            for j in range(count):
                poisoned = x.at[:, j * self.chunk : (j + 1) * self.chunk].set(jnp.nan)
                rows = np.isnan(function(poisoned)).reshape(count, -1)
                columns.append(rows.any(axis=1))
            found.append(np.stack(columns, axis=1))
        return found[0], found[1]

    def needed(self, seen: np.ndarray) -> np.ndarray:
        count = self.length // self.chunk
        return seen.reshape(count, self.chunk, count, self.chunk).any(axis=(1, 3))

    @pytest.mark.parametrize(
        "name", first(3, ["all", "window", "segments", "causal", "bottom_right", "lengths"])
    )
    def test_only_blocks_that_hold_a_visible_pair_are_computed(self, name: str) -> None:
        i, k = np.arange(self.length)[:, None], np.arange(self.length)[None, :]
        ids = np.repeat([3, 7, 8, 20], [20, 11, 30, 3])
        segments = {
            "query_segment_ids": jnp.asarray(ids[None], jnp.int32),
            "key_value_segment_ids": jnp.asarray(ids[None], jnp.int32),
        }
        lengths = {
            "query_seq_lengths": jnp.array([41], jnp.int32),
            "key_value_seq_lengths": jnp.array([19], jnp.int32),
        }
        band, alike = (k <= i) & (k >= i - 12), ids[:, None] == ids[None, :]
        short = (k < 19) & (i < 41)
        options, constraints = {
            "causal": ({"is_causal": True}, [k <= i]),
            "bottom_right": ({"is_causal": True, "causal_alignment": "bottom_right"}, [k <= i]),
            "window": ({"local_window_size": (9, 2)}, [(k >= i - 9) & (k <= i + 2)]),
            "lengths": (lengths, [short]),
            "segments": (segments, [alike]),
            "all": (
                {"is_causal": True, "local_window_size": (12, 0), **segments, **lengths},
                [band & short, alike],
            ),
        }[name]
        needed = self.needed(np.logical_and.reduce(constraints))
        allowed = np.logical_and.reduce([self.needed(seen) for seen in constraints])
        assert not allowed.all()
        for visited in self.visited(**options):
            assert (visited >= needed).all()
            assert (visited <= allowed).all()
