"""Fine-tune a pruned model with transformers' Trainer, and keep every zero: offline, in seconds.

    python examples/train_with_trainer.py

`rarefy.keep_zeros(model)` is all that is new; it works with any loop and any optimiser. With a real model, `model` is
what AutoModelForCausalLM.from_pretrained gives of a pruned folder, and `windows` are your token ids.
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

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
report = rarefy.prune(model, windows, pattern=rarefy.NM(2, 4), method=rarefy.SparseGPT())
print(report)

model.requires_grad_(True)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    examples = [{"input_ids": window, "labels": window} for window in windows]
    trainer = Trainer(model, arguments, train_dataset=examples)
    with rarefy.keep_zeros(model):  # at its end it is proven that no zero was filled
        trainer.train()

losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
weights = [module.weight for name, module in model.named_modules() if name.endswith("_proj")]
zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, {zeros:.0%} of the weights are zero, as before")
