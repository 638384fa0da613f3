"""Lets a model go on with a few prompts, so that a reader can see what pruning did to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from rarefy.calibration.windows import check_token_ids
from rarefy.models.quiet import quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rarefy.runs.events import Events

#: A fact, an instruction and a story: each is damaged differently.
PROMPTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "To make a cup of tea, first",
    "The old lighthouse keeper looked out at the sea and",
)
NUM_TOKENS = 40


def write_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] = PROMPTS,
    num_tokens: int = NUM_TOKENS,
) -> list[str]:
    """What ``model`` writes after each prompt: at most ``num_tokens`` tokens, always the likeliest one.

    The prompt itself is left out. The model's own generation settings play no part.
    """
    end = getattr(model.generation_config, "eos_token_id", None) or model.config.get_text_config().eos_token_id
    pad = end[0] if isinstance(end, list) else end
    settings = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, num_beams=1, eos_token_id=end, pad_token_id=pad or 0
    )
    generate: Any = model.generate
    # All prompts in one batch, filled up on the left, which takes the time of one.
    rows: list[list[int]] = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[pad or 0] * (width - len(row)) + row for row in rows], device=model.device)
    check_token_ids(ids, model.config, "the model")
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    own, model.generation_config = model.generation_config, settings
    try:
        with quiet(), torch.inference_mode():
            written = generate(ids, attention_mask=mask, generation_config=settings)
    finally:
        model.generation_config = own
    return [str(tokenizer.decode(row, skip_special_tokens=True)) for row in written[:, width:]]


def kept_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[dict[str, str]]:
    """Each prompt with what ``model`` writes after it, for run.json; nothing without a tokenizer."""
    if tokenizer is None:
        return []
    return [{"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, write_texts(model, tokenizer))]


def texts_for_report(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, events: Events
) -> list[dict[str, str]]:
    """``kept_texts`` within a run; none, with a warning, where the model cannot write them."""
    try:
        with events.watch("writing texts"):
            return kept_texts(model, tokenizer)
    except Exception as error:  # noqa: BLE001 (a picture in a report must not cost the run)
        events.warn(f"the model writes no texts for the report: {' '.join(str(error).split())}")
        return []
