"""The model card of a packed checkpoint: the dense one's, and what is different about this one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rarefy.models.atomic import replace_file

_HEADING = "## Packed"

_VALUES = {
    "auto": "in the dtype they had, so that unpacking gives the same weights bit for bit",
    "bf16": "in bfloat16",
    "int8": "codes of 8 bits, with a scale for every {group} inputs; {rounded}",
    "int4": "codes of 4 bits, with a scale for every {group} inputs; {rounded}",
}


def write_card(folder: Path, dense: Path, facts: Mapping[str, Any]) -> None:
    """Write README.md into ``folder``: the card in ``dense``, if there is one, with a section on the packing."""
    card = dense / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {dense.name}\n"
    replace_file(folder / "README.md", f"{text.rstrip()}\n\n{packed_section(facts)}".encode())


def write_unpacked_card(folder: Path, packed: Path) -> None:
    """Write README.md into ``folder``: the card in ``packed`` without what was said of the packing."""
    card = packed / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8").partition(f"\n\n{_HEADING}\n")[0]
        replace_file(folder / "README.md", f"{text}\n".encode())


def packed_section(facts: Mapping[str, Any]) -> str:
    """The section of a card on what packing did; ``facts`` are those of a Summary."""
    dense, packed = facts["dense_bytes"], facts["packed_bytes"]
    all_dense, all_packed = facts["all_dense_bytes"], facts["all_packed_bytes"]
    rounded = "rounded to the nearest by packing" if facts["rounded"] else "exactly those that the method had chosen"
    values = _VALUES[facts["values"]].format(group=facts["group"], rounded=rounded)
    return f"""{_HEADING}

This folder holds {facts["packed_layers"]} of {facts["layers"]} weights of the model's blocks packed by Rarefy: only
what is not zero ({facts["kept"]:,} of {facts["size"]:,}), and a mask of one bit a weight. Kept weights are
{values}.

|  | dense | packed |
|---|---|---|
| packed weights | {_megabytes(dense)} | {_megabytes(packed)} ({packed / dense:.2f}) |
| all weights | {_megabytes(all_dense)} | {_megabytes(all_packed)} ({all_packed / all_dense:.2f}) |

It is read by transformers after `import rarefy`, and by nothing else; without that line loading it is an error.

```python
import rarefy
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
```

On a CPU weights stay packed in memory and are multiplied as they are, which is faster for the 1 to 8 tokens that are
generated at a time; `rarefy bench` measures by how much. Long prompts are no faster. On a GPU weights are unpacked
while they are loaded, and nothing is gained but the size of the file. Against quantised formats: half of the weights
in bfloat16 take 9 bits a weight, as many as 8-bit quantisation, which does less damage. `rarefy unpack` makes the
ordinary folder of it again, which any tool reads.
"""


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
