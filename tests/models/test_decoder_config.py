"""What config.json says is understood, in either dialect, or refused by the name of the field."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from models.decoder import FAMILIES, DecoderConfig, decoder_config
from tests.models.reference import NAMES, config, fields

_LLAMA = {"model_type": "llama", "vocab_size": 64, "num_hidden_layers": 4, "hidden_size": 64,
          "num_attention_heads": 4}  # fmt: skip


def _windows(config: DecoderConfig) -> list[int | None]:
    return [layer.window for layer in config.layers]


def _read(family: str, **given: Any) -> DecoderConfig:
    return decoder_config({"model_type": family, "num_hidden_layers": 4, **given})


def test_sizes_that_are_absent_follow_from_others_or_from_the_family() -> None:
    plain = decoder_config(_LLAMA)
    assert (plain.head_dim, plain.num_key_value_heads) == (16, 4)
    assert not plain.tie_word_embeddings
    assert decoder_config(_LLAMA | {"head_dim": None, "num_key_value_heads": None}) == plain
    assert decoder_config(_LLAMA | {"head_dim": 6}).head_dim == 6
    assert _read("qwen3", hidden_size=1024).head_dim == 128
    assert _read("mistral").num_key_value_heads == 8
    gemma = _read("gemma2")
    assert gemma.tie_word_embeddings
    assert (gemma.attention_soft_cap, gemma.logits_soft_cap) == (50, 30)
    assert gemma.attention_scale == 256**-0.5
    assert gemma.embedding_scale == 2304**0.5


@pytest.mark.parametrize(
    ("family", "given", "windows"),
    [
        ("llama", {}, [None] * 4),
        ("mistral", {}, [4096] * 4),
        ("mistral", {"sliding_window": None}, [None] * 4),
        ("mistral", {"sliding_window": 7}, [7] * 4),
        ("qwen2", {"sliding_window": 7}, [None] * 4),
        ("qwen2", {"use_sliding_window": True}, [None] * 4),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}, [None, None, 4096, 4096]),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 9},
         [9] * 4),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "layer_types":
                   ["full_attention", "sliding_attention"] * 2}, [None, 9] * 2),
        ("gemma2", {}, [4096, None] * 2),
        ("gemma2", {"sliding_window": 5, "layer_types": ["full_attention"] * 4}, [None] * 4),
        ("gemma3_text", {"sliding_window": 5}, [5] * 4),
        ("gemma3_text", {"sliding_window": 5, "sliding_window_pattern": 3}, [5, 5, None, 5]),
    ],
)  # fmt: skip
def test_windows_of_each_layer(
    family: str, given: dict[str, Any], windows: list[int | None]
) -> None:
    assert _windows(_read(family, **given)) == windows


def test_sliding_layers_of_gemma3_turn_by_their_own_base() -> None:
    config = _read("gemma3_text", sliding_window_pattern=2)
    slow, fast = (layer.rope.frequencies[1] for layer in (config.layers[1], config.layers[0]))
    assert slow == pytest.approx(1e6 ** (-2 / 256), rel=1e-6)
    assert fast == pytest.approx(1e4 ** (-2 / 256), rel=1e-6)


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 5e5}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}},
            {"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 5e5}},
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4}, "max_position_embeddings": 64},
            {
                "rope_parameters": {
                    "rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 64,
                    "rope_theta": 10000.0,
                },
                "max_position_embeddings": 64,
            },
        ),
        ({"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
        ({"torch_dtype": "torch.float16"}, {"dtype": "float16", "torch_dtype": "bfloat16"}),
    ],
)  # fmt: skip
def test_both_dialects_say_the_same(older: dict[str, Any], newer: dict[str, Any]) -> None:
    assert decoder_config(_LLAMA | older) == decoder_config(_LLAMA | newer)


def test_a_config_is_hashable_and_keeps_what_it_was_read_from() -> None:
    for name in NAMES:
        assert hash(config(name)) == hash(decoder_config(fields(name)))
        assert json.loads(config(name).source) == fields(name)
    assert dataclasses.replace(config("llama"), source="{}") == config("llama")


def test_what_changes_no_result_is_let_pass() -> None:
    harmless = {
        "transformers_version": "4.31.0", "use_cache": True, "initializer_range": 0.1,
        "_name_or_path": "x", "attention_dropout": 0.0, "eos_token_id": [1, 2], "pad_token_id": -1,
        "sliding_window": None, "quantization_config": None, "mlp_bias": False, "new_thing": None,
        "use_sliding_window": False,
    }  # fmt: skip
    read = decoder_config(_LLAMA | harmless)
    assert read.eos_token_ids == (1, 2)
    assert read.pad_token_id is None


_WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "mamba"}, "model_type 'mamba'"),
    ("llama", {"model_type": None}, "model_type None"),
    ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
    ("llama", {"new_scale": 2.0}, "new_scale = 2.0"),
    ("llama", {"new_switch": False}, "new_switch = False"),
    ("llama", {"sliding_window": 8}, "sliding_window = 8"),
    ("llama", {"is_causal": False}, "is_causal = False"),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"rope_scaling": {"type": "longrope", "factor": 2}}, "rope type 'longrope'"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "needs factor"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor .* got 0"),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor .* got '2'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2, "beta": 1}}, "beta = 1"),
    ("llama", {"rope_scaling": {"mrope_section": [1, 2]}}, "mrope_section"),
    ("llama", {"rope_scaling": 2.0}, "rope_scaling must be an object"),
    ("llama", {"rope_scaling": {"type": "llama3", "factor": 2}}, "needs low_freq_factor"),
    ("llama", {"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 4,
                                "high_freq_factor": 1}}, "high_freq_factor .1. must be greater"),
    ("llama", {"rope_theta": -1}, "rope_theta"),
    ("llama", {"rope_parameters": {"full_attention": {}}}, "by layer type"),
    ("llama", {"rope_local_base_freq": 10.0}, "rope_local_base_freq"),
    ("llama", {"hidden_act": "mish"}, "hidden_act must be one of .* got 'mish'"),
    ("llama", {"hidden_size": "64"}, "hidden_size .* got '64'"),
    ("llama", {"hidden_size": 66}, r"hidden_size \(66\) must be a multiple"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers .* got 0"),
    ("llama", {"num_hidden_layers": True}, "num_hidden_layers .* got True"),
    ("llama", {"num_key_value_heads": 3}, r"multiple of num_key_value_heads \(3\)"),
    ("llama", {"head_dim": 15}, "head_dim must be even"),
    ("llama", {"rms_norm_eps": None}, "rms_norm_eps .* got None"),
    ("llama", {"tie_word_embeddings": "no"}, "tie_word_embeddings .* got 'no'"),
    ("llama", {"dtype": "float8_e4m3fn"}, "dtype .* got 'float8_e4m3fn'"),
    ("llama", {"attention_dropout": 1.5}, "attention_dropout .* got 1.5"),
    ("mistral", {"attention_bias": True}, "attention_bias = True"),
    ("mistral", {"sliding_window": 0}, "sliding_window .* got 0"),
    ("mistral", {"layer_types": ["full_attention"] * 4}, "layer_types"),
    ("qwen2", {"attention_bias": False}, "attention_bias = False"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "use_sliding_window is false"),
    ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "got 'chunked_attention'"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
    ("gemma2", {"sliding_window": None}, "sliding_window is null"),
    ("gemma2", {"final_logit_softcapping": 0.0}, "final_logit_softcapping .* got 0.0"),
    ("gemma2", {"sliding_window_size": 5}, "sliding_window_size = 5"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "full_attention and sliding"),
    ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 8.0}}, "must say rope_type"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "given", "text"), _WRONG)
def test_what_is_not_understood_is_refused_by_name(
    family: str, given: dict[str, Any], text: str
) -> None:
    sizes = _LLAMA if family == "llama" else {"num_hidden_layers": 4}
    with pytest.raises(ValueError, match=text) as raised:
        decoder_config({**sizes, "model_type": family, **given})
    assert "\n" not in str(raised.value)


def test_every_family_reads_its_defaults() -> None:
    for name in FAMILIES:
        assert decoder_config({"model_type": name}).family == name
