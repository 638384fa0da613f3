"""Block stores: where the loop takes a block from, and where the pruned block goes.

``BlockStore`` is a model in memory and keeps nothing. ``JournaledStore`` is a model in memory whose pruned
blocks are also saved beside the journal of the run, so that a killed run goes on. ``StreamedStore`` is a model
on disk: a block is loaded when the loop reaches it, and written into a copy of the checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Int64
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from rarefy.calibration.record import record
from rarefy.calibration.saved import load_stream, save_stream
from rarefy.calibration.spill import DENSE, PRUNED, StatesPart
from rarefy.calibration.stream import HiddenStates, convert_calls
from rarefy.errors import OutputError
from rarefy.models.atomic import replace_file
from rarefy.models.blocks import Block
from rarefy.models.streaming import StreamedModel
from rarefy.parallel.world import World
from rarefy.pruning.precision import compute_dtype, computing_in
from rarefy.pruning.records import LayerRecord

if TYPE_CHECKING:

    class Journal(Protocol):
        """What a store needs of a run's journal; runs/journal.py has it."""

        folder: Path
        model: Path
        states: list[StatesPart]

        @property
        def finished(self) -> int: ...
        def keep(self, name: str, content: bytes) -> None: ...
        def kept(self, name: str) -> bytes | None: ...
        def remember(self, name: str, content: bytes) -> None: ...
        def damaged(self, path: Path) -> OutputError: ...
        def records(self) -> list[LayerRecord]: ...
        def finish_block(self, index: int, records: Sequence[LayerRecord], states: Sequence[StatesPart]) -> None: ...


_WINDOWS = "windows.safetensors"
_COMPUTING = "computing.txt"  # the dtype of computation
_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


class BlockStore:
    """A model in memory, of which nothing is kept; the interface of all stores.

    The loop calls ``hidden_states`` once, and for each block in order ``loaded``, within it ``store``, and then
    ``finish``. Blocks before number ``finished`` were done by an earlier run, whose ``records`` these are. Each
    process of ``world`` has a store; ``store`` is called on the first of them only.
    """

    finished = 0
    #: A folder for hidden states; None where they are in memory.
    offload: Path | None = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.world = World.current()
        #: The dtype in which blocks run, once ``compute_dtype`` was asked.
        self.computing: torch.dtype | None = None

    def records(self) -> list[LayerRecord]:
        """The records of the finished blocks."""
        return []

    def hidden_states(
        self,
        blocks: Sequence[Block],
        windows: Int64[Tensor, "num length"],
        batch_size: int,
        first: int = 0,
        *,
        dense_path: bool = False,
    ) -> tuple[HiddenStates, HiddenStates | None]:
        """The hidden states that enter the first unfinished block, with how every block is called.

        The second is the same of the dense model, if ``dense_path`` asks for it. ``windows`` are this process's,
        of which the first is number ``first`` of the run.
        """
        entering = record(self.model, [block.module for block in blocks], windows, batch_size)
        return entering, entering.fork() if dense_path else None

    def compute_dtype(self, states: HiddenStates) -> torch.dtype:
        """The dtype in which blocks run: the first process chooses it for all, and for a run that goes on."""
        if self.computing is None:
            self.computing = self.world.from_first(partial(compute_dtype, states.states.dtype, states.device))
        return self.computing

    def keep_compute_dtype(self) -> None:
        """Keep that dtype, from the moment when the first block is finished."""
        self.keep(_COMPUTING, str(self.computing).encode())

    def recall(self, name: str) -> bytes | None:
        """What an earlier part of this run has remembered under ``name``; None where it has not."""
        return None

    def keep(self, name: str, content: bytes) -> None:
        """Keep what the run has decided, from the moment when its first block is finished."""

    def remember(self, name: str, content: bytes) -> None:
        """Keep what was found before the first block is pruned, for a run that goes on."""

    @contextmanager
    def loaded(self, block: Block, following: Block | None) -> Iterator[None]:
        """Within the scope, ``block`` is in memory; ``following`` is the one that will be loaded next."""
        yield

    @contextmanager
    def ending(self, blocks: Sequence[Block]) -> Iterator[None]:
        """Within the scope, all of the model but its ``blocks`` is in memory: embeddings, norm and head."""
        yield

    def store(self, block: Block, names: Collection[str]) -> None:
        """Keep those parameters of ``block`` that were changed, by their full ``names``."""

    def finish(
        self,
        block: Block,
        records: Sequence[LayerRecord],
        entering: HiddenStates | None,
        entering_dense: HiddenStates | None = None,
    ) -> None:
        """``block`` is done; ``entering`` are the states for the next one on both paths, None after the last."""


