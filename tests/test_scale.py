"""A scale that is an array, traced or not: in value and gradient that of the formula."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jattn
from jattn.backends.kernels import lacks, only
from jattn.call.arguments import attention_call
from jattn.call.target import current_target
from jattn.flash_attention import interpreted
from tests import formula, reference, tolerance
from tests.backends import quick_jit
from tests.cases import thorough
from tests.promotion import of_others

B, T, S, N, K, H = 2, 24, 40, 4, 2, 16
SCALES = (0.4, -0.3, 0.0)  # of one compiled function
LENGTHS = np.array([33, 0], np.int32)


@dataclass(frozen=True)
class Way:
    """A backend, and the context in which its kernels run."""

    name: str
    function: Callable[..., Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    dtype: Any = jnp.float32

    def __str__(self) -> str:
        return self.name


@contextmanager
def on_hopper(*, deterministic: bool) -> Generator[None]:
    with interpreted(), jattn.deterministic_gradients(deterministic):
        yield


PORTABLE = partial(interpreted, "portable")
EAGER = Way("eager", jattn.eager_attention)
XLA = Way(
    "memory_efficient",
    partial(jattn.memory_efficient_attention, query_chunk_size=16, key_chunk_size=24),
)
FLASH = Way("portable-flash", jattn.flash_attention, PORTABLE)
CHUNKED = Way("portable-chunked", jattn.memory_efficient_attention, PORTABLE)
HOPPER = Way("hopper", jattn.flash_attention, partial(on_hopper, deterministic=False), jnp.bfloat16)
APART = Way(
    "hopper-apart", jattn.flash_attention, partial(on_hopper, deterministic=True), jnp.bfloat16
)
# The kernels themselves.
ON_HOPPER = Way("hopper on a GPU", jattn.flash_attention, dtype=jnp.bfloat16)
APART_ON_HOPPER = replace(
    ON_HOPPER, name="hopper-apart on a GPU", context=jattn.deterministic_gradients
)
ON_GPU = Way("portable-flash on a GPU", jattn.flash_attention, partial(only, "portable"))
ON_GPU_16 = replace(ON_GPU, name="portable-flash, bfloat16, on a GPU", dtype=jnp.bfloat16)
CHUNKED_ON_GPU = Way("portable-chunked on a GPU", jattn.memory_efficient_attention)
CALLS: dict[str, dict[str, Any]] = {
    "causal": {"is_causal": True},
    "lengths_cap": {"key_value_seq_lengths": LENGTHS, "logits_soft_cap": 2.0},
}
BIAS = np.random.default_rng(6).standard_normal((1, N, T, S)).astype(np.float32)


@cache
def arrays(dtype: Any) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    shapes = {"q": (B, T, N, H), "k": (B, S, K, H), "v": (B, S, K, H), "dout": (B, T, N, H)}
    drawn = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    made = {name: np.asarray(x, dtype) for name, x in drawn.items()}
    return made | {"dlse": rng.standard_normal((B, T, N)).astype(np.float32)}


def options(call: str) -> dict[str, Any]:
    return {"bias": BIAS, "is_causal": True} if call == "bias" else CALLS[call]


@cache
def found(way: Way, call: str, dtype: Any) -> Callable[[float], dict[str, Any]]:
    """Output, log-sum-exp and gradients by scale, compiled once."""
    drawn = arrays(dtype)

    more = dict(options(call))
    names = ["q", "k", "v", "scale", *(["bias"] if "bias" in more else [])]
    bias = [more.pop("bias")] if "bias" in more else []

    @quick_jit
    def run(scale: jax.Array) -> dict[str, Any]:
        def attend(q: Any, k: Any, v: Any, scale: Any, *bias: Any) -> Any:
            return way.function(q, k, v, *bias, scale=scale, return_residual=True, **more)

        (out, lse), vjp = jax.vjp(attend, *(drawn[name] for name in "qkv"), scale, *bias)
        gradients = zip(names, vjp((drawn["dout"], drawn["dlse"])), strict=True)
        return {"out": out, "lse": lse, **dict(gradients)}

    def of(scale: float) -> dict[str, Any]:
        with way.context():
            return jax.tree.map(np.asarray, run(jnp.float32(scale)))

    return of


@cache
def exact(
    call: str, dtype: Any, scale: float, *, with_lse: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the formula makes of it in float64, with the scale inside the query, and magnitudes."""
    drawn = {name: reference.float64(x) for name, x in arrays(dtype).items()}
    asked = options(call)
    lengths = asked.get("key_value_seq_lengths")
    seen = reference.visible(B, T, S, causal=asked.get("is_causal", False), key_lengths=lengths)
    made = reference.attention(
        drawn["q"] * scale, drawn["k"], drawn["v"], seen=seen, scale=1.0,
        soft_cap=asked.get("logits_soft_cap"), bias=asked.get("bias"),
    )  # fmt: skip

    def by_scale(of: dict[str, Any], q: Any, scale: float) -> dict[str, Any]:
        return of | {"q": of["q"] * scale, "scale": np.sum(of["q"] * q)}

    d_lse = np.where(np.isfinite(made.lse), drawn["dlse"], 0) * with_lse
    cotangents = drawn["dout"], d_lse
    values = {"out": made.out, "lse": made.lse} | made.gradients(*cotangents)
    sizes = made.magnitudes(*cotangents)
    return (
        by_scale(values, drawn["q"], scale),
        by_scale(sizes, np.abs(drawn["q"]), abs(scale)),
    )


