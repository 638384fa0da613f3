"""Copies all of a model's folder but its weights: settings, tokenizer, chat templates, processors.

For a model that is never in memory as a whole; what is copied is what is in the folder, not what the
installed transformers would write in its place.
"""

from __future__ import annotations

from pathlib import Path

from rarefy.models.atomic import copy_file, refusals
from rarefy.models.checkpoint import forget_origin

_KINDS = ("*.json", "*.jinja", "*.txt", "*.model", "additional_chat_templates/*.jinja")
_WEIGHTS_INDEX = ".index.json"


def copy_settings(source: Path, folder: Path) -> None:
    """Copy them into ``folder``, replacing what is there, without a word of quantisation, sparsity or places.

    Raises OutputError where the disk refuses.
    """
    for kind in _KINDS:
        for file in sorted(source.glob(kind)):
            if file.is_file() and not file.name.endswith(_WEIGHTS_INDEX):
                target = folder / file.relative_to(source)
                with refusals(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                copy_file(file, target)
    with refusals(folder):
        forget_origin(folder)
