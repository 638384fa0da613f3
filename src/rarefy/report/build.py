"""The page about folders of runs: reads them, counts again what was written, lets models write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rarefy.errors import InputError, OutputError, RarefyError
from rarefy.models.atomic import replace_file
from rarefy.pruning.records import LayerRecord
from rarefy.report.page import render
from rarefy.report.views import LayerProof, RunView, SweepView
from rarefy.runs.arguments import check_device
from rarefy.runs.events import Watch, unwatched
from rarefy.runs.folder import RunFolder
from rarefy.runs.recipe_file import read_yaml
from rarefy.sweeps.folder import SweepFolder


def write_report(
    paths: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    texts: bool = False,
    device: str = "auto",
    watch: Watch | None = None,
    note: Callable[[str], None] | None = None,
) -> Path:
    """Write the page about the runs and sweeps in ``paths``; returns the file, RUN/report.html of the first.

    No model is loaded, except with ``texts`` where a run kept none: the one that it pruned, which its recipe
    names and which may be on the hub, and the one that it wrote; ``note`` hears of it.
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
    check_device(device)
    write = _Writer(device, watch or unwatched, note or (lambda _: None)) if texts else None
    for folder in folders:
        if isinstance(folder, SweepFolder):
            sweeps.append(_sweep(folder))
        else:
            runs.append(_run(folder, write))
    replace_file(file, render(runs, sweeps))
    return file


def _folder(path: str | Path) -> RunFolder | SweepFolder:
    """The run or sweep in ``path``. Raises InputError where there is none."""
    try:
        return _found(Path(path).expanduser())
    except (OSError, RuntimeError) as error:  # a name that no file can have, a home that nobody has
        reason = getattr(error, "strerror", None) or error
        raise InputError.sentence(f"RUN is {str(path)!r}, which cannot be read: {reason}.") from error


def _found(path: Path) -> RunFolder | SweepFolder:
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
    what = "it has no run.json with layers.jsonl, and no compare.json"
    if not path.exists():
        what = "there is no such folder"
    elif (path / "unfinished").is_dir():
        what = "it holds an unfinished run, which the command that began it finishes"
    raise InputError.sentence(
        f"RUN is {str(path)!r}, but must be a folder that `rarefy prune` or `rarefy compare` wrote: {what}."
    )


def _run(folder: RunFolder, write: _Writer | None) -> RunView:
    facts, layers = folder.read_run(), folder.read_layers()
    recipe = folder.recipe.read_text(encoding="utf-8", errors="replace") if folder.recipe.is_file() else ""
    dense, pruned, reason = _texts(folder, facts, write)
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


def _texts(folder: RunFolder, facts: dict[str, Any], write: _Writer | None) -> tuple[Texts, Texts, str]:
    """What the dense and the pruned model write, and why nothing if so."""
    pruned, dense = ([(one["prompt"], one["text"]) for one in facts.get(key, [])] for key in ("texts", "dense_texts"))
    reason = ""
    if not (pruned and dense):
        if not folder.model.is_dir() or not folder.recipe.is_file():
            reason = "the run wrote no model."
        elif write is None:
            reason = "the run kept none; `rarefy report --texts` loads the dense and the pruned model to write some."
        else:
            try:
                dense, pruned = write.both(folder)
            except RarefyError as error:
                reason = str(error)
    return dense, pruned, reason


@dataclass(frozen=True)
class _Writer:
    """Lets the models of a run write, both of which it loads."""

    device: str
    watch: Watch
    note: Callable[[str], None]

    def both(self, folder: RunFolder) -> tuple[Texts, Texts]:
        """What the dense and the pruned model write. Raises RarefyError where they cannot."""
        settings = read_yaml(folder.recipe)
        name = settings.get("against") or settings.get("model")  # of a tuning, the dense model is the former
        if not isinstance(name, str):
            raise InputError.sentence(f"{folder.recipe} names no model.")
        self.note(f"loading {name}, which {folder.recipe} names, and {folder.model}")
        with self.watch("writing texts"):
            return self._written_by(name), self._written_by(str(folder.model))

    def _written_by(self, name: str) -> Texts:
        from rarefy.errors import ModelError
        from rarefy.models.checkpoint import load_model
        from rarefy.models.source import resolve_model
        from rarefy.runs.texts import PROMPTS, write_texts

        model, tokenizer = load_model(resolve_model(name, packed=True), self.device)
        if tokenizer is None:
            raise ModelError.sentence(f"{name} has no tokenizer.")
        return list(zip(PROMPTS, write_texts(model, tokenizer)))
