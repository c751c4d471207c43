"""`jattn.flax.attention_fn` in Flax's modules: equal to Flax's own attention, nothing dropped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.extend.core import jaxprs_in_params

import jattn
from jattn.flax import attention_fn
from tests import tolerance
from tests.backends import quick_jit
from tests.cases import first, thorough
from tests.promotion import of_others

T, S, FEATURES, HEADS = 12, 17, 16, 4
BATCHES = [(), (2,), (2, 3)]


def normal(name: str, *shape: int) -> jax.Array:
    rng = np.random.default_rng(list(name.encode()))
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)


def lengths_mask(batch: tuple[int, ...], size: int) -> jax.Array:
    """Which keys are real, float32 as Flax's helpers want it; at least one is."""
    rng = np.random.default_rng(0)
    return jnp.asarray(np.arange(size) < rng.integers(1, size, (*batch, 1)), jnp.float32)


# Terms that both add in an order of their own: a product with a weight, the logits, a row's
# output, a product with a weight again; and of a gradient, the product that leads to it.
SUMS = 3 * FEATURES + FEATURES // HEADS + S


def close(found: Any, expected: Any, unit: float = tolerance.of_sums(SUMS, 1.0)) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.float64(a), np.float64(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=unit * (1 + np.abs(b).max()))


def with_gradients(function: Callable, *arguments: Any) -> Any:
    """The output, and the gradients of a fixed combination of its elements."""

    @quick_jit
    def run(*arguments: Any) -> Any:
        out, vjp = jax.vjp(function, *arguments)
        return out, vjp(jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype))

    return run(*arguments)


def _jitted(function: Callable, *arguments: Any) -> Any:
    return quick_jit(function)(*arguments)


