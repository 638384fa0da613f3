"""Random small models of the architectures that Rarefy is tested on, and a tokenizer for them.

Two blocks, weights in float32, a vocabulary of 160: each is made in milliseconds, offline.
"""

from __future__ import annotations

import string
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 160
CONTEXT = 128
_SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
_MERGES = [("t", "h"), ("h", "e"), ("i", "n"), ("e", "r"), ("a", "n"), ("r", "e"), ("o", "n"), ("th", "e")]
CHAT_TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}  # fewer heads for keys and values than for queries

_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**_GROUPED),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=CONTEXT, word_embed_proj_dim=32, bos_token_id=1, eos_token_id=2,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT,
        bos_token_id=1, eos_token_id=2,
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_GROUPED, head_dim=8, tie_word_embeddings=True),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_GROUPED, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
    ),
    "mistral": lambda: transformers.MistralConfig(**_GROUPED, head_dim=8, sliding_window=16),
    "phi3": lambda: transformers.Phi3Config(**_GROUPED, pad_token_id=0),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SIZES, rotary_pct=0.5),
}  # fmt: skip

ARCHITECTURES: tuple[str, ...] = tuple(_CONFIGS)

# Two of four experts for each token, or one where the architecture knows no more. Some with shared experts.
_EXPERTS = {**_GROUPED, "intermediate_size": 48, "num_experts_per_tok": 2}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

_EXPERT_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "mixtral": lambda: transformers.MixtralConfig(**_EXPERTS, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**_EXPERTS, num_experts=4, moe_intermediate_size=16, head_dim=8),
    "olmoe": lambda: transformers.OlmoeConfig(**_EXPERTS, num_experts=4),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(  # the first block is dense
        **_EXPERTS | _LATENT | {"num_key_value_heads": 4}, n_routed_experts=4, moe_intermediate_size=16,
        first_k_dense_replace=1, n_group=1, topk_group=1,
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **_EXPERTS, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_EXPERTS, num_local_experts=4, head_dim=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **_EXPERTS | {"num_experts_per_tok": 1}, intermediate_size_mlp=64, num_local_experts=4, head_dim=8,
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(  # experts without a gate, narrower than the model
        **_EXPERTS, head_dim=8, layers_block_type=["attention", "moe"], n_routed_experts=4, moe_latent_size=16,
        moe_intermediate_size=24, moe_shared_expert_intermediate_size=40, n_group=1, topk_group=1,
    ),
}  # fmt: skip

EXPERT_ARCHITECTURES: tuple[str, ...] = tuple(_EXPERT_CONFIGS)


def make_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """A model of one of (EXPERT_)ARCHITECTURES with random weights, the same for the same seed, for inference."""
    return build((_CONFIGS | _EXPERT_CONFIGS)[architecture](), seed)


def build(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A model of any config with random weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # As made, biases are 0 and norms 1: a mistake in what belongs to which would not show.
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def save_composite(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Writes a model that also sees, with a layer for speculation of which transformers does not load a tensor."""
    text = {**_GROUPED, "head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": []}
    config = transformers.Qwen3_5Config(
        text_config=text, vision_config=vision, image_token_id=150, video_token_id=151
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen3_5ForConditionalGeneration(config).to(dtype)
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["mtp.fc.weight"] = torch.randn(32, 64).to(dtype)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer().save_pretrained(folder)
    return folder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Three special tokens, one token for each printable character, and a few frequent pairs."""
    vocabulary = [*_SPECIAL_TOKENS, *string.printable, *(a + b for a, b in _MERGES)]
    backend = Tokenizer(
        models.BPE({token: index for index, token in enumerate(vocabulary)}, [*_MERGES], unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_folder(model: PreTrainedModel, folder: Path) -> Path:
    """Writes ``model`` with the tokenizer into ``folder``, as transformers does it, and returns ``folder``."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def write_gguf(path: Path, model: PreTrainedModel, extra: str | None = None) -> Path:
    """Writes a small Llama as llama.cpp does, matrices as blocks of 8-bit numbers, and returns ``path``.

    ``extra`` is the name of one more tensor, which is no part of the model.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: config.vocab_size - len(_SPECIAL_TOKENS) - 1]
    tokens = [*_SPECIAL_TOKENS, *letters, "th"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(_SPECIAL_TOKENS) + [1] * (len(tokens) - len(_SPECIAL_TOKENS)))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # llama.cpp rotates neighbouring rows, transformers rows half a head apart.
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        short_name = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(short_name, gguf.quantize(weight.numpy(), kind), raw_dtype=kind)
    if extra is not None:
        writer.add_tensor(extra, torch.ones(32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
