"""The model card of a packed checkpoint: the dense one's, and what is different about this one."""

from __future__ import annotations

from pathlib import Path

from rarefy.models.atomic import replace_file
from rarefy.packing.summary import Summary

_HEADING = "## Packed"

_VALUES = {
    "auto": "in the dtype they had, so that unpacking gives the same weights bit for bit",
    "bf16": "in bfloat16",
    "int8": "rounded to the nearest of 255 codes of 8 bits, with a scale for every 128 inputs",
    "int4": "rounded to the nearest of 16 codes of 4 bits, with a scale for every 64 inputs",
}


def write_card(folder: Path, dense: Path, summary: Summary) -> None:
    """Write README.md into ``folder``: the card in ``dense``, if there is one, with a section on the packing."""
    card = dense / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {folder.name}\n"
    replace_file(folder / "README.md", f"{text.rstrip()}\n\n{_section(summary)}".encode())


def write_unpacked_card(folder: Path, packed: Path) -> None:
    """Write README.md into ``folder``: the card in ``packed`` without what was said of the packing."""
    card = packed / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8").partition(f"\n\n{_HEADING}\n")[0]
        replace_file(folder / "README.md", f"{text}\n".encode())


def _section(summary: Summary) -> str:
    packed = [layer for layer in summary.layers if layer.packed]
    size, zeros = sum(layer.size for layer in packed), sum(layer.zeros for layer in packed)
    nbytes, dense = sum(layer.nbytes for layer in packed), sum(layer.dense_bytes for layer in packed)
    return f"""{_HEADING}

This folder holds {len(packed)} of {len(summary.layers)} weights of the model's blocks packed by Rarefy: only what is
not zero ({size - zeros:,} of {size:,}), and a mask of one bit a weight. Kept weights are
{_VALUES[summary.values]}.

|  | dense | packed |
|---|---|---|
| packed weights | {_megabytes(dense)} | {_megabytes(nbytes)} ({nbytes / dense:.2f}) |
| all weights | {_megabytes(summary.dense_bytes)} | {_megabytes(summary.nbytes)} \
({summary.nbytes / summary.dense_bytes:.2f}) |

It is read by transformers after `import rarefy`, and by nothing else; without that line loading it is an error.

```python
import rarefy
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
```

On a CPU weights stay packed in memory and are multiplied as they are; `rarefy bench` measures how fast that is.
On a GPU they are unpacked while they are loaded, and nothing is gained but the size of the file. `rarefy unpack`
makes the ordinary folder of it again, which any tool reads.
"""


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
