"""The files of a checkpoint, and every tensor in them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rarefy.errors import ModelError
from rarefy.models.stored import StoredTensor, tensors_in
from rarefy.models.weight_files import find_weight_files, unnamed_files


@dataclass(frozen=True)
class Shards:
    """The files of a checkpoint, in the order in which they are read, their index, and all tensors by name.

    ``unnamed`` are files of weights beside them, of which nothing is loaded.
    """

    folder: Path
    files: list[Path]
    index: Path | None
    tensors: dict[str, StoredTensor]
    unnamed: list[Path] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path) -> Shards:
        """The checkpoint in ``folder``, of which only the headers are read.

        Raises ModelError where there are no files of weights, or one is missing, damaged or of a kind that
        cannot be read in parts.
        """
        found = find_weight_files(folder)
        if found is None:
            raise ModelError.sentence(f"{folder} has no files of weights.")
        tensors: dict[str, StoredTensor] = {}
        for file in found.files:
            for tensor in tensors_in(file):
                if tensor.name in tensors:
                    both = f"{tensors[tensor.name].file.name} and {file.name}"
                    raise ModelError.sentence(f"{tensor.name} is in two files of {folder}: {both}.")
                tensors[tensor.name] = tensor
        return cls(folder, list(found.files), found.index, tensors, unnamed_files(found))

    @property
    def size(self) -> int:
        """Bytes of all files, the index included."""
        return sum(file.stat().st_size for file in (*self.files, *([self.index] if self.index else [])))
