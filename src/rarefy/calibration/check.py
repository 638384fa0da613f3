"""Whether a model can be calibrated at all, found out before its weights are loaded or text is written.

The model runs once on the meta device (meta_pass.py), which costs no memory and a fraction of a second. That shows
which linears it calls, and all that crosses from block to block.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rarefy.calibration.meta_pass import MetaPass
from rarefy.calibration.record import (
    blocks_out_of_order,
    called_without_states,
    cannot_run,
    changed_between,
    same_part,
    stored_at,
    version,
)
from rarefy.calibration.stream import hidden_place
from rarefy.calibration.trees import Place, at, tensors_in
from rarefy.errors import ModelError
from rarefy.models.blocks import Block
from rarefy.models.experts import FusedExperts
from rarefy.models.quiet import quiet
from rarefy.models.sites import Site

_WINDOWS, _LENGTH = 3, 7  # numbers that hardly any dimension of a model has


def check_blocks(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Raise ModelError where the blocks of ``model`` cannot be replayed one by one, or a site is never called.

    Nothing is computed, and no weight is touched. A model that does not run on the meta device passes.
    """
    name = type(model).__name__
    try:
        watch = _run(model, blocks)
    except ModelError:
        raise
    except (ValueError, TypeError) as error:
        if _is_of_transformers(error):
            raise ModelError.sentence(cannot_run(name, error)) from error
        return
    except Exception:  # noqa: BLE001 (no meta device, no check: what is wrong is found when the model runs)
        return
    if watch.order != list(range(len(blocks))):
        raise ModelError.sentence(blocks_out_of_order(len(blocks), watch.order))
    _refuse_uncalled(name, blocks, watch)


def _run(model: nn.Module, blocks: Sequence[Block]) -> _Watch:
    """Run the model once and watch its blocks. Raises ModelError where something crosses them unseen by a replay."""
    tensors = {
        name: tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    }
    ids = torch.zeros(_WINDOWS, _LENGTH, dtype=torch.long, device="meta")
    watch = _Watch(type(model).__name__)
    training = model.training
    with torch.no_grad(), quiet(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]), watch.on(blocks):
        warnings.simplefilter("ignore")
        model.eval()
        try:
            watch.meta.note([ids])
            with watch.meta:
                functional_call(model, tensors, kwargs={"input_ids": ids, "use_cache": False})
        finally:
            model.train(training)
    return watch


