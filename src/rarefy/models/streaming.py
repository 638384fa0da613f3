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

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import TypeVar
from weakref import WeakValueDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from rarefy.errors import ModelError
from rarefy.models.conversion import plan_conversion
from rarefy.models.shards import ShardCopies, Shards, StoredTensor
from rarefy.models.source import ModelSource, cannot, quiet

_T = TypeVar("_T", bound=Tensor)


class StreamedModel:
    """A model of safetensors files, of which nothing is in memory but what was asked for.

    ``model`` is complete in its modules and shapes; what is not loaded is on the meta device. Names are
    full module names, "" for the whole model; what is below a name in ``without`` is left alone.
    ``dtype`` is what the checkpoint says unless it is given. Raises ModelError where the model cannot be
    had in parts: load it as a whole then.
    """

    def __init__(self, source: ModelSource, dtype: torch.dtype | None = None) -> None:
        if source.kind == "gguf":
            raise ModelError.sentence(f"{source.name} is a GGUF file, which cannot be read in parts.")
        self.shards = Shards.open(source.fetch())
        config = deepcopy(source.config)
        if getattr(config, "transformers_weights", None) or getattr(type(config), "extra_files", None):
            raise ModelError.sentence(
                f"{source.name} names its files of weights itself, and cannot be read in parts."
            )
        config.dtype = dtype or config.dtype
        if config.dtype is None:
            config.dtype = self._dtype_of_files(source.name)
        self.model: PreTrainedModel = replace(source, config=config).skeleton().requires_grad_(False)
        self._empty: dict[str, Tensor] = dict(self.model.named_parameters(remove_duplicate=False))
        self._empty |= dict(self.model.named_buffers(remove_duplicate=False))
        try:
            with quiet():
                self._plan = plan_conversion(self.model, {name: item.meta() for name, item in self._readable()})
        except ModelError:
            raise
        except Exception as error:  # transformers' functions for this are its own, and differ between releases
            raise cannot(
                f"be read in parts with transformers {transformers.__version__}", source.name, error
            ) from error
        self._origin = self._origins(source.name)
        # Names that share a parameter share it while any of them is loaded, and are freed with the last of them.
        self._live: WeakValueDictionary[str, nn.Parameter] = WeakValueDictionary()
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rarefy-reader")
        self._coming: dict[tuple[str, ...], Future[dict[str, Tensor]]] = {}

    @property
    def surplus(self) -> list[str]:
        """Tensors of the checkpoint that the model has no place for; a copy of the checkpoint keeps them."""
        return list(self._plan.surplus)

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
        for owner, module, full in self._buffers(name, without):
            leaf = full.rpartition(".")[2]
            if self._get(full).is_meta:
                self._make_buffers(owner, module, full.removesuffix(leaf), device)
        return self.model.get_submodule(name)

    def prefetch(self, name: str, without: Sequence[str] = ()) -> None:
        """Begin to read a part into memory on another thread; the next ``load`` of the same part takes it."""
        key = (name, *without)
        if key not in self._coming:
            self._coming[key] = self._reader.submit(self._read, list(self._names(name, without)))

    def free(self, name: str = "", without: Sequence[str] = ()) -> None:
        """Put a part back on the meta device; its memory is free when nobody else holds its tensors."""
        names = [*self._names(name, without), *(full for _, _, full in self._buffers(name, without))]
        for full in names:
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

    def check_storable(self, parameters: Iterable[str]) -> None:
        """Raise ModelError where the files hold a parameter in a dtype that would change its values."""
        for group in self._plan.of(self._origin[name] for name in parameters):
            for name, target in group.targets.items():
                for source in group.sources:
                    kept = self.shards.tensors[source].dtype
                    if torch.promote_types(kept, target.dtype) != kept:
                        raise ModelError.sentence(
                            f"{name} is used as {_short(target.dtype)}, but {source} holds it as {_short(kept)}, "
                            "in which it cannot be written back."
                        )

    def store(self, parameters: Iterable[str], copies: ShardCopies) -> None:
        """Write loaded parameters, under their full names, into the copy of the checkpoint.

        What a conversion made together is written together. All of it is on the disk afterwards. Raises
        OutputError where the disk refuses.
        """
        for group in self._plan.of(self._origin[name] for name in parameters):
            tensors = {
                name: self._get(name).detach().cpu().to(target.dtype) for name, target in group.targets.items()
            }
            for source, tensor in group.store(self.model, tensors).items():
                copies.write(source, tensor.to(self.shards.tensors[source].dtype))
        copies.sync()

    # --- What is where ------------------------------------------------------------------------------------

    def _readable(self) -> Iterator[tuple[str, StoredTensor]]:
        """The tensors whose dtype torch knows; no model has a place for others."""
        for name, stored in self.shards.tensors.items():
            if stored.known:
                yield name, stored

    def _dtype_of_files(self, name: str) -> torch.dtype:
        """The dtype of a checkpoint that does not say it in its settings."""
        dtypes = {stored.dtype for _, stored in self._readable() if stored.dtype.is_floating_point}
        if len(dtypes) != 1:
            raise ModelError.sentence(
                f"{name} does not say its dtype in config.json, and its files have {len(dtypes)} of them."
            )
        return dtypes.pop()

    def _origins(self, model: str) -> dict[str, str]:
        """For each name in the state dict the target it is loaded from: its own, or one that is tied to it."""
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

    def _buffers(self, name: str, without: Sequence[str]) -> Iterator[tuple[PreTrainedModel, nn.Module, str]]:
        """The buffers of a part that are in no file, each with its module and the model that makes it."""
        owners = {path: module for path, module in self.model.named_modules() if isinstance(module, PreTrainedModel)}
        for path, module in self.model.named_modules():
            if not _below(path, name) or any(_below(path, other) for other in without):
                continue
            owner = max((other for other in owners if _below(path, other)), key=len)
            for leaf in sorted(module._non_persistent_buffers_set):
                if module._buffers.get(leaf) is not None:
                    yield owners[owner], module, f"{path}.{leaf}" if path else leaf

    # --- Tensors ------------------------------------------------------------------------------------------

    def _read(self, names: Iterable[str], copies: ShardCopies | None = None) -> dict[str, Tensor]:
        """From the files, by target, what ``names`` need and is not in memory already."""
        stored = copies.stored if copies else self.shards.tensors.__getitem__
        tensors: dict[str, Tensor] = {}
        wanted = {self._origin[name] for name in names} - set(self._live.keys())
        for group in self._plan.of(sorted(wanted)):
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

    def _make_buffers(
        self, owner: PreTrainedModel, module: nn.Module, prefix: str, device: str | torch.device
    ) -> None:
        """Let the model make those buffers of a module that are in no file, such as rotary frequencies.

        transformers does it with the function that also makes random weights. It is called twice, over
        zeros and over ones, so that an element that it leaves alone, or draws at random, is found.
        """
        leaves = [leaf for leaf in module._non_persistent_buffers_set if module._buffers.get(leaf) is not None]
        made = []
        with torch.no_grad(), init.guard_torch_init_functions():
            for fill in (0, 1):
                for leaf in leaves:
                    module._buffers[leaf] = torch.full_like(self._empty[prefix + leaf], fill, device="cpu")
                owner._init_weights(module)
                made.append([module._buffers[leaf] for leaf in leaves])
        for leaf, first, second in zip(leaves, *made):
            assert first is not None
            assert second is not None
            if not torch.equal(first, second):
                raise ModelError.sentence(
                    f"{prefix}{leaf} is in no file of the checkpoint, and cannot be made without the whole model."
                )
            module._buffers[leaf] = _final(first.to(device))


def _final(tensor: _T) -> _T:
    """Tell transformers' functions that make random weights to leave this one alone."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    return tensor


def _below(full: str, name: str) -> bool:
    """Whether ``full`` is ``name`` or something within it."""
    return not name or full == name or full.startswith(name + ".")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
