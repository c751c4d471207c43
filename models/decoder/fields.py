"""Single fields of a config.json: what each may hold, and which change no result."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["check_unread", "checked", "checked_ids", "dtype_of"]

_COUNT, _POSITIVE, _SHARE, _FLAG, _NAME, _TYPES, _IDS = (
    "a positive integer", "a positive number", "a number from 0 to 1, 1 left out", "true or false",
    "a name", "a list of full_attention and sliding_attention", "an integer or a list of integers",
)  # fmt: skip
_NULL = " or null"
# What a field that some family reads may hold.
_HOLDS = {
    "vocab_size": _COUNT,
    "hidden_size": _COUNT,
    "intermediate_size": _COUNT,
    "num_hidden_layers": _COUNT,
    "num_attention_heads": _COUNT,
    "num_key_value_heads": _COUNT + _NULL,
    "head_dim": _COUNT + _NULL,
    "max_position_embeddings": _COUNT,
    "rms_norm_eps": _POSITIVE,
    "hidden_act": _NAME,
    "hidden_activation": _NAME,
    "tie_word_embeddings": _FLAG,
    "attention_dropout": _SHARE + _NULL,
    "attention_bias": _FLAG,
    "mlp_bias": _FLAG,
    "use_sliding_window": _FLAG,
    "sliding_window": _COUNT + _NULL,
    "sliding_window_pattern": _COUNT,
    "max_window_layers": "an integer, not negative",
    "layer_types": _TYPES + _NULL,
    "query_pre_attn_scalar": _POSITIVE,
    "final_logit_softcapping": _POSITIVE + _NULL,
    "attn_logit_softcapping": _POSITIVE + _NULL,
    "eos_token_id": _IDS + _NULL,
    "pad_token_id": _IDS + _NULL,
}
_LAYER_TYPES = {
    "full_attention": "full_attention",
    "attention": "full_attention",
    "sliding_attention": "sliding_attention",
}

# Fields that change no logits, in any family.
_BOOKKEEPING = frozenset((
    # what wrote the file, and where it was
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures", "auto_map",
    "custom_pipelines", "is_llama_config", "max_sequence_length", "model_type", "name_or_path",
    "transformers_version", "unsloth_fixed",
    "unsloth_version", "transformers.js_config", "model_name", "torch_dtype", "dtype",
    # training
    "initializer_range", "gradient_checkpointing", "use_bfloat16",
    # how Transformers or a server runs it
    "_attn_implementation", "attn_implementation", "cache_implementation",
    "chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict",
    "pretraining_tp", "torchscript", "use_cache", "_sliding_window_pattern",
    # labels of other heads
    "finetuning_task", "id2label", "label2id", "num_labels", "problem_type",
    "task_specific_params", "tokenizer_class", "prefix",
    # tokens
    "boi_token_index", "bos_token_id", "decoder_start_token_id", "eoi_token_index", "eos_token_id",
    "image_token_index", "pad_token_id", "sep_token_id", "unk_token_id",
    # generation, which has its own settings
    "assistant_confidence_threshold", "assistant_lookbehind", "bad_words_ids",
    "begin_suppress_tokens", "diversity_penalty", "do_sample", "early_stopping",
    "encoder_no_repeat_ngram_size", "encoder_repetition_penalty", "epsilon_cutoff", "eta_cutoff",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "num_beam_groups", "num_beams",
    "num_return_sequences", "output_scores", "remove_invalid_values", "repetition_penalty",
    "return_dict_in_generate", "suppress_tokens", "target_lookbehind", "temperature", "top_k",
    "top_p", "typical_p",
))  # fmt: skip

# Fields that change results unless they hold one of these, in families that do not read them.
_OFF: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False,),
    "attention_bias": (False,),
    "is_causal": (True,),
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "layer_types": (),
    "max_window_layers": (),
    "mlp_bias": (False,),
    "pruned_heads": ({},),
    "qk_norm": (False,),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
# What else a family may meet: its architecture has these built in, or Hugging Face's own class
# leaves the field unread.
_IN_FAMILY: dict[str, dict[str, tuple[Any, ...]]] = {
    "qwen2": {"attention_bias": (True,)},
    "gemma2": {"hidden_act": ("gelu_pytorch_tanh", "gelu"), "is_causal": (True,)},
    "gemma3_text": {"hidden_act": ("gelu_pytorch_tanh", "gelu")},
}
# Second names of a field, which must hold the same.
_REPEATS = {"sliding_window_size": "sliding_window", "num_layers": "num_hidden_layers"}
_DTYPES = ("float32", "bfloat16", "float16")


def check_unread(fields: Mapping[str, Any], *, read: Collection[str], family: str) -> None:
    """ValueError for the first field that may change results and that nothing reads."""
    for name, value in fields.items():
        if name in read or name in _BOOKKEEPING or value is None:
            continue
        if name in _REPEATS and value == fields.get(_REPEATS[name]):
            continue
        allowed = _IN_FAMILY.get(family, {}).get(name, _OFF.get(name))
        if allowed is None:
            raise ValueError(
                f"config.json of model_type {family!r} has {name} = {value!r}, which is not"
                " understood and may change results"
            )
        if not any(value is one or value == one for one in allowed):
            only = " or ".join(map(_as_json, allowed)) or "null"
            raise ValueError(
                f"config.json of model_type {family!r} has {name} = {value!r}, which this model"
                f" cannot do: only {only}"
            )


def checked(name: str, value: Any) -> Any:
    """The value of a field that is read, if it is one that the field may hold.

    Raises:
        ValueError: it is not; the text names the field and what is allowed.
    """
    holds = _HOLDS[name]
    if value is None and holds.endswith(_NULL):
        return None
    if holds.startswith(_TYPES) and isinstance(value, list):
        if all(isinstance(one, str) and one in _LAYER_TYPES for one in value):
            return [_LAYER_TYPES[one] for one in value]
        value = next(one for one in value if not isinstance(one, str) or one not in _LAYER_TYPES)
    elif _fits(value, holds.removesuffix(_NULL)):
        return value
    raise ValueError(f"{name} in config.json must be {holds}, got {value!r}")


def _fits(value: Any, holds: str) -> bool:
    if holds == _FLAG:
        return isinstance(value, bool)
    if holds == _NAME:
        return isinstance(value, str)
    if holds == _IDS:
        return all(map(_is_integer, value)) if isinstance(value, list) else _is_integer(value)
    if holds == _POSITIVE:
        return is_number(value) and value > 0
    if holds == _SHARE:
        return is_number(value) and 0 <= value < 1
    least = 1 if holds == _COUNT else 0
    return _is_integer(value) and value >= least


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def checked_ids(name: str, value: Any) -> tuple[int, ...]:
    """The tokens that a field names: none, one or several; negative ones stand for none."""
    value = checked(name, value)
    if value is None:
        return ()
    return tuple(one for one in (value if isinstance(value, list) else [value]) if one >= 0)


def dtype_of(fields: Mapping[str, Any]) -> str | None:
    """What the checkpoint is to be computed in, if it says."""
    value = fields.get("dtype")
    if value is None:
        value = fields.get("torch_dtype")
    if value is None or value == "auto":
        return None
    plain = value.removeprefix("torch.") if isinstance(value, str) else value
    if plain not in _DTYPES:
        raise ValueError(f"dtype in config.json must be one of {', '.join(_DTYPES)}; got {value!r}")
    return str(plain)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_json(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