@pytest.mark.parametrize(
    ("way", "call"),
    [
        *((way, "lengths_cap") for way in (EAGER, XLA, FLASH)),
        *thorough(
            (HOPPER, "causal"),
            *((way, "causal") for way in (EAGER, XLA, FLASH)),
            *((way, "lengths_cap") for way in (CHUNKED, APART)),
        ),
    ],
    ids=str,
)
def test_value_and_gradient_are_those_of_the_formula(way: Way, call: str) -> None:
    check(way, call)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("way", "call"),
    [
        *((way, call) for way in (ON_HOPPER, APART_ON_HOPPER) for call in CALLS),
        *((way, call) for way in (ON_GPU, ON_GPU_16, CHUNKED_ON_GPU) for call in (*CALLS, "bias")),
    ],
    ids=str,
)
def test_value_and_gradient_of_kernels_on_a_gpu(way: Way, call: str) -> None:
    if way in (ON_HOPPER, APART_ON_HOPPER) and lacks("hopper", current_target()):
        pytest.skip("the GPU is not a Hopper one")
    check(way, call)


def check(way: Way, call: str) -> None:
    """Output, log-sum-exp and every gradient against float64, beside eager."""
    for scale in SCALES if way.dtype == jnp.float32 else SCALES[1:2]:
        got = found(way, call, way.dtype)(scale)
        values, sizes = exact(call, way.dtype, scale)
        for name, value in values.items():
            if way is EAGER:
                bound = 16 * tolerance.epsilon(way.dtype) * (1 + sizes[name].max())
                assert tolerance.error(got[name], value) <= bound, name
            else:
                peer = partial(of_eager, name, call, way.dtype, scale)
                tolerance.check_against_peer(name, got[name], peer, value, sizes[name], way.dtype)


def of_eager(name: str, call: str, dtype: Any, scale: float) -> Any:
    return found(EAGER, call, dtype)(scale)[name]


@pytest.mark.parametrize("way", [XLA, *thorough((FLASH,), (APART,))], ids=str)
def test_gradients_of_the_rest_alone(way: Way) -> None:
    """Where the scale is an array without a gradient: 1 / sqrt(H), computed inside jit."""
    drawn = arrays(way.dtype)
    scale = 0.25

    @quick_jit
    def run(size: jax.Array) -> Any:
        def attend(q: Any) -> Any:
            return way.function(q, drawn["k"], drawn["v"], scale=1 / jnp.sqrt(size), is_causal=True)

        return jax.vjp(attend, drawn["q"])[1](drawn["dout"])[0]

    with way.context():
        got = run(jnp.float32(16))
    drawn64 = {name: reference.float64(x) for name, x in drawn.items()}
    seen = reference.visible(B, T, S, causal=True)
    made = reference.attention(drawn64["q"], drawn64["k"], drawn64["v"], seen=seen, scale=scale)
    cotangents = drawn64["dout"], np.zeros((B, T, N))
    value, size = made.gradients(*cotangents)["q"], made.magnitudes(*cotangents)["q"]
    assert got.dtype == way.dtype
    assert tolerance.error(got, value) <= 4 * tolerance.epsilon(way.dtype) * size.max()


@pytest.mark.parametrize("way", [XLA, *thorough((FLASH,))], ids=str)
def test_mapped_over_the_scale(way: Way) -> None:
    drawn = arrays(jnp.float32)

    def run(way: Way) -> dict[str, Any]:
        def loss(scale: Any) -> Any:
            out = way.function(drawn["q"], drawn["k"], drawn["v"], scale=scale, is_causal=True)
            return (out * drawn["dout"]).sum(), out

        with way.context():
            d_scale, out = quick_jit(jax.vmap(jax.grad(loss, has_aux=True)))(jnp.array(SCALES))
        return {"out": out, "scale": d_scale}

    got, peer = run(way), run(EAGER)
    for i, scale in enumerate(SCALES):
        values, sizes = exact("causal", jnp.float32, scale, with_lse=False)
        for name in got:
            one, other = got[name][i], peer[name][i]
            size = np.asarray(sizes[name])
            tolerance.check_against_peer(name, one, other, values[name], size, jnp.float32)


