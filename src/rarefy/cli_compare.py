"""The commands ``compare`` and ``report``, which ``cli`` adds to its own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Annotated, Any

import typer

from rarefy.errors import InputError

Watch = Callable[[str], AbstractContextManager[Callable[[int, int, str], None]]]
Text = str | None


def add_commands(app: typer.Typer, watch: Watch) -> None:
    """Add both commands to ``app``; ``watch`` makes what shows how far a stage is."""

    @app.command()
    def compare(
        context: typer.Context,
        model: Annotated[
            Text, typer.Argument(metavar="MODEL", help="Hub id, local folder, .gguf file, or smollm2.")
        ] = None,
        output: Annotated[
            Path | None,
            typer.Option(
                "-o", "--output", metavar="OUT", help="New or empty folder, or one of the same command to go on with."
            ),
        ] = None,
        methods: Annotated[
            Text, typer.Option(metavar="A,B", help="Methods that `rarefy methods` lists, or A+B, by commas.")
        ] = None,
        sparsity: Annotated[
            Text, typer.Option(metavar="S,S", help="Fractions of zeros, by commas (default: 0.5).")
        ] = None,
        pattern: Annotated[
            Text, typer.Option(metavar="N:M,N:M", help="N:M patterns, by commas, beside the sparsities.")
        ] = None,
        seeds: Annotated[
            int, typer.Option(metavar="N", min=1, help="How many seeds; each draws its own windows.")
        ] = 1,
        scope: Annotated[
            Text, typer.Option(metavar="SCOPE", help="layer or row for all sparsities (default: the method's).")
        ] = None,
        settings: Annotated[
            list[str] | None,
            typer.Option("--set", metavar="METHOD.KEY=VALUE", help="A hyperparameter of one method; repeatable."),
        ] = None,
        calibration: Annotated[
            Text, typer.Option(metavar="SOURCE", help="As in `rarefy prune` (default: the same).")
        ] = None,
        num_samples: Annotated[Text, typer.Option(metavar="N", help="Calibration windows.")] = None,
        sequence_length: Annotated[Text, typer.Option(metavar="L", help="Tokens per calibration window.")] = None,
        batch_size: Annotated[
            Text, typer.Option(metavar="N", help="Calibration windows that run at once (default: 8).")
        ] = None,
        bos: Annotated[bool, typer.Option("--bos", help="Start every window with the model's start token.")] = False,
        device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N.")] = "auto",
        dtype: Annotated[
            str, typer.Option(metavar="DTYPE", help="auto (the checkpoint's), float32, bfloat16 or float16.")
        ] = "auto",
        include: Annotated[
            list[str] | None,
            typer.Option(metavar="GLOB", help="Only linears whose full name matches; repeatable."),
        ] = None,
        exclude: Annotated[
            list[str] | None,
            typer.Option(metavar="GLOB", help="No linears whose full name matches; repeatable."),
        ] = None,
        text: Annotated[
            list[str] | None,
            typer.Option(
                metavar="[LABEL=]TEXT",
                help="A text for perplexity and KL: a file, wikitext2 or python-docs (default); repeatable.",
            ),
        ] = None,
        eval_length: Annotated[
            int | None,
            typer.Option(metavar="L", help="Context length of perplexity (default: 2048, or the model's)."),
        ] = None,
        max_windows: Annotated[
            int | None, typer.Option(metavar="N", help="Only the first N windows of each text (default: all).")
        ] = None,
        eval_batch_size: Annotated[
            int, typer.Option(metavar="N", help="Windows, or items of tasks, that are measured at once.")
        ] = 1,
        tasks: Annotated[
            Text, typer.Option(metavar="A,B", help="Zero-shot tasks of lm-eval, by commas (default: none).")
        ] = None,
        task_data: Annotated[
            Path | None, typer.Option(metavar="FOLDER", help="Local files of the tasks, instead of the hub.")
        ] = None,
        limit: Annotated[
            int | None, typer.Option(metavar="N", help="Only the first N items of each task (default: all).")
        ] = None,
        save: Annotated[bool, typer.Option("--save", help="Also write the model of every cell.")] = False,
        retry: Annotated[bool, typer.Option("--retry", help="Try cells again that failed before.")] = False,
    ) -> None:
        """Prune a model in several ways and measure each: a table of methods, sparsities and seeds.

        The same command on the same folder goes on where it was stopped.
        """
        from rarefy.comparing import Options, SweepFolder, plan, run
        from rarefy.recipe import parse_settings
        from rarefy.report.records import aligned
        from rarefy.report.results import table

        if output is None:
            raise InputError.sentence("--output is missing: name a folder for the results (-o OUT).")
        folder = SweepFolder(output)
        sweep = plan(
            Options(
                model=model or "",
                methods=_split(methods),
                sparsities=_split(sparsity),
                patterns=_split(pattern),
                seeds=seeds,
                scope=scope,
                settings=parse_settings(settings or []),
                calibration=calibration,
                num_samples=num_samples,
                sequence_length=sequence_length,
                batch_size=batch_size,
                bos=bos,
                device=device,
                dtype=dtype,
                include=include or [],
                exclude=exclude or [],
                texts=text or [],
                eval_length=eval_length,
                max_windows=max_windows,
                eval_batch_size=eval_batch_size,
                tasks=_split(tasks),
                task_data=task_data,
                limit=limit,
                save=save,
                retry=retry,
            ),
            folder,
        )
        cells = run(sweep, folder, _command(context.obj), watch=watch, note=_note)
        print("\n".join(aligned(table(cells, folder.read_cell("dense")))))
        print(f"{folder.path} holds results.csv, results.md and results.json")
        if all(cell["status"] == "failed" for cell in cells):
            raise typer.Exit(1)

    @app.command()
    def report(
        runs: Annotated[
            list[Path], typer.Argument(metavar="RUN...", help="Folders that `prune` or `compare` wrote.")
        ],
        output: Annotated[
            Path | None, typer.Option("-o", "--output", metavar="FILE", help="Default: RUN/report.html of the first.")
        ] = None,
        texts: Annotated[
            bool,
            typer.Option(
                "--texts/--no-texts", help="Let dense and pruned model write, where the run did not keep it."
            ),
        ] = True,
        device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda, cuda:N.")] = "auto",
    ) -> None:
        """Draw runs on one HTML page that needs no network."""
        from rarefy.reporting import write_report

        file = write_report(runs, output, texts=texts, device=device, watch=watch)
        print(f"{file} holds the report")


def _command(arguments: Any) -> list[str]:
    return ["rarefy", *(arguments if isinstance(arguments, list) else sys.argv[1:])]


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in text.split(",")] if text else []


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
