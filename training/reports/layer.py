"""What attention takes as sequences grow: bytes and time, implementation by implementation.

Measured is one attention layer of the model (projections, rotary positions, causal attention): the
compiled gradient of its squared output with respect to its input and weights, at batch 1.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models import Attention, TransformerConfig
from models.implementations import AttnImplementation
from models.transformer import rotary_table
from training.config import MemoryConfig
from training.reports.cells import Cell, Job, Watch, fill
from training.reports.place import Place
from training.reports.running import Run, run


def what_is_measured(model: TransformerConfig) -> str:
    return (
        f"gradient step of one attention layer, batch 1, {model.num_heads} query and"
        f" {model.num_key_value_heads} key heads of {model.head_dim}, {model.dtype}, causal"
    )


def measure(
    model: TransformerConfig, config: MemoryConfig, place: Place, watch: Watch
) -> list[Cell]:
    """The report's cells, by implementation and length; none once a stop was asked for."""
    jobs = [
        Job(
            Cell(name, length),
            functools.partial(_lower, model, name, length, place),
            functools.partial(_run, _shapes(model, name, length)[1:], place),
        )
        for name in dict.fromkeys(config.memory_implementations)
        for length in sorted(set(config.memory_lengths))
    ]
    return fill(jobs, place, watch, seconds=config.memory_seconds)


def _shapes(
    model: TransformerConfig, name: AttnImplementation, length: int
) -> tuple[Any, Any, jax.ShapeDtypeStruct]:
    """The layer's graph, its weights and its input."""
    config = dataclasses.replace(model, attn_implementation=name)
    layer = nnx.eval_shape(lambda: Attention(config, rngs=nnx.Rngs(0)))
    graph, weights = nnx.split(layer)
    shape = (1, length, config.hidden_size)
    return graph, weights, jax.ShapeDtypeStruct(shape, jnp.dtype(config.dtype))


def _lower(
    model: TransformerConfig, name: AttnImplementation, length: int, place: Place
) -> jax.stages.Lowered:
    """The gradient step of one layer."""
    graph, weights, x = _shapes(model, name, length)

    def energy(weights: Any, x: jax.Array) -> jax.Array:
        table = rotary_table(jnp.arange(length)[None], model)
        return jnp.square(nnx.merge(graph, weights)(x, table).astype(jnp.float32)).sum()

    gradient = jax.jit(jax.grad(energy, argnums=(0, 1)))
    return gradient.lower(place.whole(weights), place.cut(x))


def _run(shapes: Any, place: Place, program: Any, *, expected_bytes: int, deadline: float) -> Run:
    def execute(arguments: Any) -> Any:
        jax.block_until_ready(program(*arguments))
        return arguments

    def arguments() -> Any:
        weights, x = _random_like(shapes)
        return place.whole(weights), place.cut(x)

    return run(execute, arguments, expected_bytes=expected_bytes, deadline=deadline)


def _random_like(shapes: Any) -> Any:
    """Small random numbers, a million of them over and over."""
    draw = np.random.default_rng(0)
    numbers = 0.1 * draw.standard_normal(1 << 20, np.float32)

    def resized(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.asarray(np.resize(numbers.astype(leaf.dtype), leaf.shape))

    return jax.tree.map(resized, shapes)
