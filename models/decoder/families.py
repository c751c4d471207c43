"""The families of decoders, and what each makes of the fields of its config.json.

A family is a table: the fields that it reads with what they are where the file lacks them, its
fixed traits, and which of its layers have a window. All else is common to all families. A field
that no family knows stops the reading, whatever it may mean, unless it is null: see
`models.decoder.fields` for what is known to change no result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from models.decoder.config import DecoderConfig, Layer
from models.decoder.fields import check_unread, checked, checked_ids, dtype_of
from models.decoder.layers import ACTIVATIONS
from models.decoder.rope_fields import ROPE_FIELDS, ropes_by_layer_type

__all__ = ["FAMILIES", "Family", "decoder_config"]

type Fields = Mapping[str, Any]

_FULL, _SLIDING = "full_attention", "sliding_attention"


def _all_full(fields: Fields) -> list[str]:
    return [_FULL] * fields["num_hidden_layers"]


def _all_alike(fields: Fields) -> list[str]:
    """Mistral: every layer has the window, where there is one."""
    return [_FULL if fields["sliding_window"] is None else _SLIDING] * fields["num_hidden_layers"]


def _from_a_layer_on(fields: Fields) -> list[str]:
    """Qwen: layers from `max_window_layers` on have the window, where it is used at all."""
    if not fields["use_sliding_window"] or fields["sliding_window"] is None:
        return _all_full(fields)
    first = fields["max_window_layers"]
    return [_SLIDING if i >= first else _FULL for i in range(fields["num_hidden_layers"])]


def _all_but_every(fields: Fields) -> list[str]:
    """Gemma: the last of each `sliding_window_pattern` layers is full, the others are not."""
    every = fields["sliding_window_pattern"]
    return [_FULL if (i + 1) % every == 0 else _SLIDING for i in range(fields["num_hidden_layers"])]


@dataclass(frozen=True)
class Family:
    """What the models of one `model_type` share."""

    architecture: str
    """The class of Hugging Face's that config.json names."""

    reads: Fields
    """The fields that matter, and what they are where absent; rotary ones apart."""

    layer_types: Callable[[Fields], list[str]] = _all_full
    """Full or sliding attention of each layer, where config.json does not list them."""

    traits: dict[str, Any] = field(default_factory=dict)
    """Values of `DecoderConfig` that are the same in all models of the family."""

    rope_theta: float = 10_000.0
    local_rope_theta: float | None = None
    """The base of sliding layers, where it is not that of the others."""


_SIZES = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
    "eos_token_id": None,
    "pad_token_id": None,
}
_QWEN = _SIZES | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_GEMMA = {name: value for name, value in _SIZES.items() if name != "hidden_act"} | {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        "LlamaForCausalLM",
        reads=_SIZES | {"attention_bias": False, "mlp_bias": False, "eos_token_id": 2},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        reads=_SIZES
        | {
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "eos_token_id": 2,
        },
        layer_types=_all_alike,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        reads=_QWEN,
        layer_types=_from_a_layer_on,
        traits={"query_key_value_bias": True},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        reads=_QWEN | {"head_dim": 128, "attention_bias": False},
        layer_types=_from_a_layer_on,
        traits={"query_key_norm": True},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        reads=_GEMMA
        | {
            "vocab_size": 256000,
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
        },
        layer_types=lambda fields: _all_but_every({**fields, "sliding_window_pattern": 2}),
        traits={"unit_offset_norms": True, "post_norms": True},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        reads=_GEMMA
        | {
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "final_logit_softcapping": None,
            "sliding_window_pattern": 6,
        },
        layer_types=_all_but_every,
        traits={"unit_offset_norms": True, "post_norms": True, "query_key_norm": True},
        rope_theta=1_000_000.0,
        local_rope_theta=10_000.0,
    ),
}
"""By `model_type`."""


