"""Hidden states in files: as good as in memory, and loaded as they were saved."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from models_for_tests import make_model
from rarefy.calibration.record import record
from rarefy.calibration.saved import load_stream, save_stream
from rarefy.calibration.spill import MappedStates, StatesPart, load_states, save_states, states_nbytes
from rarefy.calibration.stream import BlockCall, HiddenStates
from rarefy.errors import OutputError

_SHAPE = (5, 3, 4)
_PAGE = 4096


def _random(shape: tuple[int, ...] = _SHAPE, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _refuse(number: int) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return refuse


def _resident() -> int:
    """The memory of this process in bytes, mapped files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


# --- Mapped states ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mapped_states_do_what_states_in_memory_do(tmp_path: Path, dtype: torch.dtype) -> None:
    mapped = MappedStates(tmp_path / "new" / "folder", _SHAPE, dtype)
    assert mapped.nbytes == states_nbytes(_SHAPE, dtype) == 60 * dtype.itemsize
    assert (tuple(mapped.tensor.shape), mapped.tensor.dtype) == (_SHAPE, dtype)
    assert not mapped.tensor.any()
    block = nn.Linear(4, 4).requires_grad_(False)
    results = []
    for states in (mapped.tensor, torch.empty(_SHAPE, dtype=dtype)):
        states[:] = _random(dtype=dtype)
        stream = HiddenStates(states, 2, torch.device("cpu"), [[BlockCall((), {})] * 3])
        stream.advance(block, 0, on_batch=mapped.release)
        results.append(stream.states)
    assert torch.equal(*results)
    assert not torch.equal(results[0], _random(dtype=dtype))


def test_mapped_states_leave_nothing_behind_however_the_process_ends(tmp_path: Path) -> None:
    mapped = MappedStates(tmp_path, _SHAPE, torch.float32)
    assert list(tmp_path.iterdir()) == []
    tensor = mapped.tensor
    tensor.fill_(3)
    del mapped  # the tensor itself holds what it needs
    assert tensor.eq(3).all()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_released_pages_are_no_memory_of_the_process(tmp_path: Path) -> None:
    mapped = MappedStates(tmp_path, (16, 2**20), torch.float32)
    before = _resident()
    mapped.tensor.fill_(1.5)
    assert _resident() - before > 0.9 * mapped.nbytes
    mapped.release()
    assert _resident() - before < 0.1 * mapped.nbytes
    assert mapped.tensor.eq(1.5).all()


