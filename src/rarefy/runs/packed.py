"""Packs and unpacks a model together with what a run left of it: its records, its recipe, its card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rarefy.errors import ModelError
from rarefy.models.atomic import copy_file
from rarefy.models.source import resolve_model
from rarefy.packing.pack import Watch, pack
from rarefy.packing.summary import Summary
from rarefy.packing.unpack import unpack
from rarefy.runs.card import model_card
from rarefy.runs.folder import RunFolder


def pack_model(name: str, out: Path, values: str, watch: Watch) -> Summary:
    """Pack the run or model of that name into ``out``, which gets the files of the run as well.

    Raises what ``pack`` raises, and ModelError where the model is packed already.
    """
    run = RunFolder.find(name)
    source = resolve_model(str(run.model if run else name), packed=True)
    if source.packing is not None:
        raise ModelError.sentence(f"{name} is packed already.")

    def finish(folder: Path, summary: Summary) -> None:
        if run and run.run.is_file():
            _copy_run(run, folder, {**run.read_run(), "packed": summary.facts()})

    return pack(source, out, values, watch, finish)


def unpack_model(name: str, out: Path, watch: Watch) -> None:
    """Unpack the packed folder of that name into ``out``, with the files of the run that it holds.

    Raises what ``unpack`` raises.
    """
    source = resolve_model(name, packed=True)
    run = RunFolder.find(source.path)

    def finish(folder: Path) -> None:
        if run and run.run.is_file():
            _copy_run(run, folder, {key: value for key, value in run.read_run().items() if key != "packed"})

    unpack(source.fetch(), out, watch, finish)


def _copy_run(run: RunFolder, folder: Path, facts: Mapping[str, Any]) -> None:
    """Copy what a run left, with other ``facts`` in ``run.json``, into a model's folder."""
    for file in (run.layers, run.recipe):
        if file.is_file():
            copy_file(file, folder / file.name)
    new = RunFolder(folder)
    new.write_run(facts)
    new.write_card(model_card(facts))
