"""A decoder's loss: that of its logits, in chunks whose logits are never all there."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.decoder import Decoder
from models.decoder.cross_entropy import mean_cross_entropy
from tests.cases import thorough
from tests.models.reference import NAMES, assert_norms, expected, key_of, loaded, padded
from tests.models.reference import exact as reference
from tests.tolerance import SECOND_ORDER, check_against_peer, epsilon

type Array = np.ndarray[Any, Any]

B, T, D, V = 2, 13, 24, 70


class Exact(NamedTuple):
    """In float64."""

    loss: float
    by_x: Array
    by_head: Array


def drawn(dtype: Any, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, head and targets, a third of which are none."""
    rng = np.random.default_rng(seed)
    targets = np.where(rng.random((B, T)) < 0.3, -1, rng.integers(0, V, (B, T)))
    targets[0, :3] = -100
    x, head = rng.standard_normal((B, T, D)), rng.standard_normal((V, D))
    return jnp.asarray(x, dtype), jnp.asarray(head, dtype), jnp.asarray(targets, jnp.int32)


def exact(x: jax.Array, head: jax.Array, targets: jax.Array, cap: float | None) -> Exact:
    """By the formula, all logits at once."""
    x64, head64, y = (np.asarray(a, np.float64) for a in (x, head, targets))
    y = y.astype(int)
    raw = x64 @ head64.T
    logits = raw if cap is None else cap * np.tanh(raw / cap)
    chances = np.exp(logits - logits.max(-1, keepdims=True))
    chances /= chances.sum(-1, keepdims=True)
    real = y >= 0
    own = np.take_along_axis(chances, np.maximum(y, 0)[..., None], -1)[..., 0]
    slope = (chances - np.eye(V)[np.maximum(y, 0)]) * real[..., None] / real.sum()
    if cap is not None:
        slope *= 1 - np.tanh(raw / cap) ** 2
    by_head = np.einsum("btv,btd->vd", slope, x64)
    return Exact(-np.log(own[real]).mean(), slope @ head64, by_head)


def plain(x: jax.Array, head: jax.Array, targets: jax.Array, cap: float | None) -> jax.Array:
    """As one would write it, with all logits."""
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    logits = jnp.einsum("btd,vd->btv", x, head, preferred_element_type=wide)
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    chances = jax.nn.log_softmax(logits)
    own = jnp.take_along_axis(chances, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    return -jnp.where(targets >= 0, own, 0).sum() / (targets >= 0).sum().astype(own.dtype)


@pytest.mark.parametrize("chunk", [4, None, *thorough((1,), (6,), (T,), (100,))])
@pytest.mark.parametrize(
    ("dtype", "cap"), [("float32", None), ("float32", 3.0), *thorough(("bfloat16", 3.0))]
)
def test_as_exact_as_all_logits_at_once(dtype: str, cap: float | None, chunk: int | None) -> None:
    x, head, targets = drawn(dtype)
    chunked = partial(mean_cross_entropy, soft_cap=cap, chunk=chunk)
    loss, slopes = jax.jit(jax.value_and_grad(chunked, (0, 1)))(x, head, targets)
    assert [s.dtype for s in slopes] == [x.dtype, head.dtype]
    whole, theirs = jax.value_and_grad(partial(plain, cap=cap), (0, 1))(x, head, targets)
    true = exact(x, head, targets, cap)
    ulp = 4 * float(jnp.finfo(jnp.float32).eps)
    for found in (loss, chunked(x, head, targets)):
        assert abs(found - true.loss) <= 2 * abs(whole - true.loss) + ulp * true.loss
    for slope, other, right in zip(slopes, theirs, true[1:], strict=True):
        allowed = 3 * np.abs(np.asarray(other, np.float64) - right).max()
        allowed += 4 * epsilon(dtype) * np.abs(right).max()
        assert np.abs(np.asarray(slope, np.float64) - right).max() <= allowed


def test_weights_of_another_dtype_get_slopes_of_theirs() -> None:
    x, head, targets = drawn("float32")
    x = x.astype(jnp.bfloat16)
    by_head = jax.grad(partial(mean_cross_entropy, chunk=5), 1)(x, head, targets)
    assert by_head.dtype == jnp.float32
    right = exact(x, head.astype(jnp.bfloat16), targets, None).by_head
    error = np.abs(np.asarray(by_head, np.float64) - right).max()
    assert error <= 4 * epsilon("bfloat16") * np.abs(right).max()


def test_without_any_target_it_is_zero_and_so_are_its_slopes() -> None:
    x, head, _ = drawn("float32")
    none = jnp.full((B, T), -1)
    loss, slopes = jax.value_and_grad(partial(mean_cross_entropy, chunk=4), (0, 1))(x, head, none)
    assert loss == 0
    assert not any(np.any(slope) for slope in slopes)


def test_a_target_that_the_vocabulary_lacks_makes_nan() -> None:
    x, head, targets = drawn("float32")
    assert jnp.isfinite(mean_cross_entropy(x, head, targets.at[1, 5].set(V - 1), chunk=4))
    assert jnp.isnan(mean_cross_entropy(x, head, targets.at[1, 5].set(V), chunk=4))


def test_tangents_and_second_derivatives() -> None:
    """By both modes, of both arguments."""
    *x, targets = drawn("float32")
    along = drawn("float32", seed=1)[:2]

    def chunked(x: jax.Array, head: jax.Array) -> jax.Array:
        return mean_cross_entropy(x, head, targets, soft_cap=4.0, chunk=5)

    def whole(x: jax.Array, head: jax.Array) -> jax.Array:
        return plain(x, head, targets, 4.0)

    def derivatives(loss: Any, x: Any, along: Any) -> Any:
        def tangent(x: jax.Array, head: jax.Array) -> jax.Array:
            return jax.jvp(loss, (x, head), tuple(along))[1]

        forward_over_reverse = jax.jvp(jax.grad(loss, (0, 1)), tuple(x), tuple(along))[1]
        return tangent(*x), forward_over_reverse, jax.grad(tangent, (0, 1))(*x)

    found, theirs = (
        jax.tree.leaves(jax.jit(partial(derivatives, f))(x, along)) for f in (chunked, whole)
    )
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), (x, list(along)))
        right = jax.tree.leaves(jax.jit(partial(derivatives, whole))(*wide))
    for one, other, true in zip(found, theirs, map(np.asarray, right), strict=True):
        check_against_peer(
            "second order", one, other, true, np.abs(true), np.float32, times=SECOND_ORDER
        )


