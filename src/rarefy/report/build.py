"""From the folders of runs to the page about them: reads, counts again what was written, lets models write."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rarefy.errors import InputError, OutputError, RarefyError
from rarefy.pruning.records import LayerRecord
from rarefy.report.page import render
from rarefy.report.views import LayerProof, RunView, SweepView
from rarefy.runs.events import Watch, unwatched
from rarefy.runs.folder import RunFolder, write_atomically
from rarefy.sweeps.folder import SweepFolder


def write_report(
    paths: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    texts: bool = True,
    device: str = "auto",
    watch: Watch | None = None,
) -> Path:
    """Write the page about the runs and sweeps in ``paths``; returns the file, RUN/report.html of the first.

    With ``texts``, dense and pruned model of a run are loaded where the run kept no texts and both can be had.
    Raises InputError where a path is no folder of a run, OutputError where the page cannot be written.
    """
    if not paths:
        raise InputError.sentence("RUN is missing: name a folder that `rarefy prune` or `rarefy compare` wrote.")
    runs: list[RunView] = []
    sweeps: list[SweepView] = []
    folders = [_folder(path) for path in paths]  # every mistake before any work
    file = Path(output) if output is not None else folders[0].path / "report.html"
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise OutputError("--output", str(file), "a file in a folder that exists")
    for folder in folders:
        if isinstance(folder, SweepFolder):
            sweeps.append(_sweep(folder))
        else:
            runs.append(_run(folder, texts, device, watch or unwatched))
    page = render(runs, sweeps)
    try:
        write_atomically(file, page)
    except OSError as error:
        raise OutputError("--output", str(file), f"a file that can be written ({error.strerror or error})") from error
    return file


def _folder(path: str | Path) -> RunFolder | SweepFolder:
    """The run or sweep in ``path``. Raises InputError where there is none."""
    path = Path(path).expanduser()
    sweep = SweepFolder(path)
    if sweep.exists:
        sweep.read_sweep()
        if not sweep.finished():
            raise InputError.sentence(f"RUN is {str(path)!r}, a sweep of which no cell is finished yet.")
        return sweep
    for candidate in (path, path.parent if path.absolute().name == "model" else path):
        folder = RunFolder(candidate)
        if folder.layers.is_file() and folder.run.is_file():
            folder.read_run()
            return folder
    what = (
        "there is no such folder"
        if not path.exists()
        else "it has no run.json with layers.jsonl, and no compare.json"
    )
    raise InputError.sentence(
        f"RUN is {str(path)!r}, but must be a folder that `rarefy prune` or `rarefy compare` wrote: {what}."
    )


def _run(folder: RunFolder, texts: bool, device: str, watch: Watch) -> RunView:
    facts = folder.read_run()
    for key in ("method", "pattern"):
        if key not in facts:
            raise InputError.sentence(f"{folder.run} is damaged: it does not say the {key}.")
    layers = folder.read_layers()
    recipe = folder.recipe.read_text(encoding="utf-8") if folder.recipe.is_file() else ""
    dense, pruned, reason = _texts(folder, facts, recipe, texts, device, watch)
    return RunView(str(folder.path), facts, layers, recipe, _proof(folder, layers), dense, pruned, reason)


def _sweep(folder: SweepFolder) -> SweepView:
    cells, failed = [], []
    for facts in folder.finished():
        if facts["status"] == "failed":
            failed.append(facts)
            continue
        cell = RunFolder(folder.cells / facts["cell"])
        texts = [(one["prompt"], one["text"]) for one in facts.get("texts", [])]
        layers = cell.read_layers()
        cells.append(RunView(str(cell.path), facts, layers, proof=_proof(cell, layers), texts=texts))
    cells.sort(key=lambda cell: (cell.facts["seed"], cell.facts.get("started", "")))
    return SweepView(str(folder.path), folder.read_sweep(), folder.read_cell("dense"), cells, failed)


def _proof(folder: RunFolder, layers: Sequence[LayerRecord]) -> list[LayerProof]:
    """The zeros in the written files; nothing where no model was written."""
    if not folder.model.is_dir():
        return []
    from rarefy.runs.verify import inspect_folder

    promised = {layer.name: layer.pruned for layer in layers}
    return [
        LayerProof(one.name, one.pattern, one.size, promised.get(one.name, 0), one.zeros, one.problems)
        for one in inspect_folder(folder.path).layers
    ]


Texts = list[tuple[str, str]]


def _texts(
    folder: RunFolder, facts: dict[str, Any], recipe: str, wanted: bool, device: str, watch: Watch
) -> tuple[Texts, Texts, str]:
    """What the dense and the pruned model write, and why nothing if so."""
    kept = [(one["prompt"], one["text"]) for one in facts.get("texts", [])]
    kept_dense = [(one["prompt"], one["text"]) for one in facts.get("dense_texts", [])]
    if kept and kept_dense:
        return kept_dense, kept, ""
    if not wanted:
        return kept_dense, kept, "the report was asked for without them (--no-texts)."
    settings = yaml.safe_load(recipe) if recipe else None
    name = settings.get("model") if isinstance(settings, dict) else None
    if not folder.model.is_dir() or not name:
        return kept_dense, kept, "the run wrote no model."
    try:
        with watch("writing texts"):
            return _written_by(str(name), device), _written_by(str(folder.model), device), ""
    except RarefyError as error:
        return kept_dense, kept, str(error)


def _written_by(name: str, device: str) -> Texts:
    from rarefy.errors import ModelError
    from rarefy.models.checkpoint import load_model
    from rarefy.models.source import resolve_model
    from rarefy.runs.texts import PROMPTS, write_texts

    model, tokenizer = load_model(resolve_model(name), device)
    if tokenizer is None:
        raise ModelError.sentence(f"{name} has no tokenizer.")
    return list(zip(PROMPTS, write_texts(model, tokenizer)))
