"""Every decoder that transformers knows: smaller, it computes what it does with the removed parts off, or is refused.

``python tests/test_shrink_architectures.py`` prints the table of all of them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from rarefy.errors import ModelError
from rarefy.models.blocks import find_blocks
from rarefy.structure.depth import BlockSets
from rarefy.structure.parts import Kind, find_parts
from rarefy.structure.shrink import Removal, shrink, with_order
from rarefy.structure.width import remove_parts, towards_dense
from small_architectures import ALL, VOCABULARY, make
from test_architectures import NOT_BUILT, REFUSED

WINDOWS = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(0))
# The same sums of float32 products in another order.
ROUNDING = {"rtol": 1e-3, "atol": 1e-4}

EACH = [name for name in ALL if name not in REFUSED and name not in NOT_BUILT]
#: A quick selection: partial rotary heads, parallel halves, a list by block, rules by place, carried states, experts,
#: norms over all heads, a config of several parts.
QUICK = ("falcon", "cohere2", "smollm3", "deepseek_v3", "olmo2", "gpt_oss", "olmoe", "fuyu")


def without_a_block(model: PreTrainedModel) -> str:
    """One block is removed; which one is refused where none can be."""
    number = len(find_blocks(model))
    sets = BlockSets(model, WINDOWS, 2)
    reason = ""
    for gone in (1, 2, number - 1):
        kept = tuple(index for index in range(number) if index != gone)
        try:
            small = shrink(model, Removal(kept))
            sets.confirm(small, kept)
        except ModelError as error:
            reason = reason or str(error)
            continue
        assert small.num_parameters() < model.num_parameters()
        return f"without block {gone}, {repaired(model, small, kept)}"
    return reason


def repaired(model: PreTrainedModel, small: PreTrainedModel, kept: tuple[int, ...]) -> str:
    """What is left is repaired, or it is said why not."""
    try:
        wanted, path = towards_dense(model, kept, small, [], WINDOWS, 2)
    except ModelError as error:
        return f"not repaired: {error}"
    _, records = remove_parts(small, WINDOWS, wanted, batch_size=2, dense=path)
    for record in records:
        assert record.drift is not None
        assert record.drift_left is not None
        assert record.drift_left <= record.drift, record
    return f"{len(records)} exits repaired"


def without_parts(kind: Kind) -> Callable[[PreTrainedModel], str]:
    """Half of the parts are removed from every block."""

    def tried(model: PreTrainedModel) -> str:
        try:
            parts = with_order(model, find_parts(model, kind), WINDOWS)
            mask = torch.arange(parts.number) % 2 == 0
            for site in parts.exits.values():
                site.write(site.read() * mask.repeat_interleave(parts.width))
            blocks = tuple(range(len(find_blocks(model))))
            small = shrink(model, Removal(blocks, ((parts, dict.fromkeys(parts.exits, mask)),)))
        except ModelError as error:
            return str(error)
        with torch.no_grad():
            found, expected = (one(input_ids=WINDOWS, use_cache=False).logits for one in (small, model))
        torch.testing.assert_close(found, expected, **ROUNDING)
        assert small.num_parameters() < model.num_parameters()
        return f"{int(mask.sum())} of {parts.number} {kind}"

    return tried


WAYS: dict[str, Callable[[PreTrainedModel], str]] = {
    "blocks": without_a_block,
    "neurons": without_parts("neurons"),
    "heads": without_parts("heads"),
}


def is_answer(text: str) -> bool:
    """Whether it says what was removed, or, in one sentence, why nothing can be."""
    return text[0].isdigit() or text.startswith("without block") or (text.endswith(".") and "\n" not in text)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "architecture", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EACH]
)
def test_smaller_or_refused(architecture: str, way: str) -> None:
    assert is_answer(WAYS[way](make(architecture)))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for architecture in sys.argv[1:] or EACH:
        for way, attempt in WAYS.items():
            try:
                answer = attempt(make(architecture))
            except Exception as error:  # noqa: BLE001 (a table shows all)
                answer = f"!!! {type(error).__name__}: {' '.join(str(error).split())[:150]}"
            print(f"{architecture:24} {way:8} {answer}", flush=True)
