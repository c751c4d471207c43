"""The decoder gives what Transformers gives, for checkpoints that Transformers wrote."""

from __future__ import annotations

from functools import cache
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jattn.flash_attention import interpreted
from models.implementations import AttnImplementation
from models.rematerialisation import Rematerialize
from tests.cases import thorough
from tests.models.reference import (
    NAMES,
    assert_norms,
    assert_right,
    exact,
    fixed,
    key_of,
    loaded,
    padded,
)

type Array = np.ndarray[Any, Any]

# Of each way in which families differ that has its own derivative.
_WITH_GRADIENTS = ("gemma2", "llama-biases", "qwen3-window")
_ALWAYS = (
    *_WITH_GRADIENTS,
    "gemma3",
    "llama-dynamic",
    "llama-llama3",
    "llama-yarn",
    "mistral",
    "qwen2-window",
)
_EACH = [*_ALWAYS, *thorough(*((name,) for name in NAMES if name not in _ALWAYS))]


def _loss(weights: Any, call: Any, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, Any]:
    """The mean loss of each next token of the two whole rows; the logits of all four."""
    logits = call(weights, tokens, attention_mask=mask)
    chances = jax.nn.log_softmax(logits[:2, :-1])
    chosen = jnp.take_along_axis(chances, tokens[:2, 1:, None], axis=-1)
    return -chosen.mean(), logits


@cache
def _results(
    name: str, implementation: str, gradients: bool, rematerialize: str = "nothing"
) -> tuple[Array, dict[str, float]]:
    """Logits of the four rows of `padded`, and the norms of the loss's gradients by key."""
    call, weights = fixed(
        loaded(name, attn_implementation=implementation, rematerialize=rematerialize)
    )
    arguments = (call, *padded(name))
    with jax.default_matmul_precision("highest"):
        if not gradients:
            loss = jax.jit(_loss, static_argnums=1)
            return np.asarray(loss(weights, *arguments)[1]), {}
        both = jax.jit(jax.value_and_grad(_loss, has_aux=True), static_argnums=1)
        (_, logits), slopes = both(weights, *arguments)
    norms = {
        key_of(path): float(jnp.linalg.norm(leaf[...].ravel()))
        for path, leaf in nnx.to_flat_state(slopes)
    }
    return np.asarray(logits), norms


def _assert_padded(name: str, logits: Array) -> None:
    """Of the two rows that are padded, on the left and on the right."""
    short = len(exact(name, "short_logits"))
    assert_right(name, "short_logits", logits[2, -short:])
    assert_right(name, "short_logits", logits[3, :short])


def _assert_all(name: str, logits: Array, norms: dict[str, float]) -> None:
    assert_right(name, "logits", logits[:2])
    _assert_padded(name, logits)
    if norms:
        assert_norms(name, norms)


@pytest.mark.parametrize("name", _EACH)
def test_logits(name: str) -> None:
    assert_right(name, "logits", _results(name, "eager", name in _WITH_GRADIENTS)[0][:2])


@pytest.mark.parametrize("name", _EACH)
def test_padding_on_either_side_changes_no_logits(name: str) -> None:
    _assert_padded(name, _results(name, "eager", name in _WITH_GRADIENTS)[0])


@pytest.mark.parametrize(
    "name", [*_WITH_GRADIENTS, *thorough(*((n,) for n in NAMES if n not in _WITH_GRADIENTS))]
)
def test_gradient_norms(name: str) -> None:
    assert_norms(name, _results(name, "eager", True)[1])


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("gemma2", "sdpa"),
        *thorough(
            *(
                (name, implementation)
                for name in NAMES
                for implementation in ("memory_efficient", "sdpa")
                if (name, implementation) != ("gemma2", "sdpa")
            )
        ),
    ],
)
def test_implementations_are_as_exact(name: str, implementation: str) -> None:
    gradients = (name, implementation) != ("gemma2", "sdpa")
    _assert_all(name, *_results(name, implementation, gradients))


@pytest.mark.parametrize(
    ("name", "implementation"),
    thorough(
        *(
            (name, implementation)
            for name in ("qwen3-window", "gemma3-written", "llama-yarn")
            for implementation in ("flash", "flash_attention_2")
        )
    ),
)
def test_kernels_are_as_exact(name: str, implementation: str) -> None:
    with interpreted("portable"):
        found = _results(name, implementation, True)
    _assert_all(name, *found)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["sdpa", "flash", "memory_efficient"])
@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_gives_the_same(name: str, implementation: str) -> None:
    _assert_all(name, *_results(name, implementation, True))


@pytest.mark.parametrize(
    ("name", "rematerialize"),
    thorough(*((name, what) for name in _WITH_GRADIENTS for what in get_args(Rematerialize)[1:])),
)
def test_rematerialised_blocks_give_the_same(name: str, rematerialize: str) -> None:
    _assert_all(name, *_results(name, "sdpa", True, rematerialize))


def test_every_implementation_has_a_test() -> None:
    tried = {"eager", "sdpa", "memory_efficient", "flash", "flash_attention_2"}
    assert set(get_args(AttnImplementation)) == tried
