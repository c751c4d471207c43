"""Keywords of other libraries' attention, and which argument of jattn's each one is."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from jattn.call.arguments import AttentionOptions

__all__ = ["check_keywords"]

KNOWN = frozenset(AttentionOptions.__annotations__)
ARRAYS = ("query", "key", "value", "bias", "mask")

_MASK_OR_BIAS = "mask where it is bool (True: may attend), bias where it is numbers to add"
_WINDOW = "local_window_size=(left, right), with None for an open side"
_DOCUMENTS = "query_segment_ids and key_value_segment_ids, the number of each token's document"
_SHIFTED = "local_window_size=(w - 1, 0) for a window of w keys with the query's own"
# By their names in flash-attention, PyTorch, xFormers, Hugging Face, tokamax, cuDNN, Transformer
# Engine and JAX's Pallas kernels.
_HERE_IT_IS = {
    "is_causal": ("causal", "use_causal_mask", "causal_mask", "is_causal_mask"),
    _SHIFTED: (
        "sliding_window", "sliding_window_size", "sliding_window_length", "attention_window",
    ),
    _WINDOW + " where flash-attention has -1": ("window_size", "sliding_window_left"),
    _WINDOW: ("window", "local_window", "left_window_size", "right_window_size"),
    "logits_soft_cap, None for no cap": (
        "softcap", "soft_cap", "logit_cap", "attn_logit_softcapping", "attn_logits_soft_cap",
        "attn_logits_soft_capping", "softcapping", "logit_soft_cap", "logits_softcap",
    ),
    "scale": (
        "softmax_scale", "sm_scale", "scaling", "scaling_factor", "logits_scale", "attn_scale",
        "scale_factor", "attention_scale", "query_scale", "temperature_scale",
    ),
    _MASK_OR_BIAS: ("attn_mask", "attention_mask", "dense_mask", "masks"),
    "bias": ("attn_bias", "attention_bias", "ab", "position_bias", "relative_position_bias"),
    "bias, slopes[:, None, None] * -abs(query position - key position)": ("alibi_slopes",),
    "mask=~key_padding_mask[:, None, None, :], or key_value_seq_lengths": ("key_padding_mask",),
    "dropout_rate, with dropout_rng": (
        "dropout_p", "dropout", "p", "attn_dropout", "attention_dropout", "dropout_prob",
        "dropout_probability",
    ),
    "dropout_rng": ("dropout_key", "rng", "rngs", "dropout_seed", "rng_key", "prng_key"),
    "return_residual, which gives the log-sum-exp": (
        "return_lse", "return_softmax_lse", "return_residuals", "save_residuals",
        "return_logsumexp",
    ),
    "sinks": ("s_aux", "sink", "learnable_sink", "attention_sinks", "attn_sinks", "softmax_sink"),
    "query_seq_lengths": ("seqused_q", "q_seqlen", "q_lengths", "query_lengths", "q_seq_lengths"),
    "key_value_seq_lengths": (
        "seqused_k", "cache_seqlens", "kv_seqlen", "kv_lengths", "key_lengths", "kv_seq_lengths",
        "seq_lengths", "lengths", "key_seq_lengths", "seqlens",
    ),
    _DOCUMENTS: (
        "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "cu_seqlens_kv", "segment_ids",
        "document_ids", "q_offsets", "kv_offsets",
    ),
    "query_segment_ids": ("q_segment_ids", "segment_ids_q", "decoder_segment_ids"),
    "key_value_segment_ids": ("kv_segment_ids", "segment_ids_kv", "key_segment_ids"),
    "query_offset": ("cache_position", "q_offset", "query_position", "seqlen_offset", "start_pos"),
    "implementation": ("backend", "impl", "attn_implementation", "attention_type", "op"),
    "query_chunk_size of jattn.memory_efficient_attention": (
        "block_q", "q_chunk_size", "chunk_size",
    ),
    "key_chunk_size of jattn.memory_efficient_attention": ("block_k", "k_chunk_size"),
}  # fmt: skip
_GROUPED = "give fewer key heads than query heads, and they are grouped"
_WEIGHTS = "the weights are never stored; return_residual=True gives each row's log-sum-exp"
_PLANNED = "there is nothing to choose here: leave it out"
_IN_FLOAT32 = "sums and softmax are always float32 (float64 for float64 inputs)"
_OTHERWISE = {
    _GROUPED: ("enable_gqa", "num_key_value_groups", "num_kv_heads", "num_kv_groups", "pack_gqa"),
    _WEIGHTS: ("return_attn_probs", "need_weights", "output_attentions", "return_weights",
               "return_attn_weights", "average_attn_weights"),
    "`with jattn.deterministic_gradients():` makes gradients repeatable, dropout_rate=0 leaves out "
    "dropout": ("deterministic",),
    "dropout_rate=0 leaves out dropout": ("training", "is_training", "inference", "train"),
    "`with jax.default_matmul_precision(...):` sets it": ("precision",),
    _IN_FLOAT32: ("logits_dtype", "softmax_dtype", "force_fp32_for_softmax", "acc_dtype", "dtype",
                  "preferred_element_type", "float32_logits"),
    _PLANNED: ("max_seqlen_q", "max_seqlen_k", "max_seqlen", "num_splits", "num_warps",
               "num_stages", "block_sizes"),
    "pages are not read in place: gather them first": ("block_table", "page_table", "page_indices"),
    "is_causal=True is a causal mask, mask any other": ("attn_mask_type", "mask_type"),
    "it names a backend in jattn.dot_product_attention": ("implementation",),
    "it is for jattn.memory_efficient_attention": ("query_chunk_size", "key_chunk_size"),
}  # fmt: skip
_ADVICE = {theirs: f"here it is {ours}" for ours, names in _HERE_IT_IS.items() for theirs in names}
_ADVICE |= {theirs: advice for advice, names in _OTHERWISE.items() for theirs in names}


def check_keywords(function: str, given: Iterable[str]) -> None:
    """TypeError, as Python words it, for the first that is no option; it says what it is here."""
    for name in given:
        if name not in KNOWN:
            advice = _advice(name)
            raise TypeError(
                f"{function}() got an unexpected keyword argument {name!r}"
                + ("" if advice is None else f"; {advice}")
            )


def _advice(name: str) -> str | None:
    if name in _ADVICE:
        return _ADVICE[name]
    near = get_close_matches(name, [*ARRAYS, *sorted(KNOWN), *_ADVICE], n=1, cutoff=0.75)
    if not near:
        return None
    return _ADVICE.get(near[0], f"did you mean {near[0]!r}?")
