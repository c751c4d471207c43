"""Against `jax.nn.dot_product_attention`: the same where they agree, and each difference shown."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jattn
from tests import formula, reference, tolerance
from tests.backends import quick_jit
from tests.promotion import of_others

B, T, S, H = 2, 20, 26, 8
BACKENDS = ("memory_efficient", "eager")
INT = np.int32
THOROUGH = pytest.mark.thorough


def normal(name: str, *shape: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(list(name.encode())).standard_normal(shape).astype(dtype)


def bools(name: str, *shape: int) -> Any:
    mask = np.random.default_rng(list(name.encode())).random(shape) < 0.7
    mask[..., :, 0] = True
    return mask


def call(
    name: str,
    *,
    heads: int = 4,
    kv_heads: int = 4,
    keys: int = S,
    queries: int = T,
    batched: bool = True,
    dtype: Any = np.float32,
    **options: Any,
) -> Any:
    """One row of the comparison; no option of any row hides a whole row."""
    q = normal("q", B, queries, heads, H, dtype=dtype)
    k, v = (normal(n, B, keys, kv_heads, H, dtype=dtype) for n in "kv")
    if not batched:
        q, k, v = q[0], k[0], v[0]
    return pytest.param((q, k, v), options, id=name)


LENGTHS = np.array([7, S], INT)
CALLS = [
    call("plain"),
    call("one_query", queries=1),
    call("grouped", kv_heads=2),
    call("multi_query", kv_heads=1),
    call("bfloat16", dtype=jnp.bfloat16),
    call("no_batch_axis", batched=False),
    call("no_batch_axis_causal_bias", batched=False, is_causal=True, bias=normal("bias", 4, T, S)),
    call("no_batch_axis_lengths", batched=False, key_value_seq_lengths=np.array([7], INT)),
    call("scale", scale=0.3),
    call("scale_of_numpy", scale=np.float32(0.3)),
    call("causal", is_causal=True),
    call("causal_more_queries", is_causal=True, queries=S, keys=T),
    call("window_int", local_window_size=3),
    call("window_pair", local_window_size=(4, 2)),
    call("window_causal", local_window_size=(4, 2), is_causal=True),
    call("window_wide", local_window_size=(10**6, 10**6)),
    call("key_lengths", key_value_seq_lengths=LENGTHS),
    call("causal_key_lengths_grouped", is_causal=True, key_value_seq_lengths=LENGTHS, kv_heads=2),
    call("bias_full", bias=normal("bias", B, 4, T, S)),
    call("bias_heads_keys", bias=normal("bias", 1, 4, 1, S)),
    call("bias_rank_3", bias=normal("bias", 4, T, S)),
    call("bias_rank_2", bias=normal("bias", T, S)),
    call("bias_rank_1", bias=normal("bias", S)),
    call("bias_scalar", bias=np.float32(0.5)),
    call("bias_of_integers", bias=np.arange(S, dtype=INT)[None, None, None] // 4),
    call("bias_float32_half", bias=normal("bias", 1, 4, T, S), dtype=jnp.bfloat16),
    call("bias_grouped", bias=normal("bias", B, 4, T, S), kv_heads=2),
    call("mask_full", mask=bools("mask", B, 4, T, S)),
    call("mask_rank_2", mask=bools("mask", T, S)),
    call("mask_keys", mask=bools("mask", B, 1, 1, S)),
    call("mask_grouped", mask=bools("mask", B, 4, T, S), kv_heads=2),
    call(
        "mask_bias_causal",
        mask=bools("mask", 1, 1, T, S),
        bias=normal("bias", 1, 4, 1, S),
        is_causal=True,
    ),
    call(
        "everything",
        mask=bools("mask", B, 1, T, S),
        bias=normal("bias", 1, 4, T, S),
        is_causal=True,
        key_value_seq_lengths=LENGTHS,
        local_window_size=(30, 1),
        scale=0.2,
        kv_heads=2,
    ),
]


def differentiable(operands: tuple[Any, ...], options: dict[str, Any]) -> Any:
    bias = options.get("bias")
    floating = bias is not None and jnp.issubdtype(jnp.asarray(bias).dtype, jnp.floating)
    arrays = (*operands, bias) if floating else operands
    return tuple(jnp.asarray(x) for x in arrays), {
        name: x for name, x in options.items() if name != "bias" or not floating
    }


def exact_error(found: Any, operands: tuple[Any, ...], options: dict[str, Any]) -> float:
    """How far an output is from float64: what the comparison allows is a multiple of it."""
    q, k, v = (x if x.ndim == 4 else x[None] for x in operands)
    size = q.shape[0], q.shape[1], k.shape[1]
    seen = reference.visible(
        *size,
        causal=options.get("is_causal", False),
        window=options.get("local_window_size"),
        key_lengths=options.get("key_value_seq_lengths"),
        mask=options.get("mask"),
    )
    bias = options.get("bias")
    exact = reference.attention(
        q,
        k,
        v,
        seen=seen,
        bias=None if bias is None else np.asarray(bias)[(None,) * (4 - np.ndim(bias))],
        scale=options.get("scale"),
    )
    return tolerance.error(np.reshape(found, exact.out.shape), exact.out)


def with_gradients(function: Any, implementation: str, arrays: Any, rest: dict[str, Any]) -> Any:
    def call(*arrays: Any) -> Any:
        return function(*arrays, **rest, implementation=implementation)

    @quick_jit
    def run(*arrays: Any) -> Any:
        out, vjp = jax.vjp(call, *arrays)
        return out, vjp(jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype))

    return run(*arrays)


# Of axes and ranks that arguments may have, one of each.
ORDINARY = {
    *("bfloat16", "no_batch_axis_causal_bias", "scale_of_numpy", "causal_more_queries"),
    *("causal_key_lengths_grouped", "bias_heads_keys", "bias_rank_2", "bias_of_integers"),
    "everything",
}
assert {each.id for each in CALLS} >= ORDINARY


@pytest.mark.parametrize(
    ("operands", "options"),
    [
        each if each.id in ORDINARY else pytest.param(*each.values, id=each.id, marks=THOROUGH)
        for each in CALLS
    ],
)
def test_output_and_gradients_are_those_of_jax_nn(
    operands: tuple[Any, ...], options: dict[str, Any]
) -> None:
    arrays, rest = differentiable(operands, options)
    with of_others():
        theirs, their_gradients = with_gradients(jax.nn.dot_product_attention, "xla", arrays, rest)
    unit = tolerance.epsilon(theirs.dtype)
    allowed = 3 * exact_error(theirs, operands, options) + 2 * unit * np.abs(theirs).max()
    ours, gradients = with_gradients(jattn.dot_product_attention, "memory_efficient", arrays, rest)
    eager = quick_jit(partial(jattn.dot_product_attention, **rest, implementation="eager"))
    for found in (ours, eager(*arrays)):
        assert (found.shape, found.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(
            np.float64(found), np.float64(theirs), rtol=0, atol=float(allowed)
        )
    for mine, other in zip(gradients, their_gradients, strict=True):
        assert (mine.shape, mine.dtype) == (other.shape, other.dtype)
        largest = float(np.abs(np.float64(other)).max())
        np.testing.assert_allclose(
            np.float64(mine), np.float64(other), rtol=0, atol=16 * unit * (1 + largest)
        )


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("batched", [True, False])
def test_residual_is_that_of_jax_nn(batched: bool, implementation: str) -> None:
    q, k = normal("q", B, T, 4, H), normal("k", B, S, 2, H)
    if not batched:
        q, k = q[0], k[0]

    def results(attention: Any, q: Any, k: Any) -> dict[str, Any]:
        out, lse = attention(q, k, k, is_causal=True, return_residual=True)
        return {"out": out, "lse": lse}

    ours = partial(jattn.dot_product_attention, implementation=implementation)
    expected = formula.expected(results, q, k)
    for attention in (ours, jax.nn.dot_product_attention):
        formula.compare(quick_jit(partial(results, attention))(q, k), expected)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_query_lengths_are_those_of_jax_nn(implementation: str) -> None:
    q, k = normal("q", B, T, 4, H), normal("k", B, S, 4, H)
    options: Any = {
        "query_seq_lengths": np.array([5, T], INT),
        "key_value_seq_lengths": LENGTHS,
        "is_causal": True,
    }

    def results(attention: Any, q: Any, k: Any) -> dict[str, Any]:
        return {"out": attention(q, k, k, **options)}

    ours = partial(jattn.dot_product_attention, implementation=implementation)
    expected = formula.expected(results, q, k)
    for attention in (ours, jax.nn.dot_product_attention):
        formula.compare(quick_jit(partial(results, attention))(q, k), expected)


def test_the_signature_begins_with_that_of_jax_nn() -> None:
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = inspect.signature(jattn.dot_product_attention).parameters
    assert set(theirs) <= set(ours)
    for name, parameter in theirs.items():
        assert ours[name].kind == parameter.kind, name
        if name != "return_residual":
            assert ours[name].default == parameter.default, name
    positional = [n for n, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(ours)[: len(positional)] == positional


class TestDifferences:
    """What `jax.nn` does otherwise, shown on both sides, so that neither can change unseen."""

    q, k, v = normal("q", 1, 4, 2, H), normal("k", 1, 6, 2, H), normal("v", 1, 6, 2, H)
    mask = np.array([True, False, True, True])[None, None, :, None]
    # Means of six values, by weights that are a sum over the head dim and one over the keys.
    allowed = tolerance.of_sums(6 + H + 6, float(np.abs(v).max()))

    def test_a_row_that_sees_no_key_is_zero_and_not_the_mean_of_the_values(self) -> None:
        theirs = jax.nn.dot_product_attention(self.q, self.k, self.v, mask=self.mask)
        np.testing.assert_allclose(theirs[:, 1], self.v.mean(axis=1), rtol=0, atol=self.allowed)
        for implementation in BACKENDS:
            ours = jattn.dot_product_attention(
                self.q, self.k, self.v, mask=self.mask, implementation=implementation
            )
            assert (np.asarray(ours)[:, 1] == 0).all()
            np.testing.assert_allclose(ours[:, 2], theirs[:, 2], rtol=0, atol=self.allowed)

    def test_the_residual_of_half_precision_is_not_rounded(self) -> None:
        q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (self.q, self.k, self.v))
        with of_others():
            _, theirs = jax.nn.dot_product_attention(q, k, v, return_residual=True)
        assert theirs.dtype == jnp.bfloat16
        for implementation in BACKENDS:
            _, ours = jattn.dot_product_attention(
                q, k, v, return_residual=True, implementation=implementation
            )
            assert ours.dtype == jnp.float32
            assert (ours.astype(jnp.bfloat16) == theirs).all()
            assert (ours != theirs.astype(jnp.float32)).any()

    def test_the_residual_has_a_gradient(self) -> None:
        def total(q: Any, function: Any, **options: Any) -> Any:
            return function(q, self.k, self.v, return_residual=True, **options)[1].sum()

        assert (jax.grad(total)(jnp.asarray(self.q), jax.nn.dot_product_attention) == 0).all()
        for implementation in BACKENDS:
            gradient = jax.grad(total)(
                jnp.asarray(self.q), jattn.dot_product_attention, implementation=implementation
            )
            assert (gradient != 0).all()

    def test_a_hidden_row_has_a_residual_of_minus_infinity(self) -> None:
        options: Any = {"mask": self.mask, "return_residual": True}
        _, theirs = jax.nn.dot_product_attention(self.q, self.k, self.v, **options)
        assert np.isfinite(theirs).all()
        _, ours = jattn.dot_product_attention(self.q, self.k, self.v, **options)
        assert (np.asarray(ours)[:, 1] == -np.inf).all()

    def test_values_may_have_a_head_dim_of_their_own(self) -> None:
        with pytest.raises(ValueError, match="value"):
            jax.nn.dot_product_attention(self.q, self.k, self.v[..., :3])
        ours = jattn.dot_product_attention(self.q, self.k, self.v[..., :3])
        whole = jattn.dot_product_attention(self.q, self.k, self.v)
        np.testing.assert_allclose(ours, whole[..., :3], rtol=0, atol=self.allowed)

    def test_nan_past_the_keys_length_is_not_read(self) -> None:
        v = self.v.copy()
        v[:, 4:] = np.nan
        lengths = np.array([4], INT)
        theirs = jax.nn.dot_product_attention(self.q, self.k, v, key_value_seq_lengths=lengths)
        assert np.isnan(theirs).all()
        ours = jattn.dot_product_attention(self.q, self.k, v, key_value_seq_lengths=lengths)
        assert np.isfinite(ours).all()

    def test_half_precision_runs_on_a_cpu_in_both_kinds(self) -> None:
        q, k, v = (jnp.asarray(x, jnp.float16) for x in (self.q, self.k, self.v))
        if jax.default_backend() == "cpu":
            with of_others(), pytest.raises(ValueError, match="F16_F16_F32"):
                jax.jit(jax.nn.dot_product_attention)(q, k, v)
        ours = jax.jit(jattn.dot_product_attention)(q, k, v)
        formula.check({"out": ours}, lambda of, *x: {"out": of(*x)}, q, k, v)

    def test_xla_is_not_a_name_and_the_error_says_which_are(self) -> None:
        with pytest.raises(ValueError, match="implementation") as caught:
            jattn.dot_product_attention(self.q, self.k, self.v, implementation="xla")
        for name in ("flash", "memory_efficient", "cudnn", "eager"):
            assert repr(name) in str(caught.value)

    def test_an_unsupported_call_is_a_not_implemented_error_with_reasons(self) -> None:
        with pytest.raises(NotImplementedError, match="NVIDIA"):
            jattn.dot_product_attention(self.q, self.k, self.v, implementation="cudnn")
