"""A mask of 2^32 elements is read where it is, by the loops too."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import jattn

LENGTH = 2**16
ROWS = jax.ShapeDtypeStruct((1, LENGTH, 1, 8), jnp.bfloat16)
MASK = jax.ShapeDtypeStruct((1, 1, LENGTH, LENGTH), jnp.bool_)


def test_loops_make_the_gradient_without_an_array_of_its_size() -> None:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        return jattn.memory_efficient_attention(q, k, v, mask=mask).astype(jnp.float32).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(ROWS, ROWS, ROWS, MASK).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.argument_size_in_bytes > LENGTH**2
    assert memory.temp_size_in_bytes < LENGTH**2 / 64
