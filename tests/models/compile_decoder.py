"""Compiles a decoder of Llama 3.2's widths for an H200 that is not there; prints what came out.

    PYTHONPATH=.compilers/0.11.2 .venv/bin/python tests/models/compile_decoder.py

The prefill of 32k tokens in bfloat16, of which the last logits are kept: for 2 and 6 layers, padded
and not, the bytes held beside arguments and results, the most arrays that one operation reads, how
many weights are copied or transposed, and how often each kernel is called. Then the bytes held by
the loss of as many tokens and its gradients, given what leaves the last block.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from tests.portable.absent import gpus  # isort: skip

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.decoder import Decoder, decoder_config
from models.decoder.cross_entropy import mean_cross_entropy
from tests.models.reference import fixed

LENGTH = 32768
SIZES = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
# A line of an HLO program: its operation, and what that reads.
_OPERATION = re.compile(r" = \S+(?: [^=(]*)? ([\w-]+)\(([^)]*)\)")
# But a counter of tiles, one number.
_COPY = re.compile(r" = (?!s32\[1\])\S+ (?:copy|transpose)\(")


def compiled(mesh: Mesh, layers: int, *, padded: bool) -> dict[str, Any]:
    """What one program holds and does."""
    config = decoder_config(SIZES | {"num_hidden_layers": layers})
    call, weights = fixed(
        nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype="bfloat16"))
    )

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def prefill(weights: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        mask_given = {"attention_mask": mask} if padded else {}
        logits: jax.Array = call(weights, tokens, logits_to_keep=1, **mask_given)
        return logits

    row = placed(jax.ShapeDtypeStruct((1, LENGTH), jnp.int32))
    program = jax.jit(prefill).lower(jax.tree.map(placed, weights), row, row).compile()
    memory = program.memory_analysis()
    assert memory is not None
    text = program.as_text() or ""
    entry = text[text.index("\nENTRY") :]
    operations = _OPERATION.findall(entry)
    return {
        "held": int(memory.temp_size_in_bytes),
        "most_read": max(reads.count("%") for name, reads in operations if name == "fusion"),
        "copies": len(_COPY.findall(entry)),
        "kernels": text.count('custom_call_target="mosaic_gpu'),
    }


def compiled_loss(mesh: Mesh) -> dict[str, int]:
    """What the loss's program holds: that of the output layer alone, bfloat16."""
    place = NamedSharding(mesh, PartitionSpec())
    width, vocabulary = SIZES["hidden_size"], SIZES["vocab_size"]
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        for shape, dtype in (
            ((1, LENGTH, width), jnp.bfloat16),
            ((vocabulary, width), jnp.bfloat16),
            ((1, LENGTH), jnp.int32),
        )
    ]
    program = jax.jit(jax.value_and_grad(mean_cross_entropy, (0, 1))).lower(*arguments).compile()
    memory = program.memory_analysis()
    assert memory is not None
    return {"held": int(memory.temp_size_in_bytes)}


if __name__ == "__main__":
    with gpus("h200", 1) as mesh:
        for layers, padded in ((2, False), (6, False), (2, True)):
            print(json.dumps(compiled(mesh, layers, padded=padded)), flush=True)
        print(json.dumps(compiled_loss(mesh)), flush=True)
