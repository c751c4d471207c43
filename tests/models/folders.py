"""Small folders as Hugging Face writes them, made with the safetensors library alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[Any]]

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "transformers_version": "4.46.0",
    "pretraining_tp": 1,
}
SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(2)
        for name, shape in {
            "input_layernorm": (16,),
            "self_attn.q_proj": (16, 16),
            "self_attn.k_proj": (8, 16),
            "self_attn.v_proj": (8, 16),
            "self_attn.o_proj": (16, 16),
            "post_attention_layernorm": (16,),
            "mlp.gate_proj": (24, 16),
            "mlp.up_proj": (24, 16),
            "mlp.down_proj": (16, 24),
        }.items()
    },
    "model.norm.weight": (16,),
    "lm_head.weight": (40, 16),
}
"""Every tensor of `LLAMA`, as Transformers names and shapes them."""

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def drawn(dtype: Any = BFLOAT16, *, seed: int = 0) -> Tensors:
    """Random weights of `LLAMA`."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


def write(folder: Path, fields: dict[str, Any], tensors: Tensors, *, files: int = 1) -> Path:
    """config.json and the tensors, in one file or dealt out to several with an index."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2))
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = dict(list(tensors.items())[number::files])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read(folder: Path) -> Tensors:
    """All tensors of a folder, through the library: bfloat16 as its bits."""
    from safetensors import deserialize

    found: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, entry in deserialize(file.read_bytes()):
            bits = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}[entry["dtype"]]
            assert name not in found
            found[name] = np.frombuffer(entry["data"], bits).reshape(entry["shape"])
    return found
