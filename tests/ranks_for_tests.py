"""What tests of several processes share: a way to start them, and what some of them do."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import rarefy

#: Forks processes that need not import anything again: for each line of standard input their process numbers,
#: and their exit statuses when all have ended. Without torchrun, nobody ends those that are left when one dies.
_RUNNER = """
import importlib, json, os, sys, traceback
import transformers.models.llama.modeling_llama, transformers.models.mixtral.modeling_mixtral
import rarefy.runs.run, rarefy.parallel.launch, rarefy.pruning.stores, rarefy.runs.card
import rarefy.runs.verify, rarefy.runs.texts
from rarefy.cli import main
# Nobody reads what a random model writes, and to write it takes most of a run's time.
rarefy.runs.texts.kept_texts = lambda *_: []
rarefy.runs.model.writes_texts = lambda _: False
for line in sys.stdin:
    arguments, port, size, more = json.loads(line)
    children = []
    for rank in range(size):
        child = os.fork()
        children.append(child)
        if child:
            continue
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "RANK": str(rank)}
        os.environ.update(meeting | more)
        os.fsync = lambda _: None  # no test cuts the power
        try:
            if arguments[0] == "call":
                module, _, function = arguments[1].partition(":")
                status = getattr(importlib.import_module(module), function)(*arguments[2:]) or 0
            else:
                status = main(arguments)
        except BaseException:
            traceback.print_exc()
            status = 99
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


class Ranks:
    """Runs one command line, or one function, in several processes at a time."""

    def __init__(self, folder: Path) -> None:
        source, tests = Path(rarefy.__file__).parents[1], Path(__file__).parent
        environment = {
            **os.environ,
            "PYTHONPATH": f"{source}{os.pathsep}{tests}",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCH_CPP_LOG_LEVEL": "ERROR",  # as main sets it before it imports torch
            "XDG_CACHE_HOME": str(folder / "cache"),
        }
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", _RUNNER], env=environment, cwd=folder, stdin=-1, stdout=-1, text=True
        )

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()

    def run(self, size: int, *arguments: object, **more: str) -> list[int]:
        """The exit statuses, by rank."""
        self.start(size, *arguments, **more)
        return self.end()

    def start(self, size: int, *arguments: object, **more: str) -> list[int]:
        """The numbers of the processes; ``more`` are environment variables."""
        assert self._process.stdin
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        line = json.dumps([[str(word) for word in arguments], port, size, more])
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._line()

    def end(self) -> list[int]:
        """Wait for all: their exit statuses, or the negative numbers of the signals that ended them."""
        return self._line()

    def out(self, rank: int = 0) -> str:
        """Standard output."""
        return (self.folder / f"{rank}.out").read_text()

    def err(self, rank: int = 0) -> str:
        """Standard error."""
        return (self.folder / f"{rank}.err").read_text()

    def _line(self) -> list[int]:
        assert self._process.stdout
        found: list[int] = json.loads(self._process.stdout.readline())
        return found


# --- What processes do, by ``ranks.run(2, "call", "ranks_for_tests:...")``


def prune_experts(folder: str) -> None:
    """Prune listed experts; rank 0 writes the weights and what the records say, of one process and of several."""
    import torch

    from rarefy.errors import InputError
    from rarefy.parallel.world import World, joined

    with joined() as _:
        world = World.current()
        model, windows = experts_and_windows()
        try:
            rarefy.prune(model, windows[world.rank :], pattern=rarefy.NM(2, 4), method=rarefy.Wanda())
        except InputError as error:
            assert "windows on process 1 is not that on process 0" in str(error)  # noqa: PT017
        else:
            raise AssertionError
        with float64_grams():
            report = rarefy.prune(model, windows, pattern=rarefy.NM(2, 4), method=rarefy.DSnoT(), batch_size=1)
        torch.save((model.state_dict(), report.layers), f"{folder}/{world.rank}.pt")
        world.leave()