def decoder_config(fields: Fields) -> DecoderConfig:
    """The decoder that the fields of a config.json describe.

    Both of Hugging Face's dialects are read: `rope_theta` and `rope_scaling` with `type` or
    `rope_type`, or `rope_parameters`; `torch_dtype` or `dtype`. A field that is absent is what
    Transformers 5 takes it for in that family.

    Args:
        fields: config.json, parsed.

    Raises:
        ValueError: an unknown architecture, kind of rotary positions or activation, a field that
            is wrong, and one that may change results and is not understood; the text names it.

    >>> config = decoder_config({"model_type": "mistral", "num_hidden_layers": 2})
    >>> config.head_dim, config.num_key_value_heads, config.layers[0].window
    (128, 8, 4096)
    """
    family = _family(fields)
    rope = {name: value for name, value in fields.items() if name in ROPE_FIELDS}
    check_unread(fields, read=family.reads.keys() | rope.keys(), family=fields["model_type"])
    read = {name: checked(name, fields.get(name, value)) for name, value in family.reads.items()}

    heads, key_heads = read["num_attention_heads"], read["num_key_value_heads"]
    key_heads = heads if key_heads is None else key_heads
    if heads % key_heads:
        raise ValueError(
            f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({key_heads})"
        )
    read["head_dim"] = head_dim = _head_dim(read)
    layer_types = _layer_types(family, read)
    ropes = ropes_by_layer_type(rope, read, family.rope_theta, family.local_rope_theta)
    gemma = "query_pre_attn_scalar" in read
    return DecoderConfig(
        family=fields["model_type"],
        **{name: read[name] for name in _UNCHANGED},
        num_key_value_heads=key_heads,
        layers=tuple(
            Layer(read["sliding_window"] if kind == _SLIDING else None, ropes[kind])
            for kind in layer_types
        ),
        activation=_activation("hidden_activation" if gemma else "hidden_act", read),
        attention_scale=(read["query_pre_attn_scalar"] if gemma else head_dim) ** -0.5,
        embedding_scale=read["hidden_size"] ** 0.5 if gemma else 1.0,
        attention_soft_cap=read.get("attn_logit_softcapping"),
        logits_soft_cap=read.get("final_logit_softcapping"),
        **{
            "query_key_value_bias": read.get("attention_bias", False),
            "output_bias": read.get("attention_bias", False),
            "mlp_bias": read.get("mlp_bias", False),
        }
        | family.traits,
        attention_dropout=read["attention_dropout"] or 0.0,
        dtype=dtype_of(fields),
        eos_token_ids=checked_ids("eos_token_id", read["eos_token_id"]),
        pad_token_id=next(iter(checked_ids("pad_token_id", read["pad_token_id"])), None),
        source=json.dumps(dict(fields), indent=2),
    )


_UNCHANGED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim",
    "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings",
)  # fmt: skip


def _family(fields: Fields) -> Family:
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(
            f"model_type {kind!r} in config.json is none that can be read:"
            f" {', '.join(sorted(FAMILIES))}"
        )
    family = FAMILIES[kind]
    named = fields.get("architectures")
    if named not in (None, [], [family.architecture]):
        raise ValueError(
            f"architectures {named!r} in config.json cannot be read; of model_type {kind!r}"
            f" {family.architecture} can"
        )
    return family


def _head_dim(read: Fields) -> int:
    head_dim, width, heads = read["head_dim"], read["hidden_size"], read["num_attention_heads"]
    if head_dim is None:
        if width % heads:
            raise ValueError(
                f"hidden_size ({width}) must be a multiple of num_attention_heads ({heads}) where"
                " head_dim is not given"
            )
        head_dim = width // heads
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary positions, got {head_dim}")
    return int(head_dim)


def _layer_types(family: Family, read: Fields) -> list[str]:
    given = read.get("layer_types")
    kinds = family.layer_types(read) if given is None else given
    if len(kinds) != read["num_hidden_layers"]:
        raise ValueError(
            f"layer_types has {len(kinds)} entries, num_hidden_layers is"
            f" {read['num_hidden_layers']}"
        )
    if _SLIDING in kinds:
        if not read.get("use_sliding_window", True):
            raise ValueError(f"layer_types has {_SLIDING}, but use_sliding_window is false")
        if read["sliding_window"] is None:
            raise ValueError(f"layer_types has {_SLIDING}, but sliding_window is null")
    return kinds


def _activation(name: str, read: Fields) -> str:
    if read[name] not in ACTIVATIONS:
        raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS)}; got {read[name]!r}")
    return str(read[name])
