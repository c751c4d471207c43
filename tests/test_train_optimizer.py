"""What one update changes, by either optimiser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import TransformerConfig
from tests.promotion import of_others
from training.config import OptimizerConfig, TrainConfig
from training.muon import orthogonalized
from training.step import initial_state, train_step

MODEL = TransformerConfig(
    hidden_size=16, num_layers=3, num_heads=2, num_key_value_heads=1, head_dim=8, mlp_size=24
)
RATE = 1e-3


@pytest.fixture(autouse=True)
def optax_promotes() -> Iterator[None]:
    """The optimisers are of another library."""
    with of_others():
        yield


def _changes(optimizer: Any) -> dict[str, Any]:
    """What the second update adds: in the first, a head of zeros leaves the blocks no gradient."""
    options = OptimizerConfig(
        optimizer=optimizer, steps=1000, learning_rate=RATE, warmup_fraction=0, weight_decay=0
    )
    draw = np.random.default_rng(0)
    state = initial_state(TrainConfig(model=MODEL, optimizer=options))
    for _ in range(2):
        before = jax.tree.map(np.asarray, nnx.to_pure_dict(state.params))
        inputs, targets = draw.integers(256, size=(2, 4, 32)).astype(np.uint8)
        state, _ = train_step(state, inputs, targets, None, config=options)
    after = nnx.to_pure_dict(state.params)
    changes: dict[str, Any] = jax.tree.map(lambda new, old: np.asarray(new) - old, after, before)
    return changes


@pytest.fixture(scope="module")
def changes() -> dict[str, dict[str, Any]]:
    with of_others():
        return {name: _changes(name) for name in ("adamw", "muon")}


def _singular(matrices: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of each layer's matrix over their mean, (L, min(inputs, outputs))."""
    values = np.linalg.svd(matrices.astype(np.float64), compute_uv=False)
    return np.asarray(values / values.mean(-1, keepdims=True))


def test_muon_changes_each_layers_matrix_by_an_orthogonal_one_as_large_as_adamws(
    changes: dict[str, dict[str, Any]],
) -> None:
    for half in ("attention", "mlp"):
        for name, matrices in changes["muon"]["blocks"][half].items():
            assert matrices.shape[0] == MODEL.num_layers
            # Five steps of Newton and Schulz leave singular values between 0.7 and 1.2.
            assert _singular(matrices).max() < 1.2 / 0.7, name
            assert _singular(changes["adamw"]["blocks"][half][name]).max() > 1.2 / 0.7, name
            root_mean_square = np.sqrt(np.square(matrices).mean((1, 2)))
            assert np.all(root_mean_square > 0.5 * 0.2 * RATE)
            assert np.all(root_mean_square < 1.5 * 0.2 * RATE)


def test_muon_leaves_embedding_and_head_to_adamw(changes: dict[str, dict[str, Any]]) -> None:
    """The first update of both is the same there, and the second nearly."""
    for name in ("embedding", "head"):
        ours, adamws = changes["muon"][name], changes["adamw"][name]
        assert np.corrcoef(ours.ravel(), adamws.ravel())[0, 1] > 0.9
        assert _singular(ours).max() > 1.2 / 0.7


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_orthogonal_matrices_are_each_ones_own_whatever_stands_in_the_batch(dtype: Any) -> None:
    """Of several shapes, tall and wide: singular values near 1, and the singular vectors kept."""
    draw = np.random.default_rng(0)
    shapes = [(2, 24, 16), (3, 16, 24), (2, 16, 16), (1, 24, 16)]
    matrices = [draw.standard_normal(shape).astype(np.float32) for shape in shapes]
    found = orthogonalized([jnp.asarray(matrix) for matrix in matrices], dtype)
    for matrix, orthogonal in zip(matrices, found, strict=True):
        assert orthogonal.shape == matrix.shape
        assert orthogonal.dtype == dtype
        values = np.asarray(orthogonal, np.float64)
        singular = np.linalg.svd(values, compute_uv=False)
        assert singular.min() > 0.6
        assert singular.max() < 1.3
        left, _, right = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
        along = np.einsum("lmk,lmn,lkn->lk", left, values, right)
        assert along.min() > 0.6