def experts_and_windows() -> tuple[Any, Any]:
    """Experts in lists, and windows so short that on no process the first one reaches all of them."""
    import torch

    from models_for_tests import VOCABULARY, make_model
    from test_experts import listed

    windows = torch.randint(3, VOCABULARY, (24, 2), generator=torch.Generator().manual_seed(0))
    return listed(make_model("mixtral")).double(), windows


@contextmanager
def float64_grams() -> Iterator[None]:
    """Within the scope, Grams are summed in float64, in which no two scores are equal but for rounding."""
    import torch

    plain = rarefy.Gram.__init__

    def in_float64(self: rarefy.Gram, size: int, **options: Any) -> None:
        plain(self, size, **{"dtype": torch.float64, **options})

    rarefy.Gram.__init__ = in_float64
    try:
        yield
    finally:
        rarefy.Gram.__init__ = plain


def pruned_in_float64(method: str, passes: int = 0, step: int = 4) -> dict[str, Any]:
    """The weights of a model with float64 in all of its arithmetic, pruned by all processes of the group.

    ``passes`` of matching follow, ``step`` windows at a time, with masters in float32.
    """
    import torch
    from transformers import LlamaConfig

    from models_for_tests import _GROUPED, VOCABULARY, build
    from rarefy.methods import METHODS

    sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 160}
    model = build(LlamaConfig(**{**_GROUPED, **sizes})).double()
    windows = torch.randint(3, VOCABULARY, (7, 48), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"pattern": rarefy.PerRow(0.5), "method": METHODS[method], "batch_size": 2}
    if passes:
        options["matching"] = rarefy.Matching(passes, learning_rate=1e-3, batch_size=step)
    with float64_grams():
        rarefy.prune(model, windows, **options)
    return dict(model.state_dict())


def prune_in_float64(folder: str, method: str, passes: str = "0") -> None:
    """Each rank writes the weights that it ends with."""
    import torch

    from rarefy.parallel.world import World, joined

    with joined() as _:
        world = World.current()
        torch.save(pruned_in_float64(method, int(passes)), f"{folder}/{world.rank}.pt")
        world.leave()


def add_up_unlike(folder: str) -> None:
    """Add up Grams that are shared on one process and not on the other, and some with means."""
    import torch

    from rarefy.layer.gram import Gram
    from rarefy.parallel.reduce import all_reduce_grams
    from rarefy.parallel.world import World, joined

    with joined() as _:
        world = World.current()
        inputs = torch.arange(24.0).view(2, 4, 3)
        for sharing in (0, 1):
            one, other = Gram(3, means=True), Gram(3, means=True)
            one.update(inputs[world.rank])
            other.update(inputs[world.rank])
            grams = all_reduce_grams(world, {"a": one, "b": one if world.rank == sharing else other, "c": other})
            whole = Gram(3, means=True)
            whole.update(inputs)
            assert (grams["a"] is grams["b"]) == (sharing == 0)
            for gram in grams.values():
                assert gram.num_tokens == 8
                assert torch.equal(gram.H, whole.H)
                assert torch.equal(gram.mean, whole.mean)
        world.leave()


def fail_on_one(folder: str) -> None:
    """An error of one process is everybody's, and what is none of Rarefy's names the process."""
    from rarefy.errors import NumericalError, PatternError, RankError
    from rarefy.parallel.world import World, joined

    with joined() as _:
        world = World.current()
        for rank, error, expected in (
            (1, NumericalError("q_proj has NaN."), (NumericalError, "q_proj has NaN.")),
            (0, PatternError("pattern", "2:3", "another"), (PatternError, "pattern is '2:3', but must be another.")),
            (1, KeyError("x"), (RankError, "Process 1 ended with KeyError: 'x'")),
        ):
            try:
                with world.together():
                    if world.rank == rank:
                        raise error
            except type(error) as caught:
                assert caught is error or (type(caught), str(caught)) == expected  # noqa: PT017
            except RankError as caught:
                assert world.rank != rank
                assert (RankError, str(caught)) == expected  # noqa: PT017
            else:
                raise AssertionError
        assert world.from_first(lambda: world.rank) == 0
        assert world.gather(world.rank) == list(range(world.size))
        world.leave()