def test_a_weight_that_is_not_trained_gets_no_slopes_made() -> None:
    """A frozen output layer costs no array of its size."""
    x, head, targets = drawn("float32")

    def made(argument: int) -> bool:
        slopes = jax.grad(partial(mean_cross_entropy, chunk=5), argument)
        return f"f32[{V},{D}] = add" in str(jax.make_jaxpr(slopes)(x, head, targets))

    assert made(1)
    assert not made(0)


def test_memory_is_not_that_of_the_logits() -> None:
    """Of compiled gradients: it grows with x, not with x times the vocabulary."""
    vocabulary, chunk = 4096, 32

    def temporary(length: int) -> int:
        shapes = [
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in (
                ((1, length, D), jnp.float32), ((vocabulary, D), jnp.float32),
                ((1, length), jnp.int32),
            )
        ]  # fmt: skip
        slopes = jax.value_and_grad(partial(mean_cross_entropy, chunk=chunk), (0, 1))
        compiled = jax.jit(slopes).lower(*shapes).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    short, long = temporary(1024), temporary(4096)
    of_one_chunk = 4 * chunk * vocabulary
    assert long < 5 * of_one_chunk < 4 * 1024 * vocabulary
    assert long - short < 4 * 4 * (4096 - 1024) * (D + 1)


NAME = "qwen2"


@pytest.mark.parametrize("name", [NAME, *thorough(*((n,) for n in NAMES if n != NAME))])
def test_gradient_norms_are_the_reference_s(name: str) -> None:
    """Transformers' own, of the mean loss of each next token of two rows."""
    tokens = padded(name)[0][:2]
    # All tokens are read, as there: of how many there are some frequencies are.
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    graph, weights = nnx.split(loaded(name))

    def loss(weights: Any) -> jax.Array:
        model: Decoder = nnx.merge(graph, weights)
        return model.loss(tokens, following, chunk=7)

    with jax.default_matmul_precision("highest"):
        slopes = jax.jit(jax.grad(loss))(weights)
    norms = {
        key_of(path): float(jnp.linalg.norm(leaf[...].ravel()))
        for path, leaf in nnx.to_flat_state(slopes)
    }
    assert_norms(name, norms)


def test_padding_and_documents_are_as_in_a_call() -> None:
    """The mean over the rows of the reference's logits, whatever stands in padding."""
    model = loaded(NAME, dtype="float32")
    tokens, mask = padded(NAME)
    targets = jnp.where(mask[:, 1:] & mask[:, :-1], tokens[:, 1:], -1)
    rows = {"attention_mask": mask[:, :-1]}
    with jax.default_matmul_precision("highest"):
        found = model.loss(tokens[:, :-1], targets, **rows, chunk=9)
    own = np.asarray(targets)

    def mean_loss(logits: Array, short: Array) -> Array:
        """Of two whole rows, and of one that is padded on the left and on the right."""
        whole = np.zeros((4, *logits.shape[1:]), np.float64)
        whole[:2], whole[2, -len(short) :], whole[3, : len(short)] = logits, short, short
        log = whole[:, :-1] - np.log(np.exp(whole[:, :-1]).sum(-1, keepdims=True))
        chosen = np.take_along_axis(log, np.maximum(own, 0)[..., None], -1)[..., 0]
        return np.asarray(-chosen[own >= 0].mean())

    whats = "logits", "short_logits"
    right = mean_loss(*(reference(NAME, what) for what in whats))
    theirs = mean_loss(*(expected(NAME)[what] for what in whats))
    check_against_peer("out", found, theirs, right, right, np.float32)


@pytest.mark.parametrize(
    ("targets", "chunk", "text"),
    [
        (np.zeros((1, 7), np.int32), None, r"the tokens' shape \(1, 8\), got int32\(1, 7\)"),
        (np.zeros((1, 8), np.float32), None, "must be signed integers"),
        (np.zeros((1, 8), np.uint32), None, "must be signed integers"),
        (np.zeros((1, 8), np.int32), 0, "chunk must be at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_named(targets: Array, chunk: int | None, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        loaded("qwen2").loss(jnp.zeros((1, 8), jnp.int32), jnp.asarray(targets), chunk=chunk)
