"""The layers of one block: Grams collected, layers shared out among processes, solved, written, broadcast."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rarefy.calibration.collect import gram_groups
from rarefy.calibration.experts import Grams
from rarefy.calibration.stream import HiddenStates
from rarefy.models.blocks import Block
from rarefy.models.memory import peak_bytes
from rarefy.models.sites import Site
from rarefy.parallel.sharing import Piece, share_out
from rarefy.parallel.world import World
from rarefy.pruning.collect import collect_grams, reading_order
from rarefy.pruning.drift import Drifts
from rarefy.pruning.outputs import OutputNorms, output_norms
from rarefy.pruning.parts import Part, join
from rarefy.pruning.records import LayerRecord, three_digits
from rarefy.pruning.settings import MLP, PruneSettings
from rarefy.pruning.solve import solve_piece
from rarefy.pruning.write import broadcast_piece

OnProgress = Callable[[int, int, str], None]
Masks = dict[str, Bool[Tensor, "out inputs"]]
#: How much errors of each output of a layer count, by the name of the site.
RowWeights = dict[str, Float[Tensor, " out"]]


def prune_layers(
    world: World,
    block: Block,
    entering: HiddenStates,
    settings: PruneSettings,
    counter: PartCounter,
    masks: Masks | None = None,
    drifts: Drifts | None = None,
    row_weights: RowWeights | None = None,
) -> Iterator[LayerRecord]:
    """Prune the layers of one block, which all processes have in memory, and yield their records in order.

    ``entering`` are the hidden states that enter the block. The block is in the dtype of computation only while
    it runs: beside a solve it takes no more memory than as it is stored. ``masks``, if given, is filled with the
    mask of every site; ``drifts`` are those of drift.py, by site, and ``row_weights`` those of fisher.py. Raises
    NumericalError where a layer has NaN or infinity, or, if the settings are strict, could not be solved.
    """
    for together in gram_groups(block.sites):
        parts = reading_order(world, block, together, entering) if settings.refresh else [together]
        for sites in parts:
            # Progress counts one pass over the windows, the last, which is the longest.
            on_batch = counter.count if sites is parts[-1] else None
            grams, notes = collect_grams(
                world, block, sites, entering, means=settings.method.needs_means, on_batch=on_batch
            )
            norms = output_norms(block, grams) if settings.needs_output_norms else {}
            weights = norms if settings.row_weights == MLP else row_weights or {}
            # One process has the record of a layer as soon as it is solved; several share out all layers at hand.
            for some in [[site] for site in sites] if world.size == 1 else [sites]:
                solved = _prune_sites(
                    world, some, block.index, grams, settings, counter, entering.device, masks, drifts, norms, weights
                )
                for record in solved:
                    record.details |= notes[record.name]
                    yield record


def _prune_sites(
    world: World,
    sites: Sequence[Site],
    block: int,
    grams: Grams,
    settings: PruneSettings,
    counter: PartCounter,
    device: torch.device,
    masks: Masks | None,
    drifts: Drifts | None,
    norms: OutputNorms,
    weights: RowWeights,
) -> list[LayerRecord]:
    """Solve and write some layers of a block, and take their Grams away; their records, in order."""
    can_be_cut = [settings.method.rows_independent(settings.pattern_of(site)) for site in sites]
    pieces = share_out([site.shape for site in sites], world.size, can_be_cut)
    if masks is not None:
        masks |= {site.name: torch.zeros(site.shape, dtype=torch.bool, device=device) for site in sites}
    solved: dict[Piece, Part] = {}
    with world.together():
        for layer, site in enumerate(sites):
            gram = grams.pop(site.name)  # freed, with its factorisations, after the last layer that shares it
            own = [piece for piece in pieces if (piece.layer, piece.rank) == (layer, world.rank)]
            for piece in own:
                D = drifts.get(site.name) if drifts else None
                solved[piece], mask = solve_piece(
                    site, piece, block, gram, settings, D, norms.get(site.name), weights.get(site.name)
                )
                if masks is not None:
                    masks[site.name][piece.rows] = mask
            if own:
                counter.count(f"{site.name} {three_digits(solved[own[0]].record.relative_error)}")
    everyone = world.gather((solved, peak_bytes(device)))
    for others, _ in everyone:
        solved |= others
    records = []
    for layer, of_layer in groupby(pieces, key=lambda piece: piece.layer):
        parts = list(of_layer)
        for piece in parts:
            broadcast_piece(world, sites[layer], piece, masks[sites[layer].name] if masks is not None else None)
        if all(piece.rank != world.rank for piece in parts):
            counter.count()
        record = join([solved[piece] for piece in parts])
        record.peak_bytes = max(peak for _, peak in everyone)
        records.append(record)
    return records


class PartCounter:
    """Counts the parts of a run that are done, and tells ``on_progress``."""

    def __init__(self, on_progress: OnProgress | None, total: int) -> None:
        self._on_progress, self._total, self._done, self._note = on_progress, total, 0, ""

    def count(self, note: str | None = None) -> None:
        """One more part is done; a ``note`` replaces the one before it."""
        self._done += 1
        self._note = self._note if note is None else note
        if self._on_progress:
            self._on_progress(self._done, self._total, self._note)