class JournaledStore(BlockStore):
    """A model in memory, of which every pruned block is kept in the folder of an open ``journal``.

    ``offload`` is a folder for the hidden states, which are in memory without it. Of several processes, the
    first keeps the blocks, and each the hidden states of its windows.
    """

    def __init__(self, model: nn.Module, journal: Journal, offload: Path | None = None) -> None:
        super().__init__(model)
        self.journal = journal
        self.offload = offload
        self._first = 0  # the number of this process's first window
        self.finished = journal.finished
        if kept := journal.kept(_COMPUTING):
            self.computing = _DTYPES[kept.decode()]
        for index in range(self.finished):
            self._restore(index)

    def records(self) -> list[LayerRecord]:
        """The records of the finished blocks. Raises OutputError where a file is missing or damaged."""
        return self.world.from_first(self.journal.records)

    def recall(self, name: str) -> bytes | None:
        """What the journal has under ``name``. Raises OutputError where it is missing or damaged."""
        return self.world.from_first(lambda: self.journal.kept(name))

    def keep(self, name: str, content: bytes) -> None:
        """Write it beside the journal, which names it with the next finished block. Raises OutputError."""
        with self.world.together():
            if self.world.leads:
                self.journal.keep(name, content)

    def remember(self, name: str, content: bytes) -> None:
        """Keep it beside the journal. Raises OutputError."""
        if self.computing is not None:  # what is remembered was computed in it
            self.keep_compute_dtype()
        with self.world.together():
            self.journal.remember(name, content)

    def hidden_states(
        self,
        blocks: Sequence[Block],
        windows: Int64[Tensor, "num length"],
        batch_size: int,
        first: int = 0,
        *,
        dense_path: bool = False,
    ) -> tuple[HiddenStates, HiddenStates | None]:
        """The hidden states that enter the first unfinished block: those that were saved last, if any.

        Where states of the pruned path are lost or damaged, they are computed again from the finished blocks.
        Raises OutputError where states of the dense path are, since the dense blocks may be gone.
        """
        self._first = first
        entering = self._record(blocks, windows, batch_size)
        dense = entering.fork(self.offload) if dense_path else None
        if not self.journal.states:
            return entering, dense
        try:
            load_stream(self.journal.folder, self.journal.states, entering, first)
        except OutputError as error:
            warnings.warn(f"{error} They are computed again from the finished blocks.", stacklevel=2)
            entering = self._record(blocks, windows, batch_size)  # some of them may be overwritten
            self._replay(entering, blocks[: self.finished])
        if dense is not None:
            load_stream(self.journal.folder, self.journal.states, dense, first, path=DENSE)
        return entering, dense

    def _record(self, blocks: Sequence[Block], windows: Int64[Tensor, "num length"], batch_size: int) -> HiddenStates:
        return record(self.model, [block.module for block in blocks], windows, batch_size, self.offload)

    def _replay(self, stream: HiddenStates, blocks: Sequence[Block]) -> None:
        """Bring the states that enter the first block behind ``blocks``, which are pruned: the bits as before."""
        dtype = self.computing or compute_dtype(stream.states.dtype, stream.device)
        convert_calls(stream, dtype)
        for block in blocks:
            with self._pruned(block), computing_in(block.module, dtype):
                stream.advance(block.module, block.index)

    @contextmanager
    def _pruned(self, block: Block) -> Iterator[None]:
        """Within the scope, a finished block is in memory as it was left."""
        yield

    def store(self, block: Block, names: Collection[str]) -> None:
        """Write the changed parameters into a file beside the journal. Raises OutputError."""
        if names:
            tensors = {name: self.model.get_parameter(name).detach().cpu().contiguous() for name in names}
            self.journal.keep(_weights_of(block.index), save(tensors))

    def finish(
        self,
        block: Block,
        records: Sequence[LayerRecord],
        entering: HiddenStates | None,
        entering_dense: HiddenStates | None = None,
    ) -> None:
        """Save the states for the next block, and note in the journal that this one is done. Raises OutputError.

        Of several processes, each saves those of its windows.
        """
        own: list[StatesPart] = []
        folder, number = self.journal.folder, block.index + 1
        with self.world.together():
            for path, states in ((PRUNED, entering), (DENSE, entering_dense)):
                if states is not None:
                    own += save_stream(folder, number, states, self._first, path=path)
        everyone = self.world.gather(own)
        with self.world.together():
            self.journal.finish_block(block.index, records, [part for parts in everyone for part in parts])

    def _restore(self, index: int) -> None:
        """Put the changed parameters of a finished block back, if it has any. Raises OutputError."""
        if (content := self.journal.kept(_weights_of(index))) is None:
            return
        with torch.no_grad():
            try:
                for name, tensor in load(content).items():
                    self.model.get_parameter(name).copy_(tensor)
            except (SafetensorError, AttributeError, RuntimeError) as error:
                raise self.journal.damaged(self.journal.folder / _weights_of(index)) from error


