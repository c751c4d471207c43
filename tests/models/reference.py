"""The checkpoints that make_checkpoints.py wrote, and what Transformers gave for them.

In float64 that is what is right, and in float32 it says how far from it one may be: by
`tests.tolerance` twice as far, three times in gradients, and a few ulp.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import Decoder, DecoderConfig, from_pretrained
from models.decoder import decoder_config
from tests import tolerance

__all__ = [
    "CHECKPOINTS",
    "NAMES",
    "assert_norms",
    "assert_right",
    "config",
    "exact",
    "expected",
    "fields",
    "fixed",
    "key_of",
    "loaded",
    "padded",
]

CHECKPOINTS = pathlib.Path(__file__).parent / "checkpoints"
NAMES = sorted(folder.name for folder in CHECKPOINTS.iterdir())
type Array = np.ndarray[Any, Any]


@cache
def expected(name: str) -> dict[str, Array]:
    """What expected.npz holds: see make_checkpoints.py."""
    with np.load(CHECKPOINTS / name / "expected.npz") as file:
        return dict(file)


def exact(name: str, what: str) -> Array:
    """In float64 its "logits", "short_logits" or "gradient_norms"."""
    kept = expected(name)
    total: Array = kept[what].astype(np.float64) + kept[f"{what}_off"]
    return total


def assert_right(name: str, what: str, got: Any, part: Any = ...) -> None:
    """`got` is that part of the logits, as near to float64 as Transformers' own of float32 are."""
    true = exact(name, what)
    theirs = tolerance.error(expected(name)[what], true)
    bound = tolerance.allowed("out", theirs, true, np.abs(true), np.float32)
    found = tolerance.error(got, true[part])
    assert found <= bound, f"{name}: error {found:.3g}, allowed {bound:.3g}, theirs {theirs:.3g}"


def assert_norms(name: str, norms: dict[str, float]) -> None:
    """Norms of the loss's gradients by key, each relative to its own."""
    keys = list(expected(name)["gradient_keys"])
    assert sorted(norms) == sorted(keys)
    true = exact(name, "gradient_norms")
    one = np.ones_like(true)
    found, theirs = (
        x / true for x in (np.array([norms[key] for key in keys]), expected(name)["gradient_norms"])
    )
    tolerance.check_against_peer(f"{name} gradient", found, theirs, one, one, np.float32)


def fields(name: str) -> dict[str, Any]:
    """A checkpoint's config.json."""
    read: dict[str, Any] = json.loads((CHECKPOINTS / name / "config.json").read_text())
    return read


@cache
def config(name: str) -> DecoderConfig:
    """A checkpoint's config.json, understood."""
    return decoder_config(fields(name))


def key_of(path: tuple[Any, ...]) -> str:
    """The name of a parameter in a checkpoint."""
    key = ".".join(map(str, path))
    return key if key.startswith("lm_head") else f"model.{key}"


def loaded(name: str, **options: Any) -> Decoder:
    """A checkpoint as a decoder, in float32 unless the options say otherwise."""
    return from_pretrained(CHECKPOINTS / name, **{"dtype": "float32", **options})


def fixed(model: Decoder) -> tuple[Callable[..., jax.Array], Any]:
    """The decoder as a function of its weights and its arguments, and the weights."""
    graph, weights = nnx.split(model)

    def call(weights: Any, *arguments: Any, **keywords: Any) -> jax.Array:
        merged: Decoder = nnx.merge(graph, weights)
        return merged(*arguments, **keywords)

    return call, weights


def padded(name: str) -> tuple[jax.Array, jax.Array]:
    """Tokens and mask of four rows: the checkpoint's two, the second one's start padded on the left
    and on the right. Padding is a token that no vocabulary has."""
    tokens, short = expected(name)["tokens"], int(expected(name)["short"])
    left, right = np.full((2, tokens.shape[1]), 10**6, np.int32)
    left[-short:] = right[:short] = tokens[1, :short]
    rows = np.stack((*tokens, left, right))
    return jnp.asarray(rows), jnp.asarray(rows < 10**6)