class _Watch:
    """Sees every call of a block, and what it takes from the blocks before it."""

    def __init__(self, model: str) -> None:
        self.order: list[int] = []
        self.calls: Counter[int] = Counter()  # of modules, by identity
        self.guessed: set[int] = set()  # blocks whose calls may depend on numbers
        self.meta = MetaPass(self._on_read)
        self._model = model
        self._outputs: list[tuple[int, Any]] = []
        self._hidden: tuple[Tensor, int] | None = None
        self._form: list[Place] | None = None
        self._taken: list[tuple[Tensor, int]] = []
        self._lists: list[tuple[list[Any], int]] = []
        self._allowed: set[int] = set()
        self._guesses = 0

    @contextmanager
    def on(self, blocks: Sequence[Block]) -> Iterator[None]:
        """Within the scope, hooks are on the blocks and on the modules of their sites."""
        with ExitStack() as hooks:
            for block in blocks:
                hooks.callback(block.module.register_forward_pre_hook(self._before(block), with_kwargs=True).remove)
                hooks.callback(block.module.register_forward_hook(self._after(block), with_kwargs=True).remove)
                for site_module in {id(site.module): site.module for site in block.sites}.values():
                    hooks.callback(site_module.register_forward_pre_hook(self._count).remove)
            yield

    def _count(self, module: nn.Module, _: Any) -> None:
        self.calls[id(module)] += 1

    def _before(self, block: Block) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.order.append(block.index)
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor) or _WINDOWS not in hidden.shape:
                raise ModelError.sentence(called_without_states(self._model, block.index))
            if self._hidden is not None:
                before, its_version = self._hidden
                if not same_part(hidden, before) or version(hidden) != its_version:
                    raise ModelError.sentence(changed_between(self._model, block.index))
            for _, tensor in tensors_in([args[1:], kwargs]):
                if tensor is not hidden and self.meta.made_in(tensor) is not None:
                    self._check_crossing(block, tensor)
            self._taken = [(tensor, version(tensor)) for _, tensor in tensors_in([args, kwargs])]
            self._lists = [(value, len(value)) for value in [*args, *kwargs.values()] if isinstance(value, list)]
            self._allowed = {stored_at(tensor) for tensor, _ in self._taken}
            self._guesses = self.meta.guesses
            self.meta.block = block.index

        return hook

    def _after(self, block: Block) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self.meta.block = None
            if self.meta.guesses > self._guesses:
                self.guessed.add(block.index)
            changed = any(version(tensor) != before for tensor, before in self._taken)
            if changed or any(len(value) != before for value, before in self._lists):
                raise ModelError.sentence(f"{block.name} changes what it is called with, which Rarefy cannot replay.")
            form = [place for place, _ in tensors_in(output)]
            if self._form is not None and form != self._form:
                raise ModelError.sentence(
                    f"{block.name} puts out something else than the blocks before it, which Rarefy cannot replay."
                )
            self._form = form
            hidden = at(output, hidden_place(output))
            self._hidden = hidden, version(hidden)
            written = [value for value in [*args, *kwargs.values()] if isinstance(value, MutableMapping)]
            self._outputs.append((block.index, [output, written]))

        return hook

    def _check_crossing(self, block: Block, tensor: Tensor) -> None:
        """Raise ModelError for what was made of an earlier block's output, and is not just that."""
        known = any(same_part(tensor, other) for _, output in self._outputs for _, other in tensors_in(output))
        if not known or tensor.ndim == 0 or tensor.shape[0] != _WINDOWS:
            raise ModelError.sentence(
                f"{block.name} takes what {self._model} has made of an earlier block's output between the two, "
                "which Rarefy cannot replay."
            )

    def _on_read(self, tensor: Tensor) -> None:
        if stored_at(tensor) not in self._allowed:
            raise ModelError.sentence(
                f"Block {self.meta.block} of {self._model} reads what an earlier block has left somewhere else than "
                "in its output, which Rarefy cannot replay."
            )


def _is_of_transformers(error: Exception) -> bool:
    """Whether a model itself raised the error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("transformers.models.")


# --- Sites that are never called


def _refuse_uncalled(model: str, blocks: Sequence[Block], watch: _Watch) -> None:
    """Raise ModelError, with globs that leave them out, for sites whose module the model does not call.

    In blocks whose calls may depend on numbers (experts are called if tokens are sent to them), a site must be
    where others are that are not called either.
    """
    uncalled = [
        (block, site.name.removeprefix(f"{block.name}."))
        for block in blocks
        for site in block.sites
        if not _is_listed(site) and not watch.calls[id(site.module)]
    ]
    certain = {place for block, place in uncalled if block.index not in watch.guessed}
    places = [place for _, place in uncalled if place in certain]
    names = [f"{block.name}.{place}" for block, place in uncalled if place in certain]
    if names:
        globs = _globs(places, names, [site.name for block in blocks for site in block.sites])
        leave_out = " ".join(f"--exclude '{glob}'" for glob in globs)
        raise ModelError.sentence(
            f"{model} never calls {len(names)} of its linears, {names[0]} for instance, so that Rarefy does not see "
            f"what they read: leave them out with {leave_out}."
        )


def _is_listed(site: Site) -> bool:
    return site.expert is not None and not isinstance(site.expert.mixture, FusedExperts)


def _globs(places: Sequence[str], names: Sequence[str], everything: Sequence[str]) -> list[str]:
    """The shortest globs that match all of ``names``, at ``places`` in their blocks, and nothing else."""
    wanted = set(names)
    found: dict[str, None] = {}
    for place, name in zip(places, names):
        parts = place.split(".")
        candidates = [f"*.{part}.*" for part in parts[:-1]]
        candidates += ["*." + ".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        candidates.append(name)
        for glob in candidates:
            if {other for other in everything if fnmatchcase(other, glob)} <= wanted and fnmatchcase(name, glob):
                found[glob] = None
                break
    return list(found)
