"""Train a LoRA adapter of PEFT on a pruned model, and merge it without filling a zero: offline, in seconds.

    python examples/train_an_adapter.py

A merged LoRA weight is W + s B A, which has no zeros. Under `rarefy.keep_zeros` the product is masked while it is
trained, so that nothing is lost when it is merged. `rarefy.merge` also merges adapters that were trained elsewhere,
from the folder in which PEFT saved them.
"""

import tempfile
import warnings

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import rarefy

warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = AutoModelForCausalLM.from_config(config)
windows = torch.randint(config.vocab_size, (8, 64))  # (num, length) int64 token ids
report = rarefy.prune(model, windows, pattern=rarefy.NM(2, 4), method=rarefy.SparseGPT())
print(report)

with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(f"{folder}/pruned")
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-2)
    with rarefy.keep_zeros(adapted):
        for step in range(8):
            loss = adapted(input_ids=windows, labels=windows).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step}: loss {loss.item():.3f}")
    adapted.save_pretrained(f"{folder}/adapter")

    pruned = AutoModelForCausalLM.from_pretrained(f"{folder}/pruned")
    merged = rarefy.merge(f"{folder}/adapter", pruned)
    with torch.no_grad():
        print(f"merged: loss {merged(input_ids=windows, labels=windows).loss.item():.3f}")

weights = [module.weight for name, module in merged.named_modules() if name.endswith("_proj")]
zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
print(f"{zeros:.0%} of the weights are zero, as before")
