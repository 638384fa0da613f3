"""Grams of a block's linears: which share one, and what each of them is the sum of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rarefy.calibration.collect import collect, starved
from rarefy.calibration.linears import same_memory
from rarefy.calibration.stream import BlockCall, HiddenStates
from rarefy.errors import ModelError, NumericalError
from rarefy.layer.gram import Gram
from rarefy.models.sites import Expert, LinearSite, Mixture

# A sum of some 30 products in float32, relative to its largest entry.
GRAM = 1e-6


class Reading(nn.Module):
    """A block whose linears read what ``reads`` makes of the hidden states, one call after the other."""

    def __init__(self, *reads: Any, width: int = 4) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in range(1 + max(index for index, _ in reads)))
        self.reads = reads

    def forward(self, hidden: Tensor) -> Tensor:
        shared: dict[Any, Tensor] = {}
        for index, read in self.reads:
            if read not in shared:
                shared[read] = read(hidden)
            self.linears[index](shared[read])
        return hidden


def grams_of(module: Reading, states: Tensor, batch_size: int = 2, **options: Any) -> dict[str, Gram]:
    sites = [LinearSite(str(index), linear) for index, linear in enumerate(module.linears)]
    calls = [[BlockCall((), {})] * -(-len(states) // batch_size)]
    stream = HiddenStates(states, batch_size, torch.device("cpu"), calls, **options)
    return collect(stream, module, 0, sites)


def states(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def is_sum(gram: Gram, *inputs: Tensor) -> bool:
    rows = torch.cat([X.reshape(-1, X.shape[-1]) for X in inputs]).double()
    exact = rows.T @ rows
    return gram.num_tokens == len(rows) and float((gram.H - exact).abs().max() / exact.abs().max()) <= GRAM


def same(hidden: Tensor) -> Tensor:
    return hidden


def turned(hidden: Tensor) -> Tensor:
    return hidden.transpose(1, 2)


def doubled(hidden: Tensor) -> Tensor:
    return hidden * 2


def test_linears_share_a_gram_where_they_read_the_same_memory_in_the_same_order() -> None:
    hidden = states(5, 4, 4)  # as long as it is wide: turned over, it has the same address and the same shape
    grams = grams_of(Reading((0, same), (1, turned), (2, same)), hidden)
    assert grams["0"] is grams["2"]
    assert is_sum(grams["0"], hidden)
    assert is_sum(grams["1"], turned(hidden))
    assert not torch.allclose(grams["0"].H, grams["1"].H, rtol=0.01)


@pytest.mark.parametrize("other", [lambda x: x.T, lambda x: x[:2], lambda x: x.clone(), lambda x: x[1:]])
def test_the_same_memory_is_the_same_place_shape_and_order(other: Any) -> None:
    x = states(4, 4)
    assert same_memory(x, x[:, :])
    assert not same_memory(x, other(x))
    assert not same_memory(x[:0], x[:0])


def test_a_linear_that_is_called_several_times_has_the_gram_of_all_calls() -> None:
    hidden = states(5, 3, 4)
    module = Reading((0, same), (1, same), (0, doubled), (2, doubled), (3, same), (3, doubled))
    for batch_size in (1, 2, 5):
        grams = grams_of(module, hidden, batch_size)
        assert is_sum(grams["0"], hidden, 2 * hidden)
        assert grams["3"] is grams["0"]  # the same inputs in the same order
        assert is_sum(grams["1"], hidden)
        assert is_sum(grams["2"], 2 * hidden)


def test_a_linear_that_is_called_twice_with_one_input_counts_it_twice_in_every_batch() -> None:
    hidden = states(5, 3, 4)
    grams = grams_of(Reading((0, same), (0, same)), hidden)
    assert is_sum(grams["0"], hidden, hidden)


def test_a_linear_that_is_not_called_is_one_sentence() -> None:
    with pytest.raises(
        ModelError, match=r"^0 is not called in a pass of its block, .*leave it out with --exclude\.$"
    ):
        grams_of(Reading((1, same)), states(2, 3, 4))


def test_the_pass_ends_behind_the_last_call_that_feeds_a_gram() -> None:
    ran: list[int] = []

    class Long(Reading):
        def forward(self, hidden: Tensor) -> Tensor:
            super().forward(hidden)
            ran.append(len(hidden))
            return hidden

    grams_of(Long((0, same), (1, doubled)), states(5, 3, 4))
    assert ran == [2]  # the first batch is run to its end, to see all calls
    ran.clear()
    grams_of(Long((0, same), (0, doubled)), states(5, 3, 4))
    assert ran == [2, 2, 1]  # how often it is called is not known to be the same everywhere


def test_an_expert_with_as_many_tokens_as_inputs_is_not_starved() -> None:
    site = LinearSite("expert", nn.Linear(3, 2), Expert(Mixture("experts", 1), 0, "up_proj"))
    for tokens, expected in ((2, [site]), (3, []), (4, [])):
        gram = Gram(3)
        gram.update(torch.ones(tokens, 3))
        assert starved([site], {"expert": gram}) == expected
        assert starved([LinearSite("expert", nn.Linear(3, 2))], {"expert": gram}) == []  # no expert
    assert starved([site], {"expert": gram}, tokens_per_input=2.0) == [site]


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_block_may_put_out_a_tuple_or_a_list(kind: Any) -> None:
    class Many(nn.Module):
        def forward(self, hidden: Tensor) -> Any:
            return kind([hidden + 1, None, hidden * 5])

    hidden = states(5, 3, 4)
    stream = HiddenStates(hidden.clone(), 2, torch.device("cpu"), [[BlockCall((), {})] * 3])
    assert torch.equal(stream.run(Many(), 0, 0, slice(0, 2)), hidden[:2] + 1)
    stream.advance(Many(), 0)
    assert torch.equal(stream.states, hidden + 1)


# --- The range of float16


def test_states_that_leave_the_range_of_float16_are_one_sentence() -> None:
    class Large(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden * 1e5

    calls = [[BlockCall((), {})] * 3]
    words = r"^The hidden states behind block 0 leave the range of float16 \(65,504\): .*float32 \(--dtype\)\.$"
    with pytest.raises(NumericalError, match=words):
        HiddenStates(torch.ones(5, 3, 4).half(), 2, torch.device("cpu"), calls).advance(Large(), 0)
    for dtype in (torch.bfloat16, torch.float32):
        HiddenStates(torch.ones(5, 3, 4).to(dtype), 2, torch.device("cpu"), calls).advance(Large(), 0)


def test_inputs_that_leave_the_range_of_float16_are_one_sentence() -> None:
    def large(hidden: Tensor) -> Tensor:
        return hidden * 60000 * 60000

    with pytest.raises(
        NumericalError, match=r"^What 1 reads leaves the range of float16 \(65,504\): .*\(--dtype\)\.$"
    ):
        grams_of(Reading((0, same), (1, large)).half(), states(2, 3, 4).half(), compute_dtype=torch.float16)


def test_weights_that_are_no_numbers_are_not_taken_for_the_range_of_float16() -> None:
    module = Reading((0, same), (1, lambda hidden: hidden * float("nan"))).half()
    with torch.no_grad():
        module.linears[0].weight[0, 0] = float("nan")
    grams = grams_of(module, states(2, 3, 4).half(), compute_dtype=torch.float16)
    assert not grams["1"].H.isfinite().any()
