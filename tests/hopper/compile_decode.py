"""Compiles one step of generation for an absent H200 and prints what it holds, as a JSON line."""

from __future__ import annotations

import json
import pathlib
import re
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.hopper.absent import h200s  # isort: skip

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from models.cache import KVCache
from models.decoder import Decoder, decoder_config
from models.generation.sampling import Chance, Draw
from models.generation.steps import Ends, Rows, steps_of

LENGTH, WINDOW = 32768, 4096
# Two layers of the attention of a Llama 3.2 1B, one with a window.
FIELDS = {
    "model_type": "gemma2", "vocab_size": 1024, "hidden_size": 256, "num_hidden_layers": 2,
    "intermediate_size": 512, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "sliding_window": WINDOW, "attn_logit_softcapping": None,
}  # fmt: skip


def main() -> None:
    """Bytes, and which operations copy something as large as a layer's keys."""
    config = decoder_config(FIELDS)
    with jax.default_device(jax.devices("cpu")[0]):
        model = Decoder(config, rngs=nnx.Rngs(0), dtype="bfloat16")
    steps = steps_of(model, Chance(True, None, False))
    row = jnp.zeros(1, jnp.int32)
    rows = Rows(row, row[:, None], row.astype(bool), jnp.int32(0))
    draw = Draw(jax.random.split(jax.random.key(0), 1), jnp.float32(0), jnp.float32(1))
    ends = Ends(jnp.zeros((8, 1), jnp.int32), jnp.int32(0))

    def empty() -> KVCache:
        return KVCache.empty(config, batch=1, capacity=LENGTH, dtype="bfloat16")

    given: Any = (steps.weights, jax.eval_shape(empty), rows, draw, ends)
    with h200s(1) as mesh:
        everywhere = NamedSharding(mesh, PartitionSpec())
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), given
        )
        step: Any = steps.step
        compiled = step.lower(*placed).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    kept = [x for layer in given[1].layers for x in layer]
    shapes = "|".join({re.escape(f"bf16[{','.join(map(str, x.shape))}]") for x in kept})
    print(
        json.dumps(
            {
                "jax": jax.__version__,
                "cache": sum(x.size * x.dtype.itemsize for x in kept),
                "alias": memory.alias_size_in_bytes,
                "temp": memory.temp_size_in_bytes,
                "copies": re.findall(rf"= ({shapes})\S* copy(?:-start)?\(", text),
                "kernels": sorted(set(re.findall(r'custom_call_target="(.*?)"', text))),
            }
        )
    )


if __name__ == "__main__":
    main()
