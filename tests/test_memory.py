"""What is free of a container's memory: pages of files that nobody uses can be taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rarefy.models import memory


def container(folder: Path, limit: str, used: int, inactive_file: int) -> Path:
    """The files of a control group."""
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 7\ninactive_file {inactive_file}\nactive_file 5\n")
    return folder


def test_files_that_were_read_can_be_taken_back(tmp_path: Path) -> None:
    assert memory._free_in_container(container(tmp_path, "1000", 900, 600)) == 700
    assert memory._free_in_container(container(tmp_path, "1000", 900, 0)) == 100


def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max"):
        memory._free_in_container(container(tmp_path, "max", 900, 600))
    with pytest.raises(OSError, match="No such file"):
        memory._free_in_container(tmp_path / "nothing")
    assert memory.free_bytes(torch.device("cpu")) > 0
