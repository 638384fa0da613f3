"""Step 3 of a block: write what was solved, and broadcast each piece from the process that solved it."""

from __future__ import annotations

from jaxtyping import Bool
from torch import Tensor

from rarefy.layer.cast import round_to
from rarefy.layer.solution import Solution
from rarefy.models.sites import Site
from rarefy.parallel.sharing import Piece
from rarefy.parallel.world import World

OVERFLOWED = "overflowed"  # what a record's details call weights that were clipped to the dtype's largest number


def write_rows(site: Site, rows: slice, solution: Solution) -> None:
    """Write the solution of some rows in the dtype of the site, with +0 outside of the mask.

    Weights that overflow the dtype are clipped to its largest number, and ``solution.details`` counts them.
    """
    rounded, overflowed = round_to(solution.weight, solution.mask, site.dtype)
    if overflowed:
        solution.details[OVERFLOWED] = overflowed
    site.write(rounded, rows)


def broadcast_piece(world: World, site: Site, piece: Piece, mask: Bool[Tensor, "out inputs"] | None) -> None:
    """Write the rows that one process has solved into the block of all others, and into ``mask`` if given."""
    if world.size == 1:
        return
    rows = site.read(piece.rows)
    world.broadcast_(rows, piece.rank)
    site.write(rows, piece.rows)
    if mask is not None:
        world.broadcast_(mask[piece.rows], piece.rank)
