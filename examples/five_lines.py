"""The Python API on a small random Llama: offline, in seconds.

    python examples/five_lines.py

With a real model, `model` is what AutoModelForCausalLM.from_pretrained gives, and `windows` are token ids of real
text.
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import rarefy

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

# A loaded model, in place, layer by layer: two of every four weights go.
report = rarefy.prune(model, windows, pattern=rarefy.NM(2, 4), method=rarefy.SparseGPT())
print(report)

# One layer by itself: a weight (out, in), and the Gram matrix of its inputs (tokens, in).
weight, inputs = torch.randn(64, 128), torch.randn(1024, 128)
solution = rarefy.solve(weight, inputs.T @ inputs, rarefy.Unstructured(0.7), rarefy.ALPS())
print(f"relative error {solution.relative_error:.4f} at {solution.sparsity:.0%} sparsity: {solution.status.value}")
