"""The turn of one block: collect its Grams, share its layers out, solve them, write them, hand them round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from rarefy.calibration.collect import Grams, collect, collect_all_tokens, starved, turns
from rarefy.calibration.stream import HiddenStates
from rarefy.errors import NumericalError
from rarefy.layer.gram import Gram
from rarefy.layer.problem import LayerProblem, error_ratio
from rarefy.methods.base import run
from rarefy.models.blocks import Block, Site
from rarefy.models.memory import peak_bytes
from rarefy.parallel.reduce import add_up
from rarefy.parallel.sharing import Piece, share_out
from rarefy.parallel.world import World
from rarefy.pruning.parts import Part, join
from rarefy.pruning.precision import computing_in
from rarefy.pruning.records import LayerRecord, three_digits
from rarefy.pruning.settings import PruneSettings

STARVED = "starved"  # what a record's details call a weight of an expert that saw too few tokens

Progress = Callable[[int, int, str], None]


def prune_block(
    world: World,
    block: Block,
    stream: HiddenStates,
    settings: PruneSettings,
    ticks: Ticks,
) -> Iterator[LayerRecord]:
    """Prune the layers of one block, which all processes have in memory, and yield their records in order.

    ``stream`` enters the block, which is in the dtype of computation only while it runs: beside a solve it takes
    no more memory than as it is stored. Raises NumericalError where a layer has NaN or infinity, or, if the
    settings are strict, could not be solved.
    """
    means = settings.method.needs_means

    def collected(sites: Sequence[Site]) -> Grams:
        with world.together(), computing_in(block.module, stream.compute_dtype):
            grams = collect(stream, block.module, block.index, sites, means=means, on_batch=ticks.one)
        return add_up(world, grams)

    def collected_from_all_tokens(sites: Sequence[Site]) -> Grams:
        with world.together(), computing_in(block.module, stream.compute_dtype):
            grams = collect_all_tokens(stream, block.module, block.index, sites, means=means)
        return add_up(world, grams)

    for sites in turns(block.sites):
        grams = collected(sites)
        notes = _routed_tokens(sites, grams)
        if short := starved(sites, grams):
            grams |= collected_from_all_tokens(short)
            for site in short:
                notes[site.name][STARVED] = f"solved with {grams[site.name].num_tokens} tokens, all of the block's"
        # Alone, a layer's record is there as soon as it is solved; several share all layers of the turn out.
        for some in [[site] for site in sites] if world.size == 1 else [sites]:
            for record_ in _prune_sites(world, some, block.index, grams, settings, ticks, stream.device):
                record_.details |= notes[record_.name]
                yield record_


def _prune_sites(
    world: World,
    sites: Sequence[Site],
    block: int,
    grams: Grams,
    settings: PruneSettings,
    ticks: Ticks,
    device: torch.device,
) -> list[LayerRecord]:
    """Solve and write some layers of a block, and take their Grams away; their records, in order."""
    pieces = share_out([site.shape for site in sites], world.size, settings.method.rows_independent(settings.pattern))
    solved: dict[Piece, Part] = {}
    with world.together():
        for layer, site in enumerate(sites):
            gram = grams.pop(site.name)  # freed, with its factorisations, after the last layer that shares it
            own = [piece for piece in pieces if (piece.layer, piece.rank) == (layer, world.rank)]
            for piece in own:
                with torch.no_grad():
                    solved[piece] = solve_piece(site, piece, block, gram, settings)
            if own:
                ticks.one(f"{site.name} {three_digits(solved[own[0]].record.relative_error)}")
    everyone = world.gather((solved, peak_bytes(device)))
    for others, _ in everyone:
        solved |= others
    records = []
    for layer, site in enumerate(sites):
        parts = [piece for piece in pieces if piece.layer == layer]
        for piece in parts:
            _hand_round(world, site, piece)
        if all(piece.rank != world.rank for piece in parts):
            ticks.one()
        record_ = join([solved[piece] for piece in parts])
        record_.peak_bytes = max(peak for _, peak in everyone)
        records.append(record_)
    return records


def _hand_round(world: World, site: Site, piece: Piece) -> None:
    """Write the rows that one process has solved, and written, into the block of all others."""
    if world.size > 1:
        rows = site.read(piece.rows)
        world.broadcast_(rows, piece.rank)
        site.write(rows, piece.rows)


def _routed_tokens(sites: Sequence[Site], grams: Grams) -> dict[str, dict[str, float | str]]:
    """For each site a note for its record: of an expert, how many tokens the router sent to it."""
    return {site.name: {"routed_tokens": grams[site.name].num_tokens} if site.expert else {} for site in sites}


def solve_piece(site: Site, piece: Piece, block: int, gram: Gram, settings: PruneSettings) -> Part:
    """Solve a layer, or rows of it, and write what was found."""
    pattern, shape = settings.pattern, site.shape
    if piece.stop - piece.start < shape[0]:
        pattern = pattern.rows(piece.start, piece.stop, shape)
    problem = LayerProblem(site.read(piece.rows), gram)
    solution = run(settings.method, problem, pattern, name=site.name, graded=False)  # but as it is written, below
    if settings.strict and solution.status.failed:
        reason = solution.details.get("failure", solution.status.value)
        raise NumericalError(f"{site.name}: {reason} (strict)")
    # Rounded to the dtype it is stored in; the mask is applied again, with +0 for zeros.
    site.write(torch.where(solution.mask, solution.weight.to(site.dtype), 0), piece.rows)
    lost = problem.objective(site.read(piece.rows))
    record_ = LayerRecord(
        name=site.name,
        block=block,
        shape=list(problem.shape),
        pattern=str(settings.pattern),
        kept=int(solution.mask.sum()),
        relative_error=error_ratio(lost, problem.dense_energy),
        status=solution.status.value,
        failed=solution.status.failed,
        details=solution.details,
        steps=solution.steps,
        seconds=solution.seconds,
        trace=solution.trace,
    )
    return Part(record_, lost, problem.dense_energy)


class Ticks:
    """Counts the parts of a run that are done and tells whoever watches."""

    def __init__(self, watcher: Progress | None, total: int) -> None:
        self._watcher, self._total, self._done, self._note = watcher, total, 0, ""

    def one(self, note: str | None = None) -> None:
        self._done += 1
        self._note = self._note if note is None else note
        if self._watcher:
            self._watcher(self._done, self._total, self._note)
