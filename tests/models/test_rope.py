"""Rotary frequencies are Transformers', at the sizes of real models: see make_checkpoints.py."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decoder import decoder_config
from models.decoder import rope as module
from models.decoder.rope import Rope
from models.positions import rotate

rotary_table = jax.jit(module.rotary_table, static_argnums=1)

REFERENCE = json.loads((pathlib.Path(__file__).parent / "rope.json").read_text())


def _rope(fields: dict[str, Any]) -> Rope:
    return decoder_config({"model_type": "llama", **fields}).layers[0].rope


def _kind(case: dict[str, Any]) -> str:
    fields = case["fields"].get("rope_scaling") or case["fields"].get("rope_parameters") or {}
    return str(fields.get("type", fields.get("rope_type", "default")))


@pytest.mark.parametrize(
    "case", REFERENCE, ids=[f"{i}-{_kind(c)}" for i, c in enumerate(REFERENCE)]
)
def test_frequencies(case: dict[str, Any]) -> None:
    rope = _rope(case["fields"])
    assert rope.attention_factor == pytest.approx(case["attention_factor"], rel=1e-12)
    at_one_and_last = jnp.asarray([[1, case["length"] - 1]], jnp.int32)
    (cosine, _), (_, sine) = (
        np.split(np.asarray(part[0, 0, 0]), 2) for part in rotary_table(at_one_and_last, rope)
    )
    frequencies = np.asarray(case["frequencies"])
    # The angle of position 1 is the frequency, but for float32 roundings, sine and cosine.
    angles = np.arctan2(sine[0], cosine[0])
    np.testing.assert_allclose(angles, frequencies, rtol=4e-7)
    factor = case["attention_factor"]
    np.testing.assert_allclose(np.hypot(sine[0], cosine[0]), factor, rtol=3e-7)
    if rope.dynamic is None:
        # Any other last bit would be many degrees off at the end of the sequence.
        np.testing.assert_allclose(rope.frequencies, frequencies, rtol=1.3e-7)


def test_dynamic_frequencies_are_each_rows_own() -> None:
    rope = _rope({"head_dim": 8, "max_position_embeddings": 16,
                  "rope_scaling": {"type": "dynamic", "factor": 2.0}})  # fmt: skip
    rows = jnp.asarray([[0, 1, 2], [29, 30, 31]], jnp.int32)
    for row in range(2):
        alone = rotary_table(rows[row : row + 1], rope)
        for mine, both in zip(alone, rotary_table(rows, rope), strict=True):
            np.testing.assert_array_equal(mine[0], both[row])


def test_products_of_turned_vectors_depend_on_the_distance_alone() -> None:
    rope = _rope({"head_dim": 8, "rope_scaling": {"type": "yarn", "factor": 4.0}})
    q, k = np.random.default_rng(5).standard_normal((2, 1, 1, 1, 8), np.float32)

    def product(query_at: int, key_at: int) -> float:
        turned = [
            rotate(jnp.asarray(x), rotary_table(jnp.asarray([[place]], jnp.int32), rope))
            for x, place in ((q, query_at), (k, key_at))
        ]
        return float(jax.numpy.vdot(turned[0], turned[1]))

    assert product(11, 4) == pytest.approx(product(107, 100), abs=1e-4)
    assert product(11, 4) != pytest.approx(product(11, 5), abs=1e-2)
