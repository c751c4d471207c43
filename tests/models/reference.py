"""The checkpoints that make_checkpoints.py wrote, and what Transformers gave for them."""

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

__all__ = ["CHECKPOINTS", "NAMES", "expected", "fields", "fixed", "loaded", "padded"]

CHECKPOINTS = pathlib.Path(__file__).parent / "checkpoints"
NAMES = sorted(folder.name for folder in CHECKPOINTS.iterdir())
type Array = np.ndarray[Any, Any]


@cache
def expected(name: str) -> dict[str, Array]:
    """What expected.npz holds: see make_checkpoints.py."""
    with np.load(CHECKPOINTS / name / "expected.npz") as file:
        return dict(file)


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
