"""Atomic writes: whole or not at all, on the disk before they have their name, and through no link."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rarefy.errors import OutputError
from rarefy.models import atomic


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def _events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is synced and renamed, in its order: the kind of what was synced, or "rename"."""
    found: list[str] = []
    fsync, replace, rename = os.fsync, Path.replace, Path.rename

    def synced(descriptor: int) -> None:
        found.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def renamed(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: (found.append("rename"), function(*arguments))[1]

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr(Path, "replace", renamed(replace))
        patch.setattr(Path, "rename", renamed(rename))
        yield found


# --- Files ------------------------------------------------------------------------------------------------


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), atomic.replacing(path) as file:
        file.write(b"new")
        raise KeyError
    assert path.read_text() == "old"
    with atomic.replacing(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(OutputError, match=r"none/file cannot be written: No such file or directory\."):
        atomic.replace_file(tmp_path / "none" / "file", b"")
    assert _names(tmp_path) == ["file"]


@pytest.mark.parametrize("write", [atomic.replace_file, lambda path, _: atomic.copy_file(Path(__file__), path)])
def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path, bytes], None]
) -> None:
    with _events(monkeypatch) as events:
        write(tmp_path / "file", b"new")
    assert events == ["file", "rename", "folder"]


def test_a_file_has_the_permissions_that_any_new_file_has(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    atomic.replace_file(tmp_path / "file", "text")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("guess", ["file", ".file.partial", ".file.tmp", ".file.PID"])
def test_no_link_is_followed(tmp_path: Path, guess: str) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    out = tmp_path / "out"
    out.mkdir()
    (out / guess.replace("PID", str(os.getpid()))).symlink_to(victim)
    atomic.replace_file(out / "file", b"new")
    assert (out / "file").read_bytes() == b"new"
    assert not (out / "file").is_symlink()
    assert victim.read_text() == "precious"


def test_a_link_under_the_very_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can guess the name; but even where one could, what is there is neither followed nor removed."""
    (tmp_path / "victim").write_text("precious")
    monkeypatch.setattr("secrets.token_hex", lambda _: "01234567")
    link = tmp_path / ".file.01234567.partial"
    link.symlink_to(tmp_path / "victim")
    with pytest.raises(OutputError, match="File exists"):
        atomic.replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "victim").read_text() == "precious"
    assert link.is_symlink()
    (tmp_path / ".folder.01234567.partial").mkdir()
    (tmp_path / ".folder.01234567.partial" / "mine").touch()
    with pytest.raises(OutputError, match="File exists"), atomic.replacing_folder(tmp_path / "folder"):
        pytest.fail("it was used")
    assert (tmp_path / ".folder.01234567.partial" / "mine").exists()


def test_names_cannot_be_guessed(tmp_path: Path) -> None:
    seen = set()
    for _ in range(3):
        with atomic.replacing(tmp_path / "file"):
            seen.update(_names(tmp_path))
        seen.discard("file")
    assert len(seen) == 3
    assert {atomic.unfinished_name(name) for name in seen} == {"file"}


# --- Folders ----------------------------------------------------------------------------------------------


def _fill(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text("new")
    (folder / "link").symlink_to(folder / "nowhere")


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    path = tmp_path / "folder"
    if old:
        path.mkdir()
        (path / "old").touch()
    with pytest.raises(KeyError), atomic.replacing_folder(path) as partial:
        _fill(partial)
        raise KeyError
    assert _names(tmp_path) == (["folder"] if old else [])
    with _events(monkeypatch) as events, atomic.replacing_folder(path) as partial:
        _fill(partial)
    assert events == ["folder", "file", "folder", *["rename"] * (1 + old), "folder"]
    assert _names(tmp_path) == ["folder"]
    assert _names(path) == ["link", "sub"]


def test_a_folder_that_does_not_get_its_name_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder" / "old").mkdir(parents=True)
    replace, calls = Path.replace, []

    def second_fails(self: Path, target: Path) -> Path:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", second_fails)
    with (
        pytest.raises(OutputError, match="folder cannot be written: Input/output error"),
        atomic.replacing_folder(tmp_path / "folder") as partial,
    ):
        _fill(partial)
    assert _names(tmp_path) == ["folder"]
    assert _names(tmp_path / "folder") == ["old"]


def test_a_folder_that_is_there_is_not_added(tmp_path: Path) -> None:
    with atomic.adding_folder(tmp_path / "folder") as partial:
        _fill(partial)
    with (
        pytest.raises(OutputError, match="folder cannot be written: Directory not empty"),
        atomic.adding_folder(tmp_path / "folder") as partial,
    ):
        (partial / "other").touch()
    assert _names(tmp_path) == ["folder"]
    assert _names(tmp_path / "folder") == ["link", "sub"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    theirs = [".partial", ".a.partial", ".a.0123.partial", "a.01234567.partial", ".a.0123456x.partial", ".a"]
    for name in theirs:
        (tmp_path / name).touch()
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").touch()
    (tmp_path / ".a.01234567.partial").touch()
    (tmp_path / ".b.01234567.partial" / "sub").mkdir(parents=True)
    (tmp_path / ".c.01234567.partial").symlink_to(tmp_path / "target")
    atomic.remove_partial(tmp_path, "b")
    assert _names(tmp_path) == sorted([*theirs, "target", ".a.01234567.partial", ".c.01234567.partial"])
    atomic.remove_partial(tmp_path)
    assert _names(tmp_path) == sorted([*theirs, "target"])
    assert (tmp_path / "target" / "file").exists()


def test_a_folder_is_removed_with_all_that_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    _fill(tmp_path / "folder")
    atomic.remove_folder(tmp_path / "folder")
    atomic.remove_folder(tmp_path / "folder")  # which is not there any more
    assert _names(tmp_path) == []


# --- Copies -----------------------------------------------------------------------------------------------


def test_without_the_kernels_help_files_are_copied_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(1000)
    (tmp_path / "file").write_bytes(content)
    monkeypatch.setattr(atomic, "CHUNK", 300)

    def half(source: int, target: int, count: int, at: int, to: int) -> int:
        if at:
            raise OSError(errno.EXDEV, "another file system")
        return os.pwrite(target, os.pread(source, 450, 0), 0)

    for name, function in (("half", half), ("nothing", lambda *_: 0)):
        monkeypatch.setattr(os, "copy_file_range", function, raising=False)
        atomic.copy_file(tmp_path / "file", tmp_path / name)
        assert (tmp_path / name).read_bytes() == content
