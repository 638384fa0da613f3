"""The command line: read what the user wrote, call the library, print what came out.

Results go to standard output, progress and notes to standard error. A user's mistake is one sentence
and exit status 2, found before a model is loaded; a run that fails otherwise exits with 1, an
interrupted one with 130. torch and transformers are imported inside the commands, so help is quick.
One command, one module; each is a function with its options for arguments.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import sys
from contextlib import suppress
from typing import Annotated, cast

import typer

from rarefy import __version__
from rarefy.cli import bench, compare, evaluate, inspect, methods, pack, prune, report, shrink, tune
from rarefy.cli.terminal import complain, plain_warnings
from rarefy.errors import InputError, RankError, RarefyError

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Make large language models sparse in one shot, and prove what was done.",
)

#: The commands that several processes can do together.
_IN_SEVERAL_PROCESSES = ("prune", "tune")

#: What typer raises for every mistake in the use of options and arguments.
_UsageError = cast("type[Exception]", typer.BadParameter.__base__)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status; ``arguments`` default to the process's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    keep_freed_memory()
    if _several_started():
        # Where the process is gone through which they meet, torch warns with a page of C++ frames.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from rarefy.parallel.launch import answer_together

        return answer_together(lambda: _answer(arguments), complain)
    return _answer(arguments)


def _several_started() -> bool:
    """Whether torchrun, or whoever sets the same variables, started more processes than this one."""
    size, rank = os.environ.get("WORLD_SIZE", ""), os.environ.get("RANK", "")
    return size.isdigit() and rank.isdigit() and int(size) > 1


def _answer(arguments: list[str]) -> int:
    try:
        with plain_warnings():
            status = app(arguments or ["--help"], prog_name="rarefy", standalone_mode=False, obj=arguments)
    except _UsageError as error:
        return complain(error.format_message(), 2)  # type: ignore[attr-defined]
    except InputError as error:
        return complain(_as_option(str(error)), 2)
    except RankError:
        raise  # which of the processes says it is seen to where they meet
    except RarefyError as error:
        return complain(str(error), 1)
    except typer.Abort:
        return complain("interrupted", 130)
    except Exception as error:
        if _out_of_memory(error):
            return complain(f"Out of memory: a smaller --batch-size or fewer --num-samples need less ({error}).", 1)
        if isinstance(error, OSError) and error.filename is not None:
            return complain(f"{error.filename} cannot be read or written: {error.strerror}", 1)
        raise
    if status == 130:  # how typer passes on an interrupt
        return complain("interrupted", 130)
    return int(status or 0)


#: What torch's allocators say where they have no error of a class of its own.
_ALLOCATORS = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory: you tried to allocate|CUDA error: out of memory"
)


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocator refused memory; errors that only speak of memory are others."""
    torch = sys.modules.get("torch")
    kinds = (MemoryError, *((torch.OutOfMemoryError,) if torch else ()))
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and bool(_ALLOCATORS.search(str(error))))


def keep_freed_memory() -> None:
    """Ask glibc not to hand freed blocks of some MiB back to the kernel after each use.

    Activations and (out, in) buffers are freed and taken again all the time; fetching their pages anew
    took a tenth to a quarter of a forward pass (docs/log.md). Blocks of 64 MiB and more, such as matrices of
    a model of billions of parameters, do go back: kept, they would double its peak, and with as much work
    done on each, their pages cost nothing. Elsewhere than on Linux nothing happens.
    """
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 64 << 20)  # M_MMAP_THRESHOLD: smaller blocks come from the heap
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink


def _as_option(message: str) -> str:
    """The library's name of an argument, with which its message begins, as it is written here."""
    found = re.match(r"(model|pattern|include|exclude|device|dtype|method|set)(?= is |: | \w+ is )", message)
    if not found:
        return message
    return ("MODEL" if found[1] == "model" else f"--{found[1]}") + message[found.end() :]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"rarefy {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    if _several_started() and context.invoked_subcommand not in _IN_SEVERAL_PROCESSES:
        raise InputError.sentence(
            f"rarefy {context.invoked_subcommand} works in one process: start it without torchrun."
        )


app.command("prune", cls=prune.PruneCommand)(prune.prune)
app.command("shrink")(shrink.shrink)
app.command("tune")(tune.tune)
app.command("compare")(compare.compare)
app.command("eval")(evaluate.evaluate)
app.command("report")(report.report)
app.command("inspect")(inspect.inspect)
app.command("pack")(pack.pack)
app.command("unpack")(pack.unpack)
app.command("bench")(bench.bench)
app.command("methods")(methods.methods)
