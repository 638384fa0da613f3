"""DaSS scores weights by the neurons that they make, and finds them; groups of neurons lie across outputs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from models_for_tests import VOCABULARY, make_model
from rarefy.errors import InputError, PatternError
from rarefy.layer.across import AcrossNM
from rarefy.layer.gram import Gram
from rarefy.layer.pattern import NM, PerRow, Unstructured, pattern_from_spec
from rarefy.layer.problem import LayerProblem
from rarefy.methods.base import run
from rarefy.methods.dass import DaSS
from rarefy.models.blocks import find_blocks
from rarefy.pruning.outputs import neuron_makers, neurons_of
from rarefy.pruning.settings import across_neurons

WINDOWS = torch.randint(3, VOCABULARY, (6, 16), generator=torch.Generator().manual_seed(0))
#: Norms of the same tokens from sums in another order.
SAME = {"rtol": 1e-4, "atol": 1e-5}


def problem(norms: Tensor | None = None, out: int = 8, inputs: int = 6) -> LayerProblem:
    generator = torch.Generator().manual_seed(1)
    X = torch.randn(40, inputs, generator=generator, dtype=torch.float64)
    W0 = torch.randn(out, inputs, generator=generator, dtype=torch.float64)
    return LayerProblem(W0, Gram.from_matrix(X.T @ X), norms)


# --- the method


def test_a_row_is_worked_out_by_hand() -> None:
    W0 = torch.tensor([[3.0, 1.0], [2.0, 1.5]])
    gram = Gram.from_matrix(torch.diag(torch.tensor([1.0, 1e6])))  # inputs play no part
    mask = run(DaSS(), LayerProblem(W0, gram, torch.tensor([1.0, 4.0])), Unstructured(0.5)).mask
    assert mask.tolist() == [[False, False], [True, True]]  # 3 < 2 * 2, 1 < 1.5 * 2
    mask = run(DaSS(exponent=0.0), LayerProblem(W0, gram, torch.tensor([1.0, 4.0])), Unstructured(0.5)).mask
    assert mask.tolist() == [[True, False], [False, True]]


def test_each_input_keeps_as_many_weights_where_the_pattern_lets_rows_compete() -> None:
    norms = torch.logspace(-2, 2, 8)
    for sparsity in (0.5, 0.4, 0.77):
        mask = run(DaSS(), problem(norms), Unstructured(sparsity)).mask
        counts = mask.sum(dim=0)
        assert int(counts.sum()) == Unstructured(sparsity).count((8, 6))
        assert int(counts.max() - counts.min()) <= 1
        wanda = run(DaSS(), problem(), Unstructured(sparsity)).mask.sum(dim=1)
        assert int(wanda.max() - wanda.min()) <= 1


@pytest.mark.parametrize("pattern", [PerRow(0.5), NM(1, 3)], ids=str)
def test_along_the_inputs_it_is_magnitude_pruning(pattern: Any) -> None:
    mask = run(DaSS(), problem(torch.logspace(-2, 2, 8)), pattern).mask
    assert torch.equal(mask, run(rarefy.Magnitude(), problem(), pattern).mask)


def test_without_norms_it_is_wanda_and_says_so() -> None:
    known, unknown = (run(DaSS(), problem(norms), PerRow(0.5)) for norms in (torch.ones(8), None))
    assert torch.equal(unknown.mask, run(rarefy.Wanda(), problem(), PerRow(0.5)).mask)
    assert (known.details["compared"], unknown.details["compared"]) == ("by output norms", "by input norms")


def test_norms_of_another_number_are_refused() -> None:
    with pytest.raises(InputError, match=r"output_norms is 'a tensor of shape \(3,\)', but must be \(8,\)"):
        problem(torch.ones(3))


# --- groups across outputs


def test_groups_across_outputs_are_those_of_the_transposed_weight() -> None:
    across, along = AcrossNM(2, 4), NM(2, 4)
    scores = problem().W0.abs()
    mask = across.project(scores)
    assert torch.equal(mask, along.project(scores.T.contiguous()).T)
    across.check(mask)
    assert across.count((8, 6)) == int(mask.sum()) == 24
    assert not list(across.excess(mask))
    assert torch.equal(across.project(torch.zeros(8, 6)), along.project(torch.zeros(6, 8)).T)
    locked = torch.zeros(8, 6, dtype=torch.bool)
    locked[3] = True
    assert bool(across.project(scores, locked)[3].all())


def test_what_breaks_groups_across_outputs_is_said() -> None:
    mask = torch.zeros(8, 6, dtype=torch.bool)
    mask[:2] = mask[4:6] = True
    AcrossNM(2, 4).check(mask)
    mask[2, 5], mask[0, 5] = True, False
    mask[3, 1] = True
    with pytest.raises(PatternError, match="Group 0 of input 1 of the mask keeps 3 weights, but 2:4 across outputs"):
        AcrossNM(2, 4).check(mask)
    assert list(AcrossNM(2, 4).excess(mask)) == ["1 of its 12 groups hold more than 2 of 4 non-zero weights"]
    assert list(AcrossNM(2, 3).excess(mask)) == ["its 8 outputs cannot be cut into groups of 3"]
    with pytest.raises(PatternError, match="layer has 8 outputs, which 3 does not divide"):
        AcrossNM(2, 3).validate((8, 6), "layer")
    with pytest.raises(PatternError, match="Rows 0 to 3 cut a group"):
        AcrossNM(2, 4).rows(0, 3, (8, 6))
    with pytest.raises(PatternError, match="1 <= N < M"):
        AcrossNM(4, 4)


def test_its_spec_gives_it_again() -> None:
    assert pattern_from_spec(AcrossNM(2, 4).spec()) == AcrossNM(2, 4)
    assert AcrossNM(2, 4).at(0.5).spec() == {}


@pytest.mark.parametrize(
    "method", [rarefy.ADMM(), rarefy.ALPS(), rarefy.SparseGPT(), rarefy.SparseFW(), DaSS()], ids=str
)
def test_every_method_takes_groups_across_outputs(method: rarefy.Method) -> None:
    for norms in (None, torch.logspace(-1, 1, 8)):
        solution = run(method, problem(norms), AcrossNM(2, 4))
        assert not solution.status.failed
        assert 0 < solution.relative_error < 1


# --- where the norms come from


def intermediate_norms(model: nn.Module, reader: nn.Module) -> Tensor:
    """The norm of each entry of what ``reader`` reads in plain forward passes over all windows."""
    seen = []
    handle = reader.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(WINDOWS)
    handle.remove()
    return torch.cat(seen).double().norm(dim=0)


class Spy(rarefy.Wanda):
    """Wanda, which remembers the norms of outputs that it is given."""

    needs_output_norms = True
    seen: list[tuple[Tensor, Tensor | None]] = []  # noqa: RUF012 (a test's)

    def solve(self, problem: LayerProblem, pattern: Any, start: Any = None) -> rarefy.Solution:
        self.seen.append((problem.W0, problem.output_norms))
        return super().solve(problem, pattern, start)


@pytest.mark.parametrize(
    ("architecture", "makers", "reader"),
    [
        ("llama", ["gate_proj", "up_proj"], "mlp.down_proj"),
        ("phi3", ["gate_up_proj"], "mlp.down_proj"),
        ("opt", ["fc1"], "fc2"),
        ("gpt2", ["c_fc"], "mlp.c_proj"),
        ("gpt_neox", ["dense_h_to_4h"], "mlp.dense_4h_to_h"),
        ("mixtral", ["gate_proj", "up_proj"], ""),  # whose neurons no hook sees
    ],
)
@pytest.mark.filterwarnings("ignore:.*weights of experts were solved with all tokens")
def test_the_layers_that_make_neurons_get_the_norms_of_what_the_next_one_reads(
    architecture: str, makers: list[str], reader: str
) -> None:
    model = make_model(architecture)
    block = find_blocks(model)[0]
    Spy.seen.clear()
    expected = intermediate_norms(model, block.module.get_submodule(reader)) if reader else None
    order = [site.name for site in block.sites]
    rarefy.prune(model, WINDOWS, pattern=PerRow(0.5), method=Spy(), include=[f"{block.name}.*"])
    assert len(Spy.seen) == len(order)
    for name, (_, norms) in zip(order, Spy.seen, strict=True):
        assert (norms is not None) == (name.rpartition(".")[2] in makers), name
        if norms is not None and expected is not None:
            halves = norms.view(-1, len(expected))
            torch.testing.assert_close(halves.double(), expected.expand_as(halves), **SAME)


def test_attention_is_no_mlp() -> None:
    for shapes, found in (
        ({"q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8)}, []),
        ({"qkv": (24, 8), "o": (8, 8)}, []),
        ({"gate": (12, 8), "up": (12, 8), "down": (8, 12)}, ["gate", "up"]),
        ({"gate_up": (24, 8), "down": (8, 12)}, ["gate_up"]),
        ({"fc1": (12, 8), "fc2": (8, 12)}, ["fc1"]),
        ({"a": (12, 8), "b": (8, 16)}, []),
        ({"a": (12, 8)}, []),
        ({}, []),
    ):
        assert neurons_of(shapes)[1] == found, shapes


def test_without_the_layer_that_reads_them_there_are_no_norms() -> None:
    Spy.seen.clear()
    rarefy.prune(
        make_model("llama"), WINDOWS, pattern=PerRow(0.5), method=Spy(), include=["*.0.mlp*"], exclude=["*down_proj"]
    )
    assert [norms for _, norms in Spy.seen] == [None, None]


def test_it_does_not_go_with_grams_that_are_collected_in_turn() -> None:
    with pytest.raises(InputError, match="refresh does not go with dass"):
        rarefy.prune(make_model("llama"), WINDOWS, pattern=PerRow(0.5), method=DaSS(), refresh=True)


# --- as published, from the command line


def test_groups_of_neurons_lie_across_gate_and_up_and_along_down(shelf: Path, tmp_path: Path) -> None:
    options = {"method": "dass", "pattern": "2:4", "along": "neurons", "include": ["*.mlp.*"]}
    small = {"calibration": str(shelf / "text.txt"), "num_samples": 4, "sequence_length": 32}
    result = rarefy.run({"model": str(shelf / "model"), **options, **small}, tmp_path / "out", texts=False)
    assert result is not None
    specs = {record.name.rpartition(".")[2]: record.pattern_spec["kind"] for record in result.report.layers}
    assert specs == {"gate_proj": "n:m across", "up_proj": "n:m across", "down_proj": "n:m"}
    assert result.facts["pattern_spec"] == {}  # no card says that it is fast
    with pytest.raises(PatternError, match="--along is 'neurons', which goes with an N:M --pattern"):
        rarefy.Recipe.read({"model": "model", "along": "neurons"})
    with pytest.raises(PatternError, match="--along is 'rows', but must be inputs or neurons"):
        rarefy.Recipe.read({"model": "model", "pattern": "2:4", "along": "rows"})


def test_which_sites_make_neurons_is_seen_without_weights() -> None:
    blocks = find_blocks(make_model("llama").to("meta"))
    makers = list(itertools.chain.from_iterable(neuron_makers(block) for block in blocks))
    assert {name.rpartition(".")[2] for name in makers} == {"gate_proj", "up_proj"}
    pattern_of = across_neurons(NM(2, 4), blocks)
    assert {str(pattern_of(site)) for site in blocks[0].sites} == {"2:4", "2:4 across outputs"}
    assert str(pattern_of) == "2:4 of neurons"
