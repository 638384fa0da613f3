"""One HTML page about one or more runs, that opens without a network: what was done, and what it did.

    views of runs and sweeps  -->  sections (numbers, tables, pictures, texts)  -->  the template  -->  a page

The page holds no script and asks for no other file. Its colours follow the reader's light or dark setting, its
columns the width of the screen.
"""

from __future__ import annotations

from collections.abc import Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined

from rarefy.report import sections
from rarefy.report.shrinking import shrinking
from rarefy.report.tuning import tuning
from rarefy.report.views import Part, RunView, Section, SweepView


def render(runs: Sequence[RunView], sweeps: Sequence[SweepView] = ()) -> str:
    """The page about ``runs`` and ``sweeps``, at least one of them."""
    # Of a sweep's cells, one seed is shown layer by layer; all of them count in its table and curves.
    first_seeds = [cell for sweep in sweeps for cell in sections.first_seed(sweep.cells)]
    views = [*runs, *first_seeds]
    summaries = [sections.summary(view) for view in runs]
    summaries += [part for sweep in sweeps for part in sections.sweep_summary(sweep)]
    # A run that made the model smaller promises no zeros.
    sparse = [view for view in runs if view.layers]
    proofs = [sections.proof(view) for view in sparse]
    proofs += [sections.sweep_proof(sweep) for sweep in sweeps if any(cell.layers for cell in sweep.cells)]
    limits = [Part(text=_LIMITS)] if proofs else []
    shown = [
        Section("summary", "Summary", summaries),
        Section("shrinking", "What was removed", shrinking(runs)),
        Section("loss", "Loss against sparsity", sections.loss(sparse, sweeps)),
        Section("errors", "Error of each layer", sections.errors(runs, first_seeds)),
        Section("proof", "Sparsity and pattern", proofs),
        Section("iterations", "Iterations", sections.iterations([view for view in views if view.layers])),
        Section("tuning", "Tuning", tuning(runs)),
        Section("time", "Time", sections.time(runs, sweeps)),
        Section("texts", "What the models write", sections.texts(runs, sweeps)),
        Section("recipe", "Command, recipe and versions", sections.recipes(runs, sweeps)),
        Section("limits", "What the zeros gain, and what they do not", limits),
    ]
    names = [view.label for view in runs] + [f"comparison on {sweep.sweep['settings']['model']}" for sweep in sweeps]
    return _TEMPLATE.render(
        title="Rarefy: " + (names[0] if len(names) == 1 else f"{len(names)} runs"),
        subtitle="; ".join(dict.fromkeys([*(view.name for view in runs), *(sweep.name for sweep in sweeps)])),
        sections=[section for section in shown if section.parts],
    )


_LIMITS = (
    "A pruned checkpoint is a dense one that holds zeros: by itself it is neither smaller nor faster. At rest, "
    "general compression shrinks runs of zeros; 2:4 has kernels on NVIDIA GPUs from Ampere on, which pay off for "
    "large batches; some engines have kernels for unstructured sparsity on CPUs. Pruning costs quality, for some "
    "tasks more than perplexity shows. Perplexities at other context lengths or on other texts cannot be compared "
    "with these."
)


_TEMPLATE = Environment(
    loader=PackageLoader("rarefy.report"), undefined=StrictUndefined, autoescape=True, trim_blocks=True
).get_template("page.html.jinja")
