"""Muon (Jordan et al. 2024): each matrix moves along its momentum, made orthogonal.

    M = beta M + (1 - beta) G                   momentum; a step of Nesterov's looks ahead along G
    X = M / |M|
    X = a X + (b A + c A A) X,  A = X Xᵀ        five times: singular values come near 1
    W = W - rate (X scale + decay W)

The scale makes the root mean square of an update about AdamW's (Liu et al. 2025, section 2.2), so
that one learning rate serves both. Matrices of one shape, of all layers, are multiplied as one
batch, and on a GPU in bfloat16, which the iterations bear; a CPU keeps to float32.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax  # type: ignore[import-untyped]

_A, _B, _C = 3.4445, -4.7750, 2.0315  # Jordan et al.: steepest at 0, ends between 0.7 and 1.2
_ITERATIONS = 5
_RMS_OF_ADAM = 0.2


class MuonState(NamedTuple):
    """What is kept from step to step."""

    done: jax.Array  # int32, updates
    momentum: Any  # of the gradients, float32


def muon(
    learning_rate: optax.Schedule, *, beta1: float, beta2: float, weight_decay: float
) -> optax.GradientTransformation:
    """Muon for the blocks' matrices, arrays (L, inputs, outputs), and AdamW for all others.

    Args:
        learning_rate: of both, by the number of updates done.
        beta1: memory of the gradient, of both.
        beta2: AdamW's memory of the squared gradient.
        weight_decay: per unit of learning rate.
    """
    return optax.partition(
        {
            "muon": optax.chain(
                _orthogonal_momentum(beta1),
                optax.add_decayed_weights(weight_decay),
                optax.scale_by_learning_rate(learning_rate),
            ),
            "adamw": optax.adamw(
                learning_rate, b1=beta1, b2=beta2, weight_decay=weight_decay, nesterov=True
            ),
        },
        lambda weights: jax.tree.map(lambda leaf: "muon" if leaf.ndim == 3 else "adamw", weights),
    )


def orthogonalized(matrices: Sequence[jax.Array], dtype: jax.typing.DTypeLike) -> list[jax.Array]:
    """Each matrix with its singular values brought near 1.

    Args:
        matrices: float32 (L, m, n) each, of any L, m and n.
        dtype: of the iterations.

    Returns:
        The same shapes, of `dtype`.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for number, matrix in enumerate(matrices):
        alike.setdefault(tuple(sorted(matrix.shape[1:])), []).append(number)
    found: dict[int, jax.Array] = {}
    for numbers in alike.values():
        wide = [_wide(_unit(matrices[number])).astype(dtype) for number in numbers]
        x = jnp.concatenate(wide)
        identity = jnp.eye(x.shape[1], dtype=x.dtype)
        for _ in range(_ITERATIONS):
            gram = x @ x.mT
            x = (_A * identity + _B * gram + _C * (gram @ gram)) @ x
        start = 0
        for number in numbers:
            layers, rows, columns = matrices[number].shape
            own = x[start : start + layers]
            found[number] = own.mT if rows > columns else own
            start += layers
    return [found[number] for number in range(len(matrices))]


def _unit(x: jax.Array) -> jax.Array:
    norm = jnp.sqrt(jnp.square(x).sum(axis=(1, 2), keepdims=True))
    return x / (norm + 1e-8)


def _wide(x: jax.Array) -> jax.Array:
    """With no more rows than columns, so that the product of X and Xᵀ is the smaller one."""
    return x.mT if x.shape[1] > x.shape[2] else x


def _orthogonal_momentum(beta: float) -> optax.GradientTransformation:
    def init(weights: Any) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(weights))

    def update(gradients: Any, state: MuonState, weights: Any = None) -> tuple[Any, MuonState]:
        del weights
        momentum = optax.tree.update_moment(gradients, state.momentum, beta, 1)
        count = optax.safe_increment(state.done)
        ahead = jax.tree.map(
            lambda m, g: beta * m + (1 - beta) * g,
            optax.tree.bias_correction(momentum, beta, optax.safe_increment(count)),
            optax.tree.bias_correction(gradients, beta, count),
        )
        leaves, tree = jax.tree.flatten(ahead)
        return jax.tree.unflatten(tree, _updates(*leaves)), MuonState(count, momentum)

    return optax.GradientTransformation(init, update)


def _updates(*matrices: jax.Array) -> list[jax.Array]:
    def of(dtype: jax.typing.DTypeLike, *matrices: jax.Array) -> list[jax.Array]:
        return [
            x.astype(jnp.float32) * (_RMS_OF_ADAM * max(x.shape[1:]) ** 0.5)
            for x in orthogonalized(matrices, dtype)
        ]

    updates: list[jax.Array] = jax.lax.platform_dependent(
        *matrices,
        cpu=functools.partial(of, jnp.float32),
        default=functools.partial(of, jnp.bfloat16),
    )
    return updates
