"""Writes tests/models/checkpoints: tiny models of Transformers, and what they give; rope.json.

    python tests/models/make_checkpoints.py [NAME ...]     the extra `references` has what it needs

Each folder NAME has config.json, as it stands in `CASES` (or as Transformers writes it), random
weights as Transformers writes them, and expected.npz, in float32:

    tokens         int32 (2, T)
    logits         float32 (2, T, V)
    short          how many tokens the shorter row has when the two are padded on the left
    short_logits   float32 (short, V): its real tokens' logits, of tokens[1, :short]
    gradient_keys, gradient_norms     of the mean loss of each next token, by the weight's key
    logits_off, short_logits_off, gradient_norms_off     what computing in float64 adds to them
    prompts        the lengths of two prompts, tokens[0, :prompts[0]] and tokens[1, :prompts[1]]
    bfloat16_error root of the mean square of what computing in bfloat16 changes in the logits
    greedy         int32 (2, 32): the tokens that greedy decoding adds to each

rope.json has the rotary frequencies of models as large as they come, by the fields of config.json
that ask for them, and how long the sequence is.
"""

from __future__ import annotations

import copy
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

Model = Any  # torch.nn.Module, of which the checks of types know nothing
Results = dict[str, np.ndarray[Any, Any]]

FOLDER = pathlib.Path(__file__).parent / "checkpoints"
LENGTH, SHORT, PROMPTS, NEW = 32, 21, (20, 13), 32

_SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GEMMA = _SMALL | {"head_dim": 8, "query_pre_attn_scalar": 24}

