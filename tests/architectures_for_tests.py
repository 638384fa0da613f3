"""A small random model of every causal language model that the installed transformers knows.

Sizes are set by their names, which the configurations share; what a configuration needs beyond that, so that it
can be built and has layers of each of its kinds, stands in ``_OWN``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CAUSAL_TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))

#: Models with more parameters than this are not worth a test.
LARGEST = 20_000_000

_WIDTH, _LAYERS, _HEADS, _HEAD, _INNER, _SMALL, _VOCABULARY = 32, 4, 4, 8, 48, 16, 160

_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), _VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim_model", "emb_dim", "word_embed_proj_dim"), _WIDTH),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "encoder_layers"), _LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), _HEADS),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "num_key_value_heads"), _HEADS),
    **dict.fromkeys(
        ("head_dim", "dim_head", "index_head_dim", "linear_key_head_dim", "linear_value_head_dim"), _HEAD
    ),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dff", "dim_ff", "n_inner", "ffn_hidden_size"), _INNER),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "d_inner"), _INNER),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 128),
    **dict.fromkeys(("sliding_window", "attention_window_size", "block_size"), 16),
    # experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), _SMALL),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), _SMALL),
    "first_k_dense_replace": 1,
    # latent attention
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "index_n_heads": 2,
    "index_topk": 64,  # more than a test's texts have: the scores of random models are equal, and any choice right
    # states
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "mamba_ngroups", "n_mamba_heads"), 1),
    **dict.fromkeys(("mamba_num_heads", "linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    "linear_head_dim": 8,
    "mamba_d_ssm": 64,
    # tokens that every configuration has
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_BOTH = ["linear_attention", "full_attention"] * 2
_SLIDING = ["sliding_attention", "full_attention"] * 2

_OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": _BOTH},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "deepseek_v4": {"num_key_value_heads": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 2, "layer_types": _SLIDING, "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {"num_kv_shared_layers": 2, "layer_types": _SLIDING, "global_head_dim": 16},
    "gemma4_unified_text": {"layer_types": _SLIDING, "global_head_dim": 16},
    "dots3_note_text": {"head_dim": 16, "sliding_window": None},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": _BOTH},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _BOTH},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"zero_expert_num": 2, "num_layers": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mimo_v2_flash": {"head_dim": 24},
    "moshi": {"sliding_window": 128},  # without a cache, transformers' Moshi does not keep to its window
    "olmo_hybrid": {"layer_types": _BOTH},
    "qwen3_5_text": {"layer_types": _BOTH},
    "qwen3_5_moe_text": {"layer_types": _BOTH},
    "qwen3_next": {"layer_types": _BOTH},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 8, "indexer_budget": 16, "indexer_compress_ratio": 4, "ngram_vocab_size_base": 100,
        "split_ngram_parts": 4, "make_ngram_vocab_size_divisible_by": 4, "hc_lowrank": 8,
    },
    "recurrent_gemma": {"block_types": ("recurrent", "attention")},
    "xlstm": {"hidden_size": 128, "num_heads": 4},  # its widths are rounded up to multiples of 64
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def small_config(model_type: str) -> PreTrainedConfig:
    """The configuration of a small model; raises whatever transformers raises where none can be made."""
    return _small(CONFIG_MAPPING[model_type], _OWN.get(model_type, {}))


def _small(kind: type[PreTrainedConfig], own: dict[str, Any]) -> PreTrainedConfig:
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        if field.name in _SIZES and not isinstance(field.default, str | list):
            settings[field.name] = _SIZES[field.name]
    for name, inner in (getattr(kind, "sub_configs", None) or {}).items():
        if dataclasses.is_dataclass(inner) and inner is not PreTrainedConfig:
            settings[name] = _small(inner, {})
    return kind(**settings | own)