class _Plus(nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + 1


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize("how", ["advance", "run"])
def test_a_pass_over_mapped_states_holds_little_more_than_a_batch_of_them(tmp_path: Path, how: str) -> None:
    mapped = MappedStates(tmp_path, (32, 1, 2**19), torch.float32)  # of 64 MiB, 2 are a batch
    calls = [[BlockCall((), {})] * 32]
    stream = HiddenStates(mapped.tensor, 1, torch.device("cpu"), calls, release=mapped.release)
    block, most = _Plus(), [0]
    block(torch.zeros(2**19))  # what the first call takes for good
    before = _resident()

    def measure() -> None:
        most[0] = max(most[0], _resident() - before)

    if how == "advance":
        stream.advance(block, 0, on_batch=measure)
    else:
        for batch, windows in stream.slices():
            stream.run(block, 0, batch, windows)
            measure()
    assert most[0] < 0.4 * mapped.nbytes
    assert mapped.tensor[::5, 0, ::9999].eq(how == "advance").all()


@pytest.mark.parametrize("how", ["advance", "run"])
def test_a_pass_ends_with_nothing_held(how: str) -> None:
    log: list[str] = []

    class Logs(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            log.append("block")
            return hidden + 1

    calls = [[BlockCall((), {})] * 3]
    stream = HiddenStates(torch.zeros(5, 2, 2), 2, torch.device("cpu"), calls, release=lambda: log.append("release"))
    if how == "advance":
        stream.advance(Logs(), 0)
        assert log == ["block", "release"] * 3 + ["release"]
    else:
        stream.run(Logs(), 0, 2, slice(4, 6))
        assert log == ["block", "release"]


def test_memory_is_released_after_every_batch_of_recording_saving_and_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[int] = []
    monkeypatch.setattr(MappedStates, "release", lambda _: released.append(1))
    model = make_model("llama")
    windows = torch.randint(3, 100, (5, 8), generator=torch.Generator().manual_seed(0))
    stream = record(model, list(model.model.layers), windows, 2, tmp_path)
    assert len(released) == 3  # batches
    parts = save_stream(tmp_path, 1, stream)
    assert len(released) == 3 + 5  # windows
    load_stream(tmp_path, parts, stream)
    assert len(released) == 3 + 5 + 5


def test_a_full_or_impossible_folder_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file cannot take the 0\.0 GB of hidden states: File exists\.$"):
        MappedStates(tmp_path / "file", _SHAPE, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", _refuse(errno.ENOSPC))
        patch.setattr(os, "write", lambda *_: pytest.fail("wrote to a full disk"))
        with pytest.raises(
            OutputError, match=r"cannot take the 8\.6 GB of hidden states: No space left on device\.$"
        ):
            MappedStates(tmp_path, (128, 8192, 4096), torch.bfloat16)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    with monkeypatch.context() as patch:  # a file system that cannot reserve space
        patch.setattr(os, "posix_fallocate", _refuse(errno.EOPNOTSUPP))
        assert not MappedStates(tmp_path, _SHAPE, torch.float32).tensor.any()
        patch.setattr(os, "write", _refuse(errno.ENOSPC))
        with pytest.raises(OutputError, match="No space left"):
            MappedStates(tmp_path, _SHAPE, torch.float32)


# --- Saved states -----------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
)
def test_states_are_loaded_as_they_were_saved_by_whatever_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, saved: list[int], loaded: list[int]
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    states = _random((sum(saved), 3, 2), dtype)
    states.view(-1)[0] = float("nan")
    parts, start = [], 0
    for count in saved:
        parts.append(save_states(tmp_path, 7, states[start : start + count], start))
        start += count
    start = 0
    for count in loaded:
        wanted = states[start : start + count]
        if len(wanted) < count:
            break
        restored = torch.zeros_like(wanted)
        load_states(tmp_path, parts[::-1], restored, start)
        assert torch.equal(restored.view(torch.uint8), wanted.view(torch.uint8))
        start += count


def test_states_of_another_run_or_too_few_are_refused(tmp_path: Path) -> None:
    part = save_states(tmp_path, 1, _random())
    for shape, dtype in (((5, 3, 3), torch.bfloat16), (_SHAPE, torch.float32)):
        with pytest.raises(OutputError, match=r"holds hidden states bfloat16 \[5, 3, 4\], but this run has"):
            load_states(tmp_path, [part], torch.empty(shape, dtype=dtype))
    with pytest.raises(OutputError, match="has the hidden states of 5 of 6 windows"):
        load_states(tmp_path, [part], torch.empty((6, 3, 4), dtype=torch.bfloat16))
    with pytest.raises(OutputError, match="has the hidden states of 0 of 5 windows"):
        load_states(tmp_path, [], torch.empty(_SHAPE, dtype=torch.bfloat16))


@pytest.mark.parametrize("damage", ["one bit", "cut off", "empty", "gone"])
def test_damaged_states_are_never_used(tmp_path: Path, damage: str) -> None:
    part = save_states(tmp_path, 1, _random())
    path = tmp_path / part.file
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    {
        "one bit": lambda: path.write_bytes(content),
        "cut off": lambda: path.write_bytes(content[:-1]),
        "empty": lambda: path.write_bytes(b""),
        "gone": path.unlink,
    }[damage]()
    with pytest.raises(OutputError, match=r"is damaged: it holds other|cannot be read: No such file") as error:
        load_states(tmp_path, [part], torch.empty(_SHAPE, dtype=torch.bfloat16))
    assert str(path) in str(error.value)


def test_a_disk_that_is_full_keeps_what_was_saved_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = save_states(tmp_path, 1, _random())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", _refuse(errno.ENOSPC))
        for block in (1, 2):
            with pytest.raises(OutputError, match=r"bin cannot be written: No space left on device\.$"):
                save_states(tmp_path, block, _random(seed=1))
    assert [file.name for file in tmp_path.iterdir()] == [part.file]
    states = torch.empty(_SHAPE, dtype=torch.bfloat16)
    load_states(tmp_path, [part], states)
    assert torch.equal(states, _random())


def test_memory_can_be_released_after_every_window(tmp_path: Path) -> None:
    mapped, calls = MappedStates(tmp_path, _SHAPE, torch.bfloat16), []
    mapped.tensor[:] = _random()

    def release() -> None:
        calls.append(1)
        mapped.release()

    part = save_states(tmp_path, 1, mapped.tensor, on_window=release)
    assert part == StatesPart("states-00001-000000.bin", 0, [5, 3, 4], "bfloat16", part.checksums)
    mapped.tensor.zero_()
    load_states(tmp_path, [part], mapped.tensor, on_window=release)
    assert torch.equal(mapped.tensor, _random())
    assert len(calls) == 10