def _weights_of(index: int) -> str:
    return f"weights-{index:05d}.safetensors"


def keep_windows(output: Path, windows: Int64[Tensor, "num length"]) -> None:
    """Keep calibration text that the model wrote beside the journal of a run. Raises OutputError."""
    replace_file(output / "unfinished" / _WINDOWS, save({"windows": windows}))


def kept_windows(output: Path) -> Int64[Tensor, "num length"] | None:
    """The text that ``keep_windows`` kept; None where there is none, or it is damaged."""
    try:
        return load((output / "unfinished" / _WINDOWS).read_bytes())["windows"]
    except (OSError, SafetensorError, KeyError):
        return None


class StreamedStore(JournaledStore):
    """A model on disk: one block of it is in memory at a time, on ``device``.

    The copies of the checkpoint's files are made here, in the model folder of ``journal``; ``changed`` are the
    parameters that will be written to them. Raises OutputError where they cannot be made.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        journal: Journal,
        device: torch.device,
        offload: Path | None = None,
        changed: Collection[str] = (),
    ) -> None:
        super().__init__(streamed.model, journal, offload)
        self.streamed = streamed
        self.device = device
        self.copies = streamed.copies(journal.model, changed)

    def prepare(self, num_blocks: int) -> None:
        """Make the copies, or check those of an earlier run unless it got through all ``num_blocks``."""
        if not self.world.leads:
            return
        if not self.finished:
            self.copies.make()
        elif self.finished < num_blocks:
            self.copies.check()

    def _record(self, blocks: Sequence[Block], windows: Int64[Tensor, "num length"], batch_size: int) -> HiddenStates:
        """The states of a model of which only the first block and what comes before it are loaded."""
        rest = [block.name for block in blocks[1:]]
        with self.streamed.loaded(self.streamed.base, without=rest, device=self.device):
            return super()._record(blocks, windows, batch_size)

    @contextmanager
    def _pruned(self, block: Block) -> Iterator[None]:
        with self.streamed.loaded(block.name, device=self.device, copies=self.copies):
            yield

    @contextmanager
    def loaded(self, block: Block, following: Block | None) -> Iterator[None]:
        """Within the scope, ``block`` is on the device. Behind a GPU's back, the next one is read ahead."""
        with self.streamed.loaded(block.name, device=self.device):
            if following is not None and self.device.type != "cpu":
                self.streamed.prefetch(following.name)
            yield

    @contextmanager
    def ending(self, blocks: Sequence[Block]) -> Iterator[None]:
        with self.streamed.loaded("", without=[block.name for block in blocks], device=self.device):
            yield

    def store(self, block: Block, names: Collection[str]) -> None:
        """Write the changed parameters into the copy of the checkpoint. Raises OutputError."""
        self.streamed.store(names, self.copies)

    def _restore(self, index: int) -> None:
        """The copy of the checkpoint holds the finished blocks."""
