"""Finds mixtures of experts in a block, and makes a site of every weight of every expert.

Experts come in two forms. *Listed*: one module each, with linears, in a list; these linears are sites like
any other, only that not every token meets them. *Fused*: all experts of a block in two parameters with a
leading dimension for the expert, ``gate_up_proj`` and ``down_proj``, applied by one module to the tokens that
a router has chosen; then a site is one expert's part of such a stack. In both forms the router's weight of
an expert scales what the expert puts out, never what it reads (where it does scale the input, the module is
called with the scaled input), so what a weight multiplies is known from the call of the experts alone.

Experts are what a router chooses among. A stack of matrices, or a list of modules, without a router is none: the
former stays as it is, and the linears of the latter are ordinary ones.

Which dimension is which is read off the shapes, as gate and up are twice as wide as what down reads. How a
fused module computes is not taken on trust: :meth:`FusedExperts.check` compares its output with Rarefy's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from rarefy.errors import ModelError
from rarefy.models.sites import Expert, Hindrance, LinearSite, Mixture, Site

GATE, UP, DOWN = "gate_proj", "up_proj", "down_proj"
# Two computations of the same thing in bfloat16 differ by some 0.01 of it, a wrong one by about as much as it is.
_SAME = 0.05
_CHECKED_TOKENS = 4


class ExpertSite(Site):
    """One weight of one expert within the stack of all: gate, up or down."""

    def __init__(self, experts: FusedExperts, index: int, part: str) -> None:
        self._stack = experts.down if part == DOWN else experts.inner
        place = Expert(experts, index, part)
        super().__init__(f"{experts.name}.{index}.{part}", experts.module, f"{experts.name}.{self._stack}", place)
        self._experts, self._index, self._part = experts, index, part

    @property
    def parameter(self) -> Tensor:
        parameter: Tensor = getattr(self.module, self._stack)
        return parameter

    def view(self, tensor: Tensor) -> Tensor:
        matrix = tensor[self._index]
        matrix = matrix.T if self._experts.transposed else matrix
        if self._part == DOWN or not self._experts.gated:
            return matrix
        if self._experts.interleaved:
            return matrix[self._part == UP :: 2]
        half = matrix.shape[0] // 2
        return matrix[half:] if self._part == UP else matrix[:half]


@dataclass(frozen=True)
class Call:
    """The arguments of a fused module: tokens, the experts chosen for each, and these experts' weights.

    Without ``index``, ``hidden`` holds all tokens once for each expert, zero where it is not chosen.
    """

    hidden: Float[Tensor, "tokens in"]
    index: Int[Tensor, "tokens k"] | None = None
    weights: Float[Tensor, "tokens k"] | None = None


class FusedExperts(Mixture):
    """A module that keeps all experts in two stacks of matrices, ``inner`` (gate and up, or up) and ``down``.

    Stacks are ``(experts, out, in)``, or ``(experts, in, out)`` if ``transposed``; gate and up are one after
    the other, or row by row if ``interleaved``. The module is called with tokens (tokens, in), for each the
    chosen experts (tokens, k), and their weights (tokens, k); or with one input, which holds the tokens once
    for each expert, scaled, zero for experts that are not chosen. Raises ModelError for any other module.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.module = module
        self._class = type(module).__name__
        self._name = name
        self.inner, self.down, self.gated, self.transposed = self._layout()
        self.interleaved = not getattr(module, "is_concatenated", True)
        self._arguments = list(inspect.signature(type(module).forward).parameters)[1:]
        self._act = next((getattr(module, key) for key in ("act_fn", "activation_fn") if hasattr(module, key)), None)
        self._apply_gate: Callable[[Tensor], Tensor] | None = getattr(module, "_apply_gate", None)
        computes = self._act is not None or (self.gated and self._apply_gate is not None)
        if len(self._arguments) not in (1, 3) or not computes:
            raise self._unknown()
        # A stack may have more matrices than there are experts: some "experts" hand their input on.
        super().__init__(name, min(getattr(module, stack).shape[0] for stack in (self.inner, self.down)))
        parts = (GATE, UP, DOWN) if self.gated else (UP, DOWN)
        self.sites += [ExpertSite(self, index, part) for index in range(self.size) for part in parts]

    @property
    def widths(self) -> set[int]:
        """The widths of an expert's input and output."""
        (_, a, b), (_, c, d) = (getattr(self.module, stack).shape for stack in (self.inner, self.down))
        return {a, d} if self.transposed else {b, c}

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The call that the arguments of the module's forward are. Raises ModelError where they are none."""
        values = [*args, *(kwargs[key] for key in self._arguments[len(args) :])]
        hidden = values[0].reshape(-1, values[0].shape[-1])
        if len(values) == 1:
            return Call(hidden)
        index, weights = (value.reshape(-1, value.shape[-1]) for value in values[1:])
        if index.is_floating_point() or not len(index) == len(weights) == len(hidden):
            raise self._unknown()
        return Call(hidden, index, weights)

    def inputs(self, call: Call, wanted: Iterable[int]) -> Iterator[tuple[int, Float[Tensor, "tokens in"]]]:
        """The tokens that reach each of the ``wanted`` experts in one call of the module, where there are any."""
        hidden, index = call.hidden, call.index
        if index is None:
            for expert in wanted:
                X = hidden.view(self.size, -1, hidden.shape[-1])[expert]
                if len(X := X[X.any(dim=1)]):
                    yield expert, X
            return
        chosen = index.reshape(-1)
        order = chosen.argsort(stable=True)
        ends = torch.bincount(chosen, minlength=self.size).cumsum(0).tolist()
        for expert in wanted:
            start = ends[expert - 1] if expert else 0
            if start < ends[expert]:
                yield expert, hidden[order[start : ends[expert]] // index.shape[-1]]

    def tokens(self, call: Call) -> Float[Tensor, "tokens in"]:
        """All tokens of one call of the module, as some expert reads them."""
        return call.hidden[call.hidden.any(dim=1)] if call.index is None else call.hidden

    def intermediate(self, expert: int, X: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens inner"]:
        """The input of the down projection of ``expert``, whose own input is X: act(gate X) * up X, or act(up X)."""
        inner = self._product(self.inner, expert, X)
        if not self.gated:
            return self._activate(inner)
        if self._apply_gate is not None:  # the module's own, which may clamp
            return self._apply_gate(inner)
        gate, up = inner.chunk(2, dim=-1)
        return self._activate(gate) * up

    def check(self, call: Call, output: Any) -> None:
        """Raise ModelError unless a call's first tokens give ``output`` when they are computed as assumed here."""
        hidden, index, weights = call.hidden, call.index, call.weights
        theirs = (output[0] if isinstance(output, (tuple, list)) else output).reshape(-1, hidden.shape[-1])
        if index is None or weights is None:
            each = len(hidden) // self.size
            rows = [(row, [(row // each, 1.0)]) for row in hidden.any(dim=1).nonzero().flatten().tolist()]
        else:
            rows = [
                (token, list(zip(index[token].tolist(), weights[token].tolist())))
                for token in range(len(hidden))
                if int(index[token].max()) < self.size
            ]
        for row, chosen in rows[:_CHECKED_TOKENS]:
            X = hidden[row : row + 1]
            ours = sum((weight * self._output(expert, X).float() for expert, weight in chosen), torch.zeros_like(X))
            difference = float((ours - theirs[row]).norm())
            if difference > _SAME * float(theirs[row].float().norm()):
                raise ModelError.sentence(
                    f"{self.name} does not compute as the experts that Rarefy knows do; "
                    f"leave them out with --exclude '{self.name}.*'."
                )

    def _output(self, expert: int, X: Tensor) -> Tensor:
        output = self._product(self.down, expert, self.intermediate(expert, X))
        norm: Callable[[Tensor], Tensor] | None = getattr(self.module, "post_expert_norm", None)
        return output if norm is None else norm(output)

    def _product(self, stack: str, expert: int, X: Tensor) -> Tensor:
        matrix: Tensor = getattr(self.module, stack)[expert]
        bias = getattr(self.module, f"{stack}_bias", None)
        return nn.functional.linear(
            X.to(matrix.dtype), matrix.T if self.transposed else matrix, None if bias is None else bias[expert]
        )

    def _activate(self, X: Tensor) -> Tensor:
        assert self._act is not None
        result: Tensor = self._act(X)
        return result

    def _layout(self) -> tuple[str, str, bool, bool]:
        """Which parameter is the inner stack, which is down, whether there is a gate, and whether in comes first."""
        stacks = list(matrix_stacks(self.module))
        for (inner, p), (down, q) in (zip(stacks, stacks[::-1])) if len(stacks) == 2 else ():
            if p.shape[1] == 2 * q.shape[2] and p.shape[2] == q.shape[1]:
                return inner, down, True, False
            if p.shape[2] == 2 * q.shape[1] and p.shape[1] == q.shape[2]:
                return inner, down, True, True
        names = {name for name, _ in stacks}
        if names == {UP, DOWN} and getattr(self.module, "has_gate", True) is False:
            return UP, DOWN, False, bool(getattr(self.module, "is_transposed", False))
        raise self._unknown()

    def _unknown(self) -> ModelError:
        stack, parameter = next(matrix_stacks(self.module))
        return ModelError.sentence(
            f"{self._name}.{stack} is a stack of {parameter.shape[0]} matrices, like experts, but {self._class} "
            "is not built like the experts that Rarefy knows."
        )


class ListedExperts(Mixture):
    """A list of modules of one form, the experts, of which each is called with the tokens that it is to read."""

    def __init__(self, name: str, modules: nn.ModuleList | nn.ModuleDict) -> None:
        super().__init__(name, len(modules))
        self.modules = list(modules.children())
        for index, (key, module) in enumerate(modules.named_children()):
            for part, linear in linears(module):
                self.sites.append(LinearSite(f"{name}.{key}.{part}", linear, Expert(self, index, part)))

    @property
    def widths(self) -> set[int]:
        """The width of an expert's input."""
        return {self.sites[0].shape[1]}


@dataclass
class Found:
    """The mixtures of a block, the modules of its routers by id, and experts of an unknown form (hindrances)."""

    mixtures: list[Mixture] = field(default_factory=list)
    routers: set[int] = field(default_factory=set)
    hindrances: list[Hindrance] = field(default_factory=list)


def find_mixtures(name: str, block: nn.Module, widths: Collection[int]) -> Found:
    """The mixtures in a block, and the routers, which nothing may prune.

    ``name`` is the block's full name, ``widths`` what hidden states of the model may be wide. Experts that are
    not built like known ones are a hindrance.
    """
    found = Found()
    for path, module in block.named_modules():
        full_name = f"{name}.{path}" if path else name
        if any(matrix_stacks(module)):
            sizes = {parameter.shape[0] for _, parameter in matrix_stacks(module)}
            try:
                mixture: FusedExperts | ListedExperts = FusedExperts(full_name, module)
            except ModelError as error:
                gates, chosen = _gates(block, path, sizes, {*widths, *_ends(module)})
                if chosen and not _ends(module).isdisjoint(widths):  # experts lead from hidden states and to them
                    found.hindrances.append(Hindrance(full_name, str(error).rstrip(".")))
                    found.routers |= {id(child) for gate in gates for child in gate.modules()}
                continue
            gates, _ = _gates(block, path, sizes, mixture.widths | {*widths})
        elif isinstance(module, nn.ModuleList | nn.ModuleDict) and _alike([*module.children()]):
            mixture = ListedExperts(full_name, module)
            gates, chosen = _gates(block, path, {mixture.size}, mixture.widths | {*widths})
            if not chosen:  # every token meets the whole list
                continue
        else:
            continue
        found.mixtures.append(mixture)
        found.routers |= {id(child) for gate in gates for child in gate.modules()}
    return found


def matrix_stacks(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The three-dimensional parameters of a module, by name; the weights of convolutions are none."""
    if not isinstance(module, _ConvNd):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and min(parameter.shape) > 1:
                yield name, parameter


def linears(module: nn.Module) -> list[tuple[str, nn.Linear | Conv1D]]:
    """The linears in a module, itself included, by their names within it."""
    return [(name, child) for name, child in module.named_modules() if isinstance(child, nn.Linear | Conv1D)]


def _alike(modules: Sequence[nn.Module]) -> bool:
    """Whether these are several modules of one form, with linears."""
    forms = [[(name, linear.weight.shape) for name, linear in linears(module)] for module in modules]
    return len(modules) > 1 and bool(forms[0]) and all(form == forms[0] for form in forms)


def _gates(block: nn.Module, path: str, sizes: set[int], widths: set[int]) -> tuple[list[nn.Module], bool]:
    """The routers and gates of the experts at ``path``, and whether one of them surely is a router.

    A router is beside the experts, or beside a module around them, the innermost with one beside it. A router ends
    in as many numbers as there are experts, the gate of a shared expert in one; some routers choose among more
    than experts. What leads back to a width of hidden states is neither: shared experts, projections around the
    experts, attention.
    """
    found: list[nn.Module] = []
    places = path.split(".")
    for depth in reversed(range(len(places))):
        parent = block.get_submodule(".".join(places[:depth]))
        beside = [child for name, child in parent.named_children() if name != places[depth]]
        candidates = [child for child in beside if _ends(child) and _ends(child).isdisjoint(widths)]
        found += [child for child in candidates if not isinstance(child, nn.Linear) or _ends(child) <= {1, *sizes}]
        if any(not sizes.isdisjoint(_ends(child)) for child in candidates):
            return found, True
    return found, False


def _ends(module: nn.Module) -> set[int]:
    """How wide the outputs of the products in a module are."""
    ends: set[int] = set()
    for child in module.modules():
        ends |= {size for _, stack in matrix_stacks(child) for size in stack.shape[1:]}
        matrices = (parameter for parameter in child.parameters(recurse=False) if parameter.ndim == 2)
        ends |= {matrix.shape[1 if isinstance(child, Conv1D) else 0] for matrix in matrices}
    return ends
