"""Builds a small random model of every decoder that transformers knows, from its own default settings.

What a setting means is read off its name: numbers of layers, heads and experts, widths, ranks. ``_SPECIAL``
has the few that follow no rule. All weights are random, biases and norms included.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ALL: tuple[str, ...] = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 160
_LAYERS, _WIDTH, _HEADS, _HEAD = 4, 32, 4, 8

#: How large all that has one of these names is.
_SIZES = {
    """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_blocks num_encoder_layers
    num_decoder_layers""": _LAYERS,
    """hidden_size d_model n_embd emb_dim embedding_size embedding_dim dim_model word_embed_proj_dim
    input_embedding_size output_embedding_size lru_width attention_hidden_size backbone_hidden_size hidden_dim
    pronunciation_embed_dim shape_embed_dim cross_attention_hidden_size""": _WIDTH,
    """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dff dim_ff feed_forward_size d_inner
    n_inner intermediate_size_mlp dense_intermediate_size inner_dim mamba_d_ssm""": 2 * _WIDTH,
    """num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads encoder_attention_heads
    num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_heads
    linear_num_value_heads index_n_heads""": _HEADS,
    """num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads num_query_groups n_mamba_heads
    n_groups mamba_n_groups mamba_ngroups""": 2,
    """head_dim swa_head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim index_head_dim d_head linear_head_dim
    linear_key_head_dim linear_value_head_dim dim_head attention_head_dim kv_channels global_head_dim
    attention_head_size mamba_d_state state_size ssm_state_size rotary_dim""": _HEAD,
    """q_lora_rank kv_lora_rank o_lora_rank laurel_rank time_step_rank mamba_dt_rank gated_norm_rank adapter_rank
    hidden_size_per_layer_input hc_lowrank chunk_size mamba_chunk_size index_topk""": 8,
    "num_experts n_routed_experts num_local_experts moe_num_experts": 4,
    "num_experts_per_tok num_experts_per_token moe_topk moe_k num_kv_shared_layers": 2,
    "n_group topk_group num_expert_group first_k_dense_replace num_dense_layers bos_token_id": 1,
    """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size
    shared_experts_intermediate_size moe_shared_expert_intermediate_size""": 24,
    "sliding_window sliding_window_size local_attention attention_window_size": 16,
    "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size": VOCABULARY,
    "max_position_embeddings n_positions n_ctx max_seq_len context_length": 128,
    "eos_token_id decoder_start_token_id forced_eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
_SMALL: dict[str, Any] = {name: size for names, size in _SIZES.items() for name in names.split()}
_SMALL["mlp_only_layers"] = []

_MLA = {"num_key_value_heads": _HEADS}  # latent attention has no groups of heads
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}
_GEMMA4 = {"layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 16, "global_head_dim": 16}

_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA,
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots3_note_text": _MLA | {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": _MLA | {"num_experts_per_tok": 2},
    "falcon_h1": _MAMBA,
    "gemma3n_text": {
        "intermediate_size": [512] * 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "granitemoehybrid": _MAMBA,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "ple_layer_ids": [1, 3], "ngram_vocab_size_base": 64, "heads_per_ngram": 2, "split_ngram_parts": 2,
        "make_ngram_vocab_size_divisible_by": 2, "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 4, "eos_token_id": 2,
    },
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"] * 2, "hash_seed": 0},
    "rwkv": {"rescale_every": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_head_dim": 16,
        "attention_hidden_size": 64},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip


def make(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A small model with random weights, the same for the same seed, for inference."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(small_config(CONFIG_MAPPING[architecture]))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def skeleton(architecture: str) -> PreTrainedModel:
    """The same model on the meta device."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model: PreTrainedModel = AutoModelForCausalLM.from_config(small_config(CONFIG_MAPPING[architecture]))
    return model.eval()


def small_config(cls: type[PreTrainedConfig], **given: Any) -> PreTrainedConfig:
    """The settings of a small model of four layers, which have every kind of layer that the default has."""
    special = _SPECIAL.get(cls.model_type, {})
    known = set(inspect.signature(cls.__init__).parameters)
    default = cls(**{k: v for k, v in special.items() if k.startswith("_default_")})
    settings = {key: value for key, value in _SMALL.items() if key in known and _given(default, key)}
    settings |= _MLA if "kv_lora_rank" in known else {}
    settings |= _of_each_kind(default, known)
    for name, sub in cls.sub_configs.items():
        if name in known and sub is not None and getattr(default, name, None) is not None:
            settings[name] = small_config(type(getattr(default, name)))
    return cls(**settings | special | given)


def _given(default: PreTrainedConfig, key: str) -> bool:
    """Whether the default says anything of a setting; some say it of each layer."""
    try:
        return getattr(default, key, 0) is not None
    except Exception:  # noqa: BLE001 (an error of their own)
        return True


def _of_each_kind(default: PreTrainedConfig, known: set[str]) -> dict[str, Any]:
    """For every setting that has an item for each layer, those of four layers that differ as much as they can."""
    num = getattr(default, "num_hidden_layers", None)
    lists = {
        key: value
        for key, value in vars(default).items()
        if key in known and isinstance(value, list) and len(value) == num
    }
    if not lists:
        return {}
    layers = list(zip(*lists.values()))
    first = [layers.index(kind) for kind in dict.fromkeys(layers)][:_LAYERS]
    chosen = sorted(first + [i for i in range(num) if i not in first][: _LAYERS - len(first)])
    return {key: [value[i] for i in chosen] for key, value in lists.items()}
