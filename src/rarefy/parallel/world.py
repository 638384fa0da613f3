"""Several processes that work on one run: who they are, what they tell each other, and how they end together.

``World`` is all that the rest of Rarefy knows of it; alone, its functions do nothing and cost nothing. All
processes run the same code in the same order. What one of them does by itself stands within ``together``,
so that a failure on one is an error on all and nobody waits for an answer that never comes; and so that
nobody begins a sum on a GPU, which cannot be broken off, for a process that is no longer there.

``joined`` is for processes that torchrun started, one for each. A process of whom nothing is heard any more
is a RankError, the others' order to stop (torchrun sends SIGTERM to those that are left) is ``Stopped``.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from rarefy.errors import InputError, RankError, RarefyError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# torch is imported within functions: one process alone is asked for before any argument is checked.

T = TypeVar("T")

#: How long the others are waited for: at the start, and later. A process that dies is noticed at once; this
#: is for one that is cut off. It must outlast what one does while the others wait (the model's own text).
_START = timedelta(minutes=10)
_TIMEOUT = timedelta(hours=2)

_Outcome = tuple[type[RarefyError], str]


class Stopped(BaseException):
    """The process was told to end, by SIGTERM; like an interrupt, it passes all that handles errors."""


@dataclass(frozen=True)
class World:
    """The processes that work on a run: this one is ``rank`` of ``size``, numbered from 0. Rank 0 leads.

    Every function but ``share`` and ``place`` is one that all processes call, or none.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        """All processes of torch's default group, where one was initialised; else this one alone."""
        if "torch.distributed" in sys.modules:
            import torch.distributed as dist

            if dist.is_available() and dist.is_initialized():
                return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def leads(self) -> bool:
        """Whether this process writes, prints and decides for all."""
        return self.rank == 0

    def share(self, number: int) -> range:
        """Which of ``number`` things in a row are this process's; shares differ by one at most."""
        return range(self.rank * number // self.size, (self.rank + 1) * number // self.size)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A scope in which each process works by itself; where it fails on one, it fails on all, at its end.

        The others raise the error of the first process that failed; a RankError, which names it, where that
        is not one of Rarefy's own. Within, no function of the World may be called.
        """
        try:
            yield
        except Exception as error:
            _end_undisturbed()
            if not isinstance(error, RankError):
                with suppress(RankError):  # the others have gone: the error at hand says more
                    self.gather(self._outcome(error))
            raise
        fine: _Outcome | None = None
        for outcome in self.gather(fine):
            if outcome is not None:
                _end_undisturbed()
                raise _error(*outcome)

    def gather(self, value: T) -> list[T]:
        """Gather the values of all processes, by rank. They are pickled."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[T | None] = [None] * self.size
        with self._connection():
            dist.all_gather_object(values, value)
        return values  # type: ignore[return-value]

    def from_first(self, make: Callable[[], T]) -> T:
        """Broadcast what ``make`` returns on rank 0, the only one that calls it; an error there is one on all."""
        if self.size == 1:
            return make()
        import torch.distributed as dist

        value: list[T | None] = [None]
        with self.together():
            if self.leads:
                value = [make()]
        with self._connection():
            dist.broadcast_object_list(value, src=0)
        return value[0]  # type: ignore[return-value]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """All-reduce each tensor: replace it by the sum over all processes, which is the same bits on all."""
        if self.size > 1:
            import torch.distributed as dist

            with self._connection():
                for tensor in tensors:
                    dist.all_reduce(tensor)

    def broadcast_(self, tensor: Tensor, rank: int) -> None:
        """Broadcast a contiguous tensor, of any dtype, from process ``rank`` to all."""
        if self.size > 1:
            import torch
            import torch.distributed as dist

            with self._connection():
                dist.broadcast(tensor.view(-1).view(torch.uint8), src=rank)

    def place(self, device: torch.device) -> torch.device:
        """The device of this process: where ``device`` is a GPU, the one with its number on this machine.

        Raises InputError where there are not enough, or one is named.
        """
        if self.size == 1 or device.type != "cuda":
            return device
        import torch

        number, here = int(os.environ.get("LOCAL_RANK", self.rank)), torch.cuda.device_count()
        if device != torch.device(device.type):  # it has a number
            raise InputError("device", str(device), f"cuda for {self.size} processes, of which each takes a GPU")
        if number >= here:
            raise InputError.sentence(
                f"device is cuda, but process {self.rank} is number {number + 1} on a machine with {here} GPUs: "
                "start as many processes on each as it has GPUs."
            )
        torch.cuda.set_device(number)
        return torch.device("cuda", number)

    def leave(self) -> None:
        """End the connection, after which each process is alone. All do it at about the same time."""
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

    def _outcome(self, error: Exception) -> _Outcome:
        if isinstance(error, RarefyError):
            return type(error), str(error)
        return RankError, f"Process {self.rank} ended with {type(error).__name__}: {' '.join(str(error).split())}"

    @contextmanager
    def _connection(self) -> Iterator[None]:
        """Within the scope, what torch's backends raise means that another process is gone."""
        try:
            yield
        except RuntimeError as error:
            _end_undisturbed()
            other = f"Process {1 - self.rank}" if self.size == 2 else "Another process"
            raise RankError(f"{other} of this run has ended or does not answer ({_short(str(error))})") from error


def _error(kind: type[RarefyError], text: str) -> RarefyError:
    error = kind.__new__(kind)
    Exception.__init__(error, text)  # the text is the whole message, which some kinds would make from parts
    return error


def _short(text: str) -> str:
    """The first sentence of what a backend says, without the place in its source."""
    return re.split(r"\. |\n", re.sub(r"^\[[^\]]*\]\s*", "", text.strip()), maxsplit=1)[0].rstrip(".")


# --- Processes that torchrun started


class Meeting:
    """The key-value store that processes share even when some of them have ended; ``store`` is torch's."""

    _KEY = "rarefy: one has said why the run ends"

    def __init__(self, store: Any) -> None:
        self._store = store

    def first(self) -> bool:
        """Whether no other process has called this before; true where none can be asked."""
        try:
            return bool(self._store.add(self._KEY, 1) == 1)
        except RuntimeError:
            return True

    def wait_for_first(self, seconds: float) -> None:
        """Return as soon as one has called ``first``, or after so many seconds."""
        with suppress(RuntimeError):
            self._store.wait([self._KEY], timedelta(seconds=seconds))


@contextmanager
def joined() -> Iterator[Meeting]:
    """Within the scope, this process is one of those that torchrun started; ``World.current`` says which.

    SIGTERM raises Stopped, until the process is ending anyway. Raises InputError where torchrun has not said
    how to find the others, RankError where they are not there.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous  # not every build of torch has it

    _use_all_cores()
    try:
        store, rank, size = next(rendezvous("env://", timeout=_START))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    except ValueError as error:
        raise InputError.sentence(
            f"The processes of this run do not find each other: {_short(str(error))}; start them with torchrun."
        ) from error
    except RuntimeError as error:
        raise RankError(f"The processes of this run do not find each other ({_short(str(error))})") from error

    signal.signal(signal.SIGTERM, _stop)
    yield Meeting(store)


def _stop(*_: object) -> None:
    _end_undisturbed()
    raise Stopped("The process was told to stop (SIGTERM), as happens where another process of its run has ended")


def _end_undisturbed() -> None:
    """Ignore SIGTERM from now on: this process is ending, and torchrun tells those that are left to end."""
    if signal.getsignal(signal.SIGTERM) is _stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _use_all_cores() -> None:
    """Share the cores of this machine out, where torchrun gave each process one thread for want of a wish.

    It sets OMP_NUM_THREADS to 1 where that is not set; any other number was somebody's wish.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1":
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // here))
