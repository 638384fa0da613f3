"""A model whose weights stay on disk: any part of it is loaded when its turn comes, and freed again.

The modules are those of the skeleton, on the meta device; a part that is loaded is, bit for bit, what
``from_pretrained`` would have made of it, and a part that is freed is on the meta device again. So memory
holds the parts in use and nothing else. Changed weights go into a copy of the checkpoint's files
(``ShardCopies``), never into the checkpoint.

    streamed = StreamedModel(source)
    with streamed.loaded("model.layers.0") as block:
        ...
        streamed.store(["model.layers.0.mlp.up_proj.weight"], copies)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from weakref import WeakValueDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from rarefy.errors import ModelError
from rarefy.models.buffers import make_buffers
from rarefy.models.conversion import Plan, plan_conversion
from rarefy.models.copies import ShardCopies
from rarefy.models.layout import lay_out
from rarefy.models.quiet import cannot, quiet
from rarefy.models.shards import Shards
from rarefy.models.source import ModelSource
from rarefy.models.stored import StoredTensor

_T = TypeVar("_T", bound=Tensor)


class StreamedModel:
    """A model in files, of which nothing is in memory but what was asked for.

    ``model`` is complete in its modules and shapes; what is not loaded is on the meta device. Names are
    full module names, "" for the whole model; what is below a name in ``without`` is left alone.
    ``dtype`` is what the checkpoint says unless it is given; quantised weights are dequantised. Raises
    ModelError where the model cannot be had in parts: load it as a whole then.
    """

    def __init__(self, source: ModelSource, dtype: torch.dtype | None = None) -> None:
        if source.kind == "gguf":
            raise ModelError.sentence(f"{source.name} is a GGUF file, which cannot be read in parts.")
        self.shards = Shards.open(source.fetch())
        config = deepcopy(source.config)
        if getattr(type(config), "extra_files", None):
            raise ModelError.sentence(
                f"{source.name} has weights in files that its index does not name, and cannot be read in parts."
            )
        said = config.dtype or self._dtype_of_files(source.name, dtype)
        #: Whether the model is used in another dtype than the checkpoint says.
        self.casts = dtype is not None and dtype != said
        config.dtype = config.get_text_config().dtype = dtype or said
        self.model: PreTrainedModel = replace(source, config=config).skeleton().requires_grad_(False)
        self._empty: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        self._empty |= dict(self.model.named_buffers(remove_duplicate=False))
        dequantizer = source.dequantizer()
        try:
            with quiet():
                stored = {name: item.meta() for name, item in self._readable()}
                self._plan = plan_conversion(self.model, stored, dequantizer)
        except ModelError:
            raise
        except Exception as error:  # transformers' functions for this are its own, and differ between releases
            raise cannot(
                f"be read in parts with transformers {transformers.__version__}", source.name, error
            ) from error
        self._plan_of_copies: Plan = self._plan  # quantised weights are ordinary in a copy
        self._origin = self._origins(source.name)
        # Names that share a parameter share it while any of them is loaded, and are freed with the last of them.
        self._live: WeakValueDictionary[str, nn.Parameter] = WeakValueDictionary()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rarefy-reader")
        self._coming: dict[tuple[str, ...], Future[dict[str, Tensor]]] = {}

    @property
    def surplus(self) -> list[str]:
        """Tensors of the checkpoint that the model has no place for; a copy of the checkpoint keeps them."""
        return [*self._plan.surplus, *(group.name for group in self._plan.placeless)]

    def copies(self, folder: Path, changed: Collection[str] = ()) -> ShardCopies:
        """A copy of the checkpoint in ``folder``, to which the parameters ``changed`` will be written.

        Nothing is written yet. What the copy holds is said in layout.py.
        """
        content = lay_out(self.model, self._plan, self.shards, changed, self.casts)
        copies = ShardCopies(self.shards, folder, content)
        if any(group.dequantize for group in self._plan.groups.values()):
            with quiet():
                stored = {name: item.meta() for name, item in copies.tensors.items() if item.known}
                self._plan_of_copies = plan_conversion(self.model, stored)
        return copies

    @property
    def base(self) -> str:
        """The name of the model without its head, "" where there is none such."""
        prefix = self.model.base_model_prefix
        return prefix if prefix and hasattr(self.model, prefix) else ""

    def nbytes(self, name: str = "", without: Sequence[str] = ()) -> int:
        """The memory in bytes that a part takes when it is loaded; what is shared within it counts once."""
        origins = {self._origin[full] for full in self._names(name, without)}
        return sum(self._plan.groups[origin].targets[origin].nbytes for origin in origins)

    def load(
        self,
        name: str = "",
        without: Sequence[str] = (),
        device: str | torch.device = "cpu",
        copies: ShardCopies | None = None,
    ) -> nn.Module:
        """The module of that name, with its parameters and buffers on ``device``.

        Parameters come from the checkpoint, or from ``copies`` of it, where they may have been changed.
        Raises ModelError where a file has changed meanwhile, or a buffer that is in no file cannot be made.
        """
        missing = [full for full in self._names(name, without) if self._get(full).is_meta]
        ahead = None if copies else self._coming.pop((name, *without), None)
        tensors = ahead.result() if ahead else {}
        tensors |= self._read([full for full in missing if self._origin[full] not in tensors], copies)
        for full in missing:
            self._set(full, tensors, device)
        for path, module in self._with_buffers(name, without):
            for leaf, buffer in self._made_buffers(path, module).items():
                module._buffers[leaf] = _final(buffer.to(device))
        return self.model.get_submodule(name)

    def check_buffers(self) -> None:
        """Raise ModelError where a buffer that is in no file cannot be made."""
        for path, module in self._with_buffers("", ()):
            self._made_buffers(path, module)

    def prefetch(self, name: str, without: Sequence[str] = ()) -> None:
        """Begin to read a part into memory on another thread; the next ``load`` of the same part takes it."""
        key = (name, *without)
        if key not in self._coming:
            self._coming[key] = self._reader.submit(self._read, list(self._names(name, without)))

    def free(self, name: str = "", without: Sequence[str] = ()) -> None:
        """Put a part back on the meta device; its memory is free when nobody else holds its tensors."""
        buffers = [_joined(path, leaf) for path, module in self._with_buffers(name, without) for leaf in _own(module)]
        for full in (*self._names(name, without), *buffers):
            parent, leaf = self._place(full)
            if leaf in parent._parameters:
                parent._parameters[leaf] = self._empty[full]  # type: ignore[assignment]
            else:
                parent._buffers[leaf] = self._empty[full]

    @contextmanager
    def loaded(
        self,
        name: str = "",
        without: Sequence[str] = (),
        device: str | torch.device = "cpu",
        copies: ShardCopies | None = None,
    ) -> Iterator[nn.Module]:
        """``load`` for the scope, then ``free``."""
        try:
            yield self.load(name, without, device, copies)
        finally:
            self.free(name, without)

    def close(self) -> None:
        """Free everything, and end the thread that reads ahead."""
        self._reader.shutdown(cancel_futures=True)
        self._coming.clear()
        self.free()

    def store(self, parameters: Iterable[str], copies: ShardCopies) -> None:
        """Write loaded parameters, under their full names, into the copy of the checkpoint.

        What a conversion made together is written together. All of it is on the disk afterwards. Raises
        OutputError where the disk refuses.
        """
        self._store(parameters, copies, self._get)

    def changed_in(self, model: nn.Module) -> list[str]:
        """The parameters and buffers of a ``model`` in memory that are not what the checkpoint makes of them."""
        state, changed = model.state_dict(), []
        for group in self._plan.of(self._plan.groups):
            made = group.load(self.model, lambda source: self.shards.tensors[source].read())
            changed += [
                name for name, tensor in made.items() if not torch.equal(tensor, state[name].cpu().to(tensor.dtype))
            ]
        return changed

    def store_from(self, model: nn.Module, names: Iterable[str], copies: ShardCopies) -> None:
        """Write these of a ``model`` in memory into the copy. Raises OutputError where the disk refuses."""
        self._store(names, copies, model.state_dict().__getitem__)

    def _store(self, names: Iterable[str], copies: ShardCopies, get: Callable[[str], Tensor]) -> None:
        for group in self._plan.of(self._origin[name] for name in names):
            tensors = {name: get(name).detach().cpu().to(target.dtype) for name, target in group.targets.items()}
            for source, tensor in group.store(self.model, tensors).items():
                copies.write(source, tensor.to(copies.stored(source).dtype))
        copies.sync()

    # --- What is where ------------------------------------------------------------------------------------

    def _readable(self) -> Iterator[tuple[str, StoredTensor]]:
        """The tensors whose dtype torch knows; no model has a place for others."""
        for name, stored in self.shards.tensors.items():
            if stored.known:
                yield name, stored

    def _dtype_of_files(self, name: str, wanted: torch.dtype | None) -> torch.dtype | None:
        """The dtype of a checkpoint that does not say it; None where its files have several, but one is wanted."""
        dtypes = {stored.dtype for _, stored in self._readable() if stored.dtype.is_floating_point}
        if len(dtypes) != 1:
            if wanted is not None:
                return None
            raise ModelError.sentence(
                f"{name} does not say its dtype in config.json, and its files have {len(dtypes)} of them."
            )
        return dtypes.pop()

    def _origins(self, model: str) -> dict[str, str]:
        """The target that each name in the state dict is loaded from: its own, or one that is tied to it."""
        tied: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            tied.setdefault(id(parameter), []).append(name)
        origin = {name: name for name in self.model.state_dict()}
        for names in tied.values():
            found = [name for name in names if name in self._plan.groups]
            for name in names if found else ():
                # transformers leaves weights untied that are tied by the settings, but differ in the files.
                if name not in found or (name != found[0] and self._same_in_files(found[0], name)):
                    origin[name] = found[0]
        missing = sorted(name for name, target in origin.items() if target not in self._plan.groups)
        if missing:
            raise ModelError.sentence(
                f"{model} lacks {len(missing)} weights of its model, {missing[0]} for instance."
            )
        return origin

    def _same_in_files(self, name: str, other: str) -> bool:
        """Whether two parameters are made from the same bytes."""
        tensors, others = (
            [self.shards.tensors[source] for source in self._plan.groups[each].sources] for each in (name, other)
        )
        return len(tensors) == len(others) and all(map(StoredTensor.same_as, tensors, others))

    def _names(self, name: str, without: Sequence[str]) -> Iterator[str]:
        """The names in the state dict that belong to a part."""
        for full in self._origin:
            if _below(full, name) and not any(_below(full, other) for other in without):
                yield full

    def _with_buffers(self, name: str, without: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
        """The modules of a part that have buffers that are in no file, each with its name."""
        for path, module in self.model.named_modules():
            if _below(path, name) and not any(_below(path, other) for other in without) and _own(module):
                yield path, module

    def _made_buffers(self, path: str, module: nn.Module) -> dict[str, Tensor]:
        """The buffers of a module that are in no file, as the model makes them; none where they are loaded."""
        leaves = _own(module)
        if not any(self._get(_joined(path, leaf)).is_meta for leaf in leaves):
            return {}
        owners = {each: owner for each, owner in self.model.named_modules() if isinstance(owner, PreTrainedModel)}
        owner = owners[max((each for each in owners if _below(path, each)), key=len)]
        return make_buffers(owner, module, {leaf: self._empty[_joined(path, leaf)] for leaf in leaves}, path)

    # --- Tensors ------------------------------------------------------------------------------------------

    def _read(self, names: Iterable[str], copies: ShardCopies | None = None) -> dict[str, Tensor]:
        """The tensors, by target, that ``names`` need and that are not in memory already, read from the files."""
        stored = copies.stored if copies else self.shards.tensors.__getitem__
        plan = self._plan_of_copies if copies else self._plan
        tensors: dict[str, Tensor] = {}
        wanted = {self._origin[name] for name in names} - set(self._live.keys())
        for group in plan.of(sorted(wanted)):
            made = group.load(self.model, lambda source: stored(source).read())
            tensors |= {name: tensor for name, tensor in made.items() if name in wanted}
        return tensors

    def _place(self, full: str) -> tuple[nn.Module, str]:
        path, _, leaf = full.rpartition(".")
        return self.model.get_submodule(path), leaf

    def _get(self, full: str) -> Tensor:
        parent, leaf = self._place(full)
        tensor = parent._parameters.get(leaf, parent._buffers.get(leaf))
        assert tensor is not None
        return tensor

    def _set(self, full: str, tensors: dict[str, Tensor], device: str | torch.device) -> None:
        """Give a parameter or buffer its tensor, or the parameter that is shared with a name that is loaded."""
        origin = self._origin[full]
        parent, leaf = self._place(full)
        if leaf in parent._buffers:
            parent._buffers[leaf] = _final(tensors.pop(origin).to(device))
            return
        parameter = self._live.get(origin)
        if parameter is None:
            parameter = _final(nn.Parameter(tensors.pop(origin).to(device), requires_grad=False))
            self._live[origin] = parameter
        parent._parameters[leaf] = parameter


def _final(tensor: _T) -> _T:
    """Tell transformers' functions that make random weights to leave this one alone."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor


def _own(module: nn.Module) -> list[str]:
    """The names of a module's own buffers that are in no file."""
    return [leaf for leaf in sorted(module._non_persistent_buffers_set) if module._buffers.get(leaf) is not None]


def _joined(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


def _below(full: str, name: str) -> bool:
    """Whether ``full`` is ``name`` or something within it."""
    return not name or full == name or full.startswith(name + ".")