def run_nnx(
    function: Callable | None,
    x: jax.Array,
    y: jax.Array,
    /,
    *,
    gradients: bool = True,
    make: Any = None,
    dropout_seed: int | None = None,
    **call: Any,
) -> Any:
    """Output, and gradients with respect to parameters and inputs if they are asked for."""
    options = {} if function is None else {"attention_fn": function}
    model = nnx.MultiHeadAttention(
        num_heads=HEADS,
        in_features=FEATURES,
        decode=False,
        rngs=nnx.Rngs(0),
        **options,
        **(make or {}),
    )
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)

    def forward(parameters: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        rngs = {} if dropout_seed is None else {"rngs": nnx.Rngs(dropout_seed)}
        return nnx.merge(graph, parameters, rest)(x, y, **call, **rngs)

    return (with_gradients if gradients else _jitted)(forward, parameters, x, y)


def run_linen(
    function: Callable | None,
    x: jax.Array,
    y: jax.Array,
    /,
    *,
    gradients: bool = True,
    make: Any = None,
    rngs: Any = None,
    **call: Any,
) -> Any:
    options = {} if function is None else {"attention_fn": function}
    model = linen.MultiHeadDotProductAttention(num_heads=HEADS, **options, **(make or {}))
    plain = linen.MultiHeadDotProductAttention(num_heads=HEADS)
    parameters = plain.init(jax.random.key(0), x, y)

    def forward(parameters: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return model.apply(parameters, x, y, rngs=rngs, **call)

    return (with_gradients if gradients else _jitted)(forward, parameters, x, y)


RUN = {"nnx": run_nnx, "linen": run_linen}
HELPERS = {"nnx": nnx, "linen": linen}
both = pytest.mark.parametrize("flavour", RUN)


@pytest.mark.parametrize(
    ("flavour", "batch", "mask"),
    [
        ("linen", (2, 3), "heads"),
        ("nnx", (1, 2, 2), "keys"),
        *thorough(("nnx", (), "none"), ("linen", (2,), "causal"), ("nnx", (2,), "keys_bool")),
        *thorough(
            *product(RUN, [()], ["causal", "keys"]),
            *product(RUN, [(2, 3)], ["none", "keys"]),
        ),
        *thorough(("linen", (), "none"), ("nnx", (2,), "causal"), ("linen", (2,), "keys_bool")),
        *thorough(("nnx", (2, 3), "heads"), ("linen", (1, 2, 2), "keys")),
    ],
    ids=str,
)
def test_values_and_gradients_equal_flax(flavour: str, batch: tuple[int, ...], mask: str) -> None:
    run, helpers = RUN[flavour], HELPERS[flavour]
    keys = T if mask == "causal" else S
    x, y = normal("x", *batch, T, FEATURES), normal("y", *batch, keys, FEATURES)
    real = lengths_mask(batch, keys)
    given = {
        "none": None,
        "causal": helpers.make_causal_mask(jnp.ones((*batch, T))),
        "keys": helpers.make_attention_mask(jnp.ones((*batch, T)), real),
        "keys_bool": helpers.make_attention_mask(jnp.ones((*batch, T)), real, dtype=bool),
        "heads": jnp.asarray(np.random.default_rng(1).random((*batch, HEADS, T, keys)) < 0.8)
        .at[..., 0]
        .set(True),
    }[mask]
    if mask in ("causal", "keys"):
        assert given.dtype == jnp.float32
    close(run(attention_fn(), x, y, mask=given), run(None, x, y, mask=given))


@pytest.mark.parametrize(
    ("flavour", "batch"),
    [("nnx", (2, 3)), *thorough(("nnx", ()), *product(["linen"], [(), (2, 3)]))],
    ids=str,
)
def test_causal_set_on_the_adapter_wins(flavour: str, batch: tuple[int, ...]) -> None:
    run, helpers = RUN[flavour], HELPERS[flavour]
    x = normal("x", *batch, T, FEATURES)
    mask = helpers.make_causal_mask(jnp.ones((*batch, T)))
    expected = run(None, x, x, mask=mask)
    close(run(attention_fn(is_causal=True), x, x), expected)
    padded = helpers.combine_masks(
        mask, helpers.make_attention_mask(jnp.ones((*batch, T)), lengths_mask(batch, T))
    )
    keys = helpers.make_attention_mask(jnp.ones((*batch, T)), lengths_mask(batch, T))
    close(
        run(attention_fn(is_causal=True), x, x, mask=keys, gradients=False),
        run(None, x, x, mask=padded, gradients=False),
    )
    with pytest.raises(AssertionError):
        close(run(attention_fn(), x, x, gradients=False), expected[0])


@pytest.mark.parametrize("batch", [(2, 3), *thorough(((),))], ids=str)
def test_causal_in_the_call_works_too(batch: tuple[int, ...]) -> None:
    x = normal("x", *batch, T, FEATURES)
    expected = run_nnx(None, x, x, is_causal=True)
    close(run_nnx(attention_fn(), x, x, is_causal=True), expected)
    for called in (True, False):
        found = run_nnx(attention_fn(is_causal=True), x, x, is_causal=called, gradients=False)
        close(found, expected[0])


@pytest.mark.parametrize("flavour", first(1, RUN))
def test_rows_that_see_no_key_are_zero_and_the_others_equal_flax(flavour: str) -> None:
    x = normal("x", 2, T, FEATURES)
    mask = jnp.ones((2, 1, T, T)).at[0, 0, 3].set(0.0).at[1, 0, :, 7:].set(0.0)
    make = {"use_bias": False} if flavour == "nnx" else None
    ours, theirs = (
        RUN[flavour](each, x, x, mask=mask, make=make, gradients=False)
        for each in (attention_fn(), None)
    )
    rest = np.arange(T) != 3
    close(ours[1], theirs[1])
    close(ours[0, rest], theirs[0, rest])
    assert (np.asarray(ours)[0, 3] == 0).all()
    assert (np.asarray(theirs)[0, 3] != 0).any()


def test_grouped_heads_equal_flax() -> None:
    x = normal("x", 2, T, FEATURES)
    make = {"num_kv_heads": 2}
    close(
        run_nnx(attention_fn(), x, x, make=make, is_causal=True),
        run_nnx(None, x, x, make=make, is_causal=True),
    )


@pytest.mark.parametrize("flavour", first(1, RUN))
@pytest.mark.parametrize("dtype", first(1, [jnp.bfloat16, jnp.float32]))
def test_the_dtype_of_the_module_holds(flavour: str, dtype: Any) -> None:
    x = normal("x", 2, T, FEATURES)
    found = RUN[flavour](attention_fn(), x, x, make={"dtype": dtype})
    with of_others():
        expected = RUN[flavour](None, x, x, make={"dtype": dtype})
    assert found[0].dtype == dtype
    close(found, expected, unit=8 * float(jnp.finfo(dtype).eps))


def test_mixed_dtypes_are_promoted_as_flax_does() -> None:
    q, k, v = (normal(n, 2, T, HEADS, 4) for n in "qkv")
    mixed = q.astype(jnp.bfloat16), k, v
    with of_others():
        found, expected = attention_fn()(*mixed), nnx.dot_product_attention(*mixed)
    assert found.dtype == expected.dtype == jnp.float32
    close(found, expected)
    half = attention_fn()(q, k, v, dtype=jnp.float16)
    assert half.dtype == jnp.float16
    with of_others():
        expected = nnx.dot_product_attention(q, k, v, dtype=jnp.float16)
    close(half, expected, unit=2e-3)


@pytest.mark.parametrize("batch", first(1, BATCHES[::-1]), ids=str)
@pytest.mark.parametrize("shared", first(1, [False, True]))
def test_bias_has_the_batch_axes_of_the_call(batch: tuple[int, ...], shared: bool) -> None:
    q, k = normal("q", *batch, T, HEADS, 4), normal("k", *batch, S, HEADS, 4)
    bias = normal("bias", *((1,) * len(batch) if shared else batch), HEADS, T, S)

    def run(function: Callable) -> Any:
        return with_gradients(lambda q, k, bias: function(q, k, k, bias=bias), q, k, bias)

    close(run(attention_fn()), run(linen.dot_product_attention))


def test_masks_may_share_some_batch_axes() -> None:
    q, k = normal("q", 2, 3, T, HEADS, 4), normal("k", 2, 3, S, HEADS, 4)
    rng = np.random.default_rng(0)
    for shape in [(2, 1, 1, T, S), (1, 3, HEADS, 1, S), (3, 1, T, S), (T, S), (S,)]:
        mask = jnp.asarray(rng.random(shape) < 0.8).at[..., 0].set(True).astype(jnp.float32)
        ours, theirs = (
            quick_jit(partial(f, mask=mask))(q, k, k)
            for f in (attention_fn(), linen.dot_product_attention)
        )
        close(ours, theirs)


@pytest.mark.parametrize("flavour", first(1, RUN))
def test_decoding_with_a_cache_equals_flax(flavour: str) -> None:
    x = normal("x", 2, 5, FEATURES)

    def decode_nnx(function: Callable | None) -> list[jax.Array]:
        options = {} if function is None else {"attention_fn": function}
        model = nnx.MultiHeadAttention(
            num_heads=HEADS, in_features=FEATURES, decode=True, rngs=nnx.Rngs(0), **options
        )
        model.init_cache(x.shape)
        return [model(x[:, i : i + 1]) for i in range(5)]

    def decode_linen(function: Callable | None) -> list[jax.Array]:
        options = {} if function is None else {"attention_fn": function}
        model = linen.MultiHeadDotProductAttention(num_heads=HEADS, decode=True, **options)
        variables = model.init(jax.random.key(0), x)
        parameters, cache = variables["params"], variables["cache"]
        steps = []
        for i in range(5):
            out, updated = model.apply(
                {"params": parameters, "cache": cache}, x[:, i : i + 1], mutable=["cache"]
            )
            cache = updated["cache"]
            steps.append(out)
        return steps

    decode = {"nnx": decode_nnx, "linen": decode_linen}[flavour]
    close(decode(attention_fn()), decode(None))


class TestDropout:
    x = normal("x", 2, T, FEATURES)

    def run(self, flavour: str, function: Callable | None, seed: int, **make: Any) -> Any:
        if flavour == "nnx":
            return run_nnx(
                function,
                self.x,
                self.x,
                gradients=False,
                make=make,
                deterministic=False,
                dropout_seed=seed,
            )
        return run_linen(
            function,
            self.x,
            self.x,
            gradients=False,
            make=make,
            rngs={"dropout": jax.random.key(seed)},
            deterministic=False,
        )

    @both
    def test_deterministic_is_without_dropout(self, flavour: str) -> None:
        make = {"dropout_rate": 0.5}
        options = {"gradients": False}
        found = RUN[flavour](
            attention_fn(), self.x, self.x, make=make, deterministic=True, **options
        )
        close(found, RUN[flavour](None, self.x, self.x, **options))

    @both
    def test_it_drops_and_depends_on_the_key_alone(self, flavour: str) -> None:
        plain = RUN[flavour](None, self.x, self.x, gradients=False)
        first = self.run(flavour, attention_fn(), 1, dropout_rate=0.5)
        again = self.run(flavour, attention_fn(), 1, dropout_rate=0.5)
        other = self.run(flavour, attention_fn(), 2, dropout_rate=0.5)
        close(first, again, unit=0.0)
        assert np.abs(np.asarray(first - plain)).max() > 1e-2
        assert np.abs(np.asarray(first - other)).max() > 1e-2

    @both
    def test_without_a_key_it_is_an_error(self, flavour: str) -> None:
        def run() -> Any:
            if flavour == "linen":
                model = linen.MultiHeadDotProductAttention(
                    num_heads=HEADS, dropout_rate=0.5, attention_fn=attention_fn()
                )
                parameters = model.init(jax.random.key(0), self.x, deterministic=True)
                return model.apply(parameters, self.x, deterministic=False)
            return attention_fn()(*[normal("q", T, HEADS, 4)] * 3, dropout_rate=0.5)

        with pytest.raises(Exception, match=r"dropout"):
            run()

    def masks(self, **options: Any) -> np.ndarray:
        q, k = jnp.zeros((2, 3, T, HEADS, 1)), jnp.zeros((2, 3, S, HEADS, 1))
        v = jnp.broadcast_to(jnp.eye(S)[:, None], (2, 3, S, HEADS, S))
        out = attention_fn()(
            q, k, v, dropout_rng=jax.random.key(0), dropout_rate=0.5, deterministic=False, **options
        )
        assert set(np.unique(np.round(np.asarray(out) * S / 2, 4))) == {0.0, 1.0}
        return np.asarray(out).transpose(0, 1, 3, 2, 4).reshape(6, HEADS, T, S) > 0

    def test_broadcast_dropout_is_one_mask_for_batch_and_heads(self) -> None:
        masks = self.masks(broadcast_dropout=True)
        assert 0.35 < masks[0, 0].mean() < 0.65
        assert (masks == masks[0, 0]).all()
        np.testing.assert_array_equal(masks, self.masks())

    def test_otherwise_each_batch_row_and_head_has_its_own(self) -> None:
        masks = self.masks(broadcast_dropout=False).reshape(6 * HEADS, -1)
        assert len(np.unique(masks, axis=0)) == 6 * HEADS

    def test_gradients_use_the_same_mask(self) -> None:
        mask = self.masks(broadcast_dropout=True)[0, 0]
        q, v = jnp.zeros((2, 3, T, HEADS, 1)), jnp.zeros((2, 3, S, HEADS, 1))

        def total(v: jax.Array) -> jax.Array:
            return attention_fn()(q, v, v, dropout_rng=jax.random.key(0), dropout_rate=0.5).sum()

        expected = np.broadcast_to(2 * mask.sum(axis=0)[:, None, None] / S, v.shape)
        exact = tolerance.of_sums(S + T, 1.0)
        np.testing.assert_allclose(jax.grad(total)(v), expected, rtol=exact)


class TestRefusals:
    q = normal("q", 2, T, HEADS, 4)

    @both
    def test_sowing_the_weights(self, flavour: str) -> None:
        x = normal("x", 2, T, FEATURES)
        with pytest.raises(jattn.UnsupportedAttentionError, match="sow_weights"):
            RUN[flavour](attention_fn(), x, x, sow_weights=True)

    def test_custom_einsums(self) -> None:
        x = normal("x", 2, T, FEATURES)
        make = {
            "qk_attn_weights_einsum_cls": lambda: jnp.einsum,
            "attn_weights_value_einsum_cls": lambda: jnp.einsum,
        }
        with pytest.raises(jattn.UnsupportedAttentionError, match="qk_attn_weights_einsum"):
            run_linen(attention_fn(), x, x, make=make)

    def test_rotary_positions(self) -> None:
        x = normal("x", 2, T, FEATURES)
        with pytest.raises(jattn.UnsupportedAttentionError, match="input_positions"):
            run_nnx(attention_fn(), x, x, input_positions=jnp.arange(T))

    @pytest.mark.parametrize("name", ["dropout_rate", "dropout_rng", "broadcast_dropout"])
    def test_dropout_is_the_modules_to_set(self, name: str) -> None:
        with pytest.raises(TypeError, match=name):
            attention_fn(**{name: 0})

    def test_a_residual(self) -> None:
        with pytest.raises(TypeError, match="return_residual"):
            attention_fn(return_residual=True)

    def test_an_unknown_option(self) -> None:
        with pytest.raises(TypeError, match="is_casual"):
            attention_fn(is_casual=True)(self.q, self.q, self.q)

    def test_an_unknown_argument(self) -> None:
        with pytest.raises(TypeError, match="colour"):
            attention_fn()(self.q, self.q, self.q, colour=1)

    def test_a_precision_that_cannot_be(self) -> None:
        with pytest.raises(TypeError, match="precision"):
            attention_fn()(self.q, self.q, self.q, precision=("default", "highest"))

    def test_an_implementation_that_cannot(self) -> None:
        if jax.default_backend() == "gpu":
            pytest.skip("it can here")
        with pytest.raises(jattn.UnsupportedAttentionError, match="NVIDIA"):
            attention_fn(implementation="flash")(self.q, self.q, self.q)


@both
@pytest.mark.parametrize(
    "precision", first(1, ["highest", jax.lax.Precision.HIGH, jax.lax.Precision.DEFAULT])
)
def test_precision_reaches_every_product(flavour: str, precision: Any) -> None:
    q = normal("q", 2, T, HEADS, 4)
    jaxpr = jax.make_jaxpr(lambda q: attention_fn()(q, q, q, precision=precision))(q).jaxpr
    wanted = (
        {jax.lax.Precision(precision)}
        if not isinstance(precision, str)
        else {jax.lax.Precision.HIGHEST}
    )

    def precisions(jaxpr: Any) -> set[Any]:
        found: set[Any] = set()
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found |= set(equation.params["precision"] or (None,))
            for inner in jaxprs_in_params(equation.params):
                found |= precisions(inner)
        return found

    assert precisions(jaxpr) == wanted
    x = normal("x", 2, T, FEATURES)
    options = {"make": {"precision": precision}, "gradients": False}
    close(RUN[flavour](attention_fn(), x, x, **options), RUN[flavour](None, x, x, **options))


@pytest.mark.parametrize("flavour", first(1, RUN))
def test_options_reach_the_call(flavour: str) -> None:
    x = normal("x", 2, T, FEATURES)
    i, k = np.arange(T)[:, None], np.arange(T)[None, :]
    mask = jnp.asarray((k <= i) & (k >= i - 3))[None, None]
    windowed = attention_fn(is_causal=True, local_window_size=(3, 0))
    close(RUN[flavour](windowed, x, x), RUN[flavour](None, x, x, mask=mask))
    capped, plain = (
        RUN[flavour](each, x, x, gradients=False)
        for each in (attention_fn(logits_soft_cap=0.1, sinks=jnp.ones(HEADS)), None)
    )
    with pytest.raises(AssertionError):
        close(capped, plain)


@pytest.mark.parametrize("flavour", first(1, RUN))
def test_the_implementation_can_be_named(flavour: str) -> None:
    x = normal("x", 2, T, FEATURES)
    expected = RUN[flavour](None, x, x, gradients=False)
    for implementation in ("eager", "memory_efficient", ("flash", "memory_efficient")):
        named = attention_fn(implementation=implementation)
        close(RUN[flavour](named, x, x, gradients=False), expected)
    q = normal("q", 2, T, HEADS, 4)
    jax.jvp(lambda q: attention_fn(implementation="eager")(q, q, q), (q,), (q,))
    with jattn.attention_backend("eager"):
        expected = jax.jvp(lambda q: attention_fn()(q, q, q), (q,), (q,))
    close(jax.jvp(lambda q: attention_fn()(q, q, q), (q,), (q,)), expected)
