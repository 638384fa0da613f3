"""Refuses files of a model that are links out of its folder: a folder from somebody else may link to anything."""

from __future__ import annotations

from pathlib import Path

from rarefy.errors import ModelError


def refuse_outside(folder: Path, file: Path) -> None:
    """Raise ModelError where a file of a model's folder is a link that leads out of it, or to nothing.

    In the cache of the hub's client, a snapshot's files are links to what was downloaded; these may be used.
    """
    if not file.is_symlink():
        return
    try:
        target = file.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ModelError.sentence(f"{file} is a link to nothing.") from error
    snapshots = [each.parent for each in (folder.absolute(), folder.resolve()) if each.parent.name == "snapshots"]
    allowed = [folder.resolve(), *((each.parent / "blobs").resolve() for each in snapshots)]
    if not any(target.is_relative_to(place) for place in allowed):
        raise ModelError.sentence(
            f"{file} is a link to {target}, outside of the model's folder: copy or move the file into the folder."
        )