# Its own config.json, or what Transformers writes of it (WRITTEN); shards (SHARDED) or one file;
# weights stored in float32 or bfloat16 (HALF).
WRITTEN, SHARDED, HALF = "written", "sharded", "half"
CASES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "llama": (
        _SMALL
        | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "rms_norm_eps": 1e-5,
            "rope_theta": 500.0,
            "rope_scaling": None,
            "torch_dtype": "float32",
            "pretraining_tp": 1,
            "use_cache": True,
            "transformers_version": "4.31.0",
        },
        set(),
    ),
    "llama-biases": (
        {name: value for name, value in _SMALL.items() if name != "num_key_value_heads"}
        | {"model_type": "llama", "head_dim": 12, "attention_bias": True, "mlp_bias": True},
        {WRITTEN, SHARDED},
    ),
    "llama-linear": (
        _SMALL
        | {
            "model_type": "llama",
            "max_position_embeddings": 16,
            "rope_scaling": {"type": "linear", "factor": 4.0},
            "hidden_act": "gelu",
        },
        set(),
    ),
    "llama-llama3": (
        _SMALL
        | {
            "model_type": "llama",
            "rope_theta": 100.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        },
        {HALF},
    ),
    "llama-dynamic": (
        _SMALL
        | {
            "model_type": "llama",
            "max_position_embeddings": 16,
            "rope_scaling": {"type": "dynamic", "factor": 3.0},
        },
        set(),
    ),
    "llama-yarn": (
        _SMALL
        | {
            "model_type": "llama",
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 200.0,
                "factor": 8.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "truncate": False,
                "mscale": 1.0,
                "mscale_all_dim": 0.4,
            },
            "dtype": "float32",
        },
        set(),
    ),
    "mistral": (
        _SMALL | {"model_type": "mistral", "sliding_window": 8},
        {WRITTEN, SHARDED},
    ),
    "mistral-full": (
        _SMALL
        | {
            "model_type": "mistral",
            "head_dim": 12,
            "sliding_window": None,
            "num_key_value_heads": 1,
        },
        set(),
    ),
    "qwen2": (
        _SMALL
        | {
            "model_type": "qwen2",
            "rope_theta": 1000000.0,
            "sliding_window": 8,
            "use_sliding_window": False,
            "max_window_layers": 1,
            "tie_word_embeddings": True,
        },
        set(),
    ),
    "qwen2-window": (
        _SMALL
        | {
            "model_type": "qwen2",
            "num_hidden_layers": 3,
            "sliding_window": 8,
            "use_sliding_window": True,
            "max_window_layers": 1,
        },
        set(),
    ),
    "qwen2-yarn": (
        _SMALL
        | {
            "model_type": "qwen2",
            "max_position_embeddings": 32,
            "rope_theta": 1000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 8,
            },
        },
        {SHARDED},
    ),
    "qwen3": (
        _SMALL | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
        {WRITTEN},
    ),
    "qwen3-window": (
        _SMALL
        | {
            "model_type": "qwen3",
            "num_hidden_layers": 3,
            "head_dim": 16,
            "attention_bias": True,
            "sliding_window": 6,
            "use_sliding_window": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        set(),
    ),
    "gemma2": (
        _GEMMA
        | {
            "model_type": "gemma2",
            "num_hidden_layers": 3,
            "sliding_window": 8,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 6.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_activation": "gelu_pytorch_tanh",
            "cache_implementation": "hybrid",
        },
        set(),
    ),
    "gemma2-uncapped": (
        _GEMMA
        | {
            "model_type": "gemma2",
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"],
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "attention_bias": True,
            "tie_word_embeddings": False,
        },
        {WRITTEN},
    ),
    "gemma3": (
        _GEMMA
        | {
            "model_type": "gemma3_text",
            "num_hidden_layers": 4,
            "sliding_window": 8,
            "sliding_window_pattern": 3,
            "rope_theta": 1000.0,
            "rope_local_base_freq": 50.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        set(),
    ),
    "gemma3-written": (
        _GEMMA
        | {
            "model_type": "gemma3_text",
            "num_hidden_layers": 2,
            "sliding_window": 6,
            "layer_types": ["full_attention", "sliding_attention"],
            "final_logit_softcapping": 10.0,
        },
        {WRITTEN, SHARDED},
    ),
}

# Fields of config.json, and the length of a sequence: of well-known checkpoints and beside them.
ROPES: list[tuple[dict[str, Any], int]] = [
    ({"head_dim": 128, "rope_theta": 10000.0}, 4096),
    ({"head_dim": 128, "rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 8.0}}, 4096),
    (
        {
            "head_dim": 64,
            "rope_theta": 500000.0,
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
        },
        131072,
    ),
    (
        {
            "head_dim": 128,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 32768,
            "rope_scaling": {
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "type": "yarn",
            },
        },
        131072,
    ),
    (
        {
            "head_dim": 64,
            "rope_theta": 150000.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": None,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "max_position_embeddings": 131072,
        },
        131072,
    ),
    (
        {
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "rope_scaling": {"rope_type": "yarn", "factor": 16.0, "attention_factor": 1.25},
        },
        65536,
    ),
    (
        {
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
        12345,
    ),
    (
        {
            "head_dim": 96,
            "max_position_embeddings": 4096,
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
        1000,
    ),
]


def make_ropes(file: pathlib.Path) -> None:
    """Writes rope.json."""
    results = []
    for fields, length in ROPES:
        config = LlamaConfig(**copy.deepcopy(fields))
        rotary = LlamaRotaryEmbedding(config)
        rotary(torch.zeros(1), torch.tensor([[length - 1]]))
        results.append(
            {
                "fields": fields,
                "length": length,
                "frequencies": rotary.inv_freq.tolist(),
                "attention_factor": rotary.attention_scaling,
            }
        )
    file.write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n")


def make(name: str, folder: pathlib.Path) -> None:
    """Writes one case's folder anew."""
    fields, how = CASES[name]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    stored = torch.bfloat16 if HALF in how else None
    model, results = next(_decided(random_model(folder, seed, stored) for seed in range(100)))
    np.savez_compressed(folder / "expected.npz", **results)
    if HALF in how:
        model = model.to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as written:
        model.save_pretrained(written, max_shard_size="40KB" if SHARDED in how else "1GB")
        for file in pathlib.Path(written).iterdir():
            if file.name != "config.json" or WRITTEN in how:
                shutil.copy(file, folder)
    (folder / "generation_config.json").unlink(missing_ok=True)


def _decided(models: Iterable[Model]) -> Iterator[tuple[Model, Results]]:
    """Those models whose greedy tokens no rounding chooses, with their results."""
    for model in models:
        results, margin = expected(model)
        if margin > 2e-3:
            yield model, results


def random_model(folder: pathlib.Path, seed: int, stored: torch.dtype | None = None) -> Model:
    """The model of a folder's config.json, float32, with weights that make attention choose.

    The weights are numbers of the dtype `stored`, if one is given.
    """
    config = AutoConfig.from_pretrained(folder)
    config.dtype = torch.float32
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            size = 0.5 if "embed" in key else 0.25
            drawn = size * torch.randn(weight.shape, generator=draw)
            weight.copy_(weight + drawn if "norm" in key else drawn)
            if stored is not None:
                weight.copy_(weight.to(stored))
    return model


def expected(model: Model) -> tuple[Results, float]:
    """What expected.npz holds, see above; by how much the greedy tokens beat the next best."""
    fresh = copy.deepcopy(model)  # dynamic frequencies remember the longest sequence so far
    half = copy.deepcopy(model).to(torch.bfloat16)
    wide = copy.deepcopy(model).to(torch.float64)
    vocabulary = model.config.vocab_size
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (2, LENGTH), generator=draw)
    found = _numbers(model, tokens)
    with _float64_for_float32():
        exact = _numbers(wide, tokens)
    with torch.no_grad():
        chosen = [_greedy(fresh, tokens[row, :length]) for row, length in enumerate(PROMPTS)]
        change = half(tokens).logits.float() - torch.from_numpy(found["logits"])
    off = {f"{name}_off": (exact[name] - x).astype(np.float32) for name, x in found.items()}
    results = {
        "tokens": tokens.numpy().astype(np.int32),
        "short": np.int32(SHORT),
        **found,
        **off,
        "bfloat16_error": np.float32(change.square().mean().sqrt()),
        "gradient_keys": np.array([key for key, _ in model.named_parameters()]),
        "prompts": np.array(PROMPTS, np.int32),
        "greedy": np.stack([greedy for greedy, _ in chosen]).astype(np.int32),
    }
    return results, min(margin for _, margin in chosen)


@contextmanager
def _float64_for_float32() -> Iterator[None]:
    """Transformers names float32 where half precision is too little for it: norms and softmax."""
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def _numbers(model: Model, tokens: torch.Tensor) -> Results:
    """The logits, those of the short row, and the gradients' norms."""
    fresh = copy.deepcopy(model)
    logits = model(tokens).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1)
    )
    loss.backward()
    norms = torch.stack([weight.grad.norm() for _, weight in model.named_parameters()])
    with torch.no_grad():
        short = _short_logits(fresh, tokens)
    return {
        "logits": logits.detach().numpy(),
        "short_logits": short.numpy(),
        "gradient_norms": norms.numpy(),
    }


def _short_logits(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    """Of the second row cut to SHORT tokens, in a batch that is padded on the left."""
    alone = copy.deepcopy(model)(tokens[1:, :SHORT]).logits[0]
    mask = torch.ones_like(tokens)
    mask[1, : LENGTH - SHORT] = 0
    padded = tokens.clone()
    padded[1] = torch.cat((torch.zeros(LENGTH - SHORT, dtype=tokens.dtype), tokens[1, :SHORT]))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    together = model(padded, attention_mask=mask, position_ids=positions).logits
    if _rope_type(model.config) == "dynamic":
        return alone  # its frequencies are those of the batch's longest row
    torch.testing.assert_close(together[1, LENGTH - SHORT :], alone, rtol=1e-4, atol=1e-4)
    return together[1, LENGTH - SHORT :]


def _rope_type(config: Any) -> str | None:
    kind: str | None = config.rope_parameters.get("rope_type")
    return kind


def _greedy(model: Model, prompt: torch.Tensor) -> tuple[np.ndarray[Any, Any], float]:
    """NEW tokens after the prompt, and the smallest distance to the next best logit."""
    out = copy.deepcopy(model).generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        do_sample=False,
        min_new_tokens=NEW,
        max_new_tokens=NEW,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.cat(out.logits).topk(2).values
    margin = float((best[:, 0] - best[:, 1]).min())
    return out.sequences[0, len(prompt) :].numpy(), margin


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    make_ropes(FOLDER.parent / "rope.json")
    for name in sys.argv[1:] or CASES:
        make(name, FOLDER / name)
        size = sum(file.stat().st_size for file in (FOLDER / name).iterdir())
        print(f"{name}: {size / 1024:.0f} KiB")