def test_agrees_with_jax_nn() -> None:
    drawn = arrays(jnp.float32)

    def gradient(attention: Callable[..., Any]) -> Any:
        def loss(scale: Any) -> Any:
            out = attention(drawn["q"], drawn["k"], drawn["v"], scale=scale, is_causal=True)
            return (out * drawn["dout"]).sum()

        return quick_jit(jax.grad(loss))(jnp.float32(SCALES[0]))

    values, sizes = exact("causal", jnp.float32, SCALES[0], with_lse=False)
    ours = gradient(jattn.dot_product_attention)
    with of_others():
        theirs = gradient(jax.nn.dot_product_attention)
    for found in (ours, theirs):
        bound = 4 * tolerance.epsilon(jnp.float32) * float(sizes["scale"])
        assert tolerance.error(found, values["scale"]) <= bound


@pytest.mark.parametrize(
    "scale",
    [jnp.float32(0.3), jnp.bfloat16(0.25), jnp.array([0.3]), jnp.array(2), np.array(0.3)],
    ids=["scalar", "bfloat16", "one_element", "integer", "numpy"],
)
def test_any_real_array_of_one_element(scale: Any) -> None:
    x = arrays(jnp.float32)["q"]
    number = float(np.asarray(scale).reshape(()))
    found = {"out": jattn.eager_attention(x, x, x, scale=scale)}
    formula.check(found, lambda of, x: {"out": of(x, x, x, scale=number)}, x)


@pytest.mark.parametrize("dtype", [bool, complex])
def test_what_is_no_real_number_is_refused(dtype: Any) -> None:
    x = arrays(jnp.float32)["q"]
    with pytest.raises(TypeError, match="scale must be a real number"):
        jattn.eager_attention(x, x, x, scale=jnp.ones((), dtype))


@pytest.mark.parametrize("of", [jnp, np], ids=["jax", "numpy"])
def test_one_for_each_head_is_refused_with_a_way_out(of: Any) -> None:
    x = arrays(jnp.float32)["q"]
    with pytest.raises(ValueError, match=r"scale must be one number, got shape \(4,\).*query"):
        jattn.dot_product_attention(x, x, x, scale=of.ones(N))


def test_numpys_arrays_of_one_are_numbers() -> None:
    def scale(given: Any) -> Any:
        return attention_call(*(jnp.ones((1, 2, 1, 8)),) * 3, scale=given).spec.scale

    assert [scale(np.full(shape, 0.25)) for shape in ((), (1,), (1, 1))] == [0.25] * 3


def test_a_parameter_of_flax_is_an_array() -> None:
    x = arrays(jnp.float32)["q"]

    def loss(scale: Any) -> jax.Array:
        return jattn.dot_product_attention(x, x, x, scale=scale).sum()

    # Traced, its value is no number.
    found = nnx.jit(nnx.grad(loss))(nnx.Param(jnp.float32(0.4)))
    expected = jax.grad(loss)(jnp.float32(0.4))
    assert abs(expected) > 0.01
    np.testing.assert_allclose(jax.tree.leaves(found), [expected], rtol=1e-4)


def test_explain_takes_one_by_shape() -> None:
    x = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float32)
    told = jattn.explain(x, x, x, scale=jax.ShapeDtypeStruct((), jnp.float32))
    assert told.chosen == "memory_efficient"
    assert "scale" in told.call


@pytest.mark.parametrize(
    "yes", [1, np.True_, np.int32(1), np.array(True), jnp.array(True)], ids=repr
)
def test_flags_are_what_is_true_by_now(yes: Any) -> None:
    x = arrays(jnp.float32)["q"]
    found = {"out": jattn.dot_product_attention(x, x, x, is_causal=yes)}
    formula.check(found, lambda of, x: {"out": of(x, x, x, is_causal=True)}, x)
    assert len(jattn.eager_attention(x, x, x, return_residual=yes)) == 2


def test_a_traced_flag_is_refused_with_a_way_out() -> None:
    x = arrays(jnp.float32)["q"]
    with pytest.raises(TypeError, match=r"is_causal must be True or False.*lax\.cond"):
        jax.jit(lambda flag: jattn.dot_product_attention(x, x, x, is_causal=flag))(True)
