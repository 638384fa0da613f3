"""The loop of tuning: one step against plain autograd, and everything that must not change it."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from models_for_tests import ARCHITECTURES, VOCABULARY, build
from rarefy.errors import InputError, NumericalError, OutputError
from rarefy.models.blocks import find_blocks
from rarefy.tuning import logits as logits_module
from rarefy.tuning import teacher as teacher_module
from rarefy.tuning.masks import keep_zeros
from rarefy.tuning.parametrise import merge_parametrisation
from rarefy.tuning.settings import TuneSettings
from rarefy.tuning.teacher import mapped
from rarefy.tuning.train import Measurement, Tuner
from tuning_for_tests import make_tuner, prune_by_magnitude, site_masks, some_windows, sparse_and_dense

# Sums of a step in float32, in another order.
CLOSE = 2e-5

SCALED = {
    "scaled": lambda: transformers.GraniteConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, logits_scaling=4.0,
    ),
}  # fmt: skip


def plain_gradients(
    model: transformers.PreTrainedModel, dense: transformers.PreTrainedModel, ids: Tensor, share: float, hidden: float
) -> dict[str, Tensor]:
    """Gradients of the mean loss over all predicted positions, by autograd through whole logits."""
    mine = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    with torch.no_grad():
        theirs = dense(input_ids=ids, use_cache=False, output_hidden_states=True)
    log_q, log_p = (one.logits[:, :-1].flatten(0, 1).log_softmax(-1) for one in (mine, theirs))
    loss = (1 - share) * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    loss = loss + share * torch.nn.functional.nll_loss(log_q, ids[:, 1:].flatten())
    if hidden:
        # the last state of output_hidden_states has gone through the final norm
        outputs = [(one.hidden_states[1]) for one in (mine, theirs)]
        difference = (outputs[0] - outputs[1]).square().sum(-1) / outputs[1].square().sum(-1)
        loss = loss + hidden * difference.mean()
    chosen = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(chosen, torch.autograd.grad(loss, list(chosen.values()))))


def gradients(tuner: Tuner, numbers: Tensor) -> dict[str, Tensor]:
    for part in numbers.split(tuner.settings.micro_batch):
        tuner._forward(part, len(part) / len(numbers))
    return {name: parameter.grad for name, parameter in tuner.parameters.items() if parameter.grad is not None}


@pytest.mark.parametrize("share", [0.0, 0.25])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "mixtral", "scaled"])
def test_a_step_has_the_gradient_of_the_loss(
    architecture: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if architecture in SCALED:
        dense = build(SCALED[architecture]())
        sparse = prune_by_magnitude(copy.deepcopy(dense))
    else:
        sparse, dense = sparse_and_dense(architecture)
    monkeypatch.setattr(logits_module, "LOGIT_BYTES", 7 * 4 * VOCABULARY)  # slices of 7 positions
    tuner = make_tuner(sparse, dense, tmp_path, text_share=share)
    numbers = torch.tensor([0, 2])
    found = gradients(tuner, numbers)
    expected = plain_gradients(sparse, dense, some_windows()[numbers], share, 0.0)
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-3, atol=CLOSE), name


def test_hidden_states_have_their_part(tmp_path: Path) -> None:
    sparse, dense = sparse_and_dense()
    tuner = make_tuner(sparse, dense, tmp_path, hidden_weight=0.5)
    tuner._blocks = tuner._blocks[:1]
    tuner._teacher._blocks = tuner._teacher._blocks[:1]  # type: ignore[attr-defined]
    found = gradients(tuner, torch.tensor([1, 3]))
    expected = plain_gradients(sparse, dense, some_windows()[[1, 3]], 0.0, 0.5)
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-3, atol=CLOSE), name


@pytest.mark.parametrize("change", [{"micro_batch": 1}, {"gradient_checkpointing": True}])
def test_smaller_pieces_and_recomputed_blocks_change_nothing(change: dict[str, object], tmp_path: Path) -> None:
    found = []
    for more in ({}, change):
        sparse, dense = sparse_and_dense()
        found.append(gradients(make_tuner(sparse, dense, tmp_path, **more), torch.tensor([0, 3])))
    for name in found[0]:
        assert torch.allclose(found[0][name], found[1][name], atol=CLOSE), name


@pytest.mark.parametrize("teacher", ["states", f"top-{VOCABULARY - 1}"])
def test_recorded_teachers_teach_the_same(teacher: str, tmp_path: Path) -> None:
    found = []
    for kind in ("model", teacher):
        sparse, dense = sparse_and_dense()
        found.append(gradients(make_tuner(sparse, dense, tmp_path, teacher=kind), torch.tensor([0, 3])))
    for name in found[0]:
        # log probabilities of the k likeliest are kept in float16
        assert torch.allclose(found[0][name], found[1][name], atol=CLOSE if teacher == "states" else 1e-3), name


@pytest.mark.parametrize("name", ["full", "norms", "spp", "lora"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_every_form_learns_and_keeps_every_zero(name: str, architecture: str, tmp_path: Path) -> None:
    sparse, dense = sparse_and_dense(architecture)
    before, fixed = site_masks(sparse), sparse.get_output_embeddings().weight.clone()
    names = sorted(sparse.state_dict())
    rate = 5e-2 if name == "spp" else 3e-3
    tuner = make_tuner(sparse, dense, tmp_path, name=name, epochs=6, learning_rate=rate)  # type: ignore[arg-type]
    if name in ("full", "norms"):
        with keep_zeros(sparse):
            tuner.run()
    else:
        tuner.run()
    measured = tuner.measure()
    assert tuner.records[-1].kl < 0.9 * tuner.records[0].kl
    merge_parametrisation(name, sparse)  # type: ignore[arg-type]
    assert sorted(sparse.state_dict()) == names
    after = site_masks(sparse)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(sparse.get_output_embeddings().weight, fixed)
    assert tuner.measure().kl == pytest.approx(measured.kl, rel=1e-4)  # what is merged is what was trained


@pytest.mark.parametrize("name", ["spp", "lora"])
def test_adapters_of_experts_in_stacks_are_refused(name: str, tmp_path: Path) -> None:
    sparse, dense = sparse_and_dense("mixtral")
    with pytest.raises(InputError, match="experts that are kept in one stack"):
        make_tuner(sparse, dense, tmp_path, name=name)  # type: ignore[arg-type]


def test_spp_begins_as_the_model_it_is_put_on(tmp_path: Path) -> None:
    sparse, dense = sparse_and_dense()
    ids = some_windows()
    with torch.no_grad():
        before = sparse(input_ids=ids).logits
        for name in ("spp", "lora"):
            other = copy.deepcopy(sparse)
            tuner = make_tuner(other, dense, tmp_path, name=name)  # type: ignore[arg-type]
            assert torch.allclose(other(input_ids=ids).logits, before, atol=CLOSE)
            assert all(parameter.shape[0] != VOCABULARY for parameter in tuner.parameters.values())


def test_spp_scales_each_weight_of_a_row_by_its_factor(tmp_path: Path) -> None:
    sparse, dense = sparse_and_dense()
    site = find_blocks(sparse)[0].sites[4]
    weight = site.read()
    rows, inputs = site.shape
    tuner = make_tuner(sparse, dense, tmp_path, name="spp")  # rank 4, alpha 8: the scale is 2
    start = f"{site.name}.parametrizations.weight.0"
    A, b = tuner.parameters[f"{start}.A"], tuner.parameters[f"{start}.b"]
    assert A.shape == (4, inputs)
    assert float(A.detach().abs().max()) <= inputs**-0.5
    with torch.no_grad():
        b.copy_(torch.linspace(-1, 1, rows))
    merge_parametrisation("spp", sparse)
    for row in range(rows):
        expected = weight[row] * (1 + 2 * b[row] * A[4 * row // rows])
        assert torch.allclose(site.read()[row], expected.detach(), atol=1e-7)


def test_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    settings = {"epochs": 3, "optimizer": "adamw", "eval_every": 2}
    sparse, dense = sparse_and_dense()
    whole = make_tuner(sparse, dense, tmp_path, **settings)
    states = []
    with keep_zeros(sparse):
        whole.run(after_measurement=lambda *_: states.append(copy.deepcopy(whole.state())))
    torch.save(states[1], tmp_path / "state")
    other, _ = sparse_and_dense()
    again = make_tuner(other, dense, tmp_path, **settings)
    again.restore(torch.load(tmp_path / "state", weights_only=True))
    assert again.step == 2
    with keep_zeros(other):
        again.run()
    assert again.records == whole.records
    assert again.measurements == whole.measurements
    assert all(torch.equal(one, two) for one, two in zip(whole.values().values(), again.values().values()))


def test_the_same_seed_gives_the_same_order_and_another_one_not(tmp_path: Path) -> None:
    orders = []
    for seed in (0, 0, 1):
        sparse, dense = sparse_and_dense()
        orders.append(make_tuner(sparse, dense, tmp_path, seed=seed, epochs=3)._order().tolist())
    assert orders[0] == orders[1] != orders[2]
    assert [sorted(orders[0][i : i + 4]) for i in (0, 4, 8)] == [[0, 1, 2, 3]] * 3  # 2 of 6 are held out


def test_the_best_state_is_told_and_training_ends_without_a_better_one(tmp_path: Path) -> None:
    sparse, dense = sparse_and_dense()
    tuner = make_tuner(sparse, dense, tmp_path, epochs=9, eval_every=1, patience=3)
    values = iter([5.0, 4.0, 3.0, 3.5, 3.1, 3.2, 1.0])
    tuner.measure = lambda: Measurement(tuner.step, 0.0, 0.0, next(values))  # type: ignore[method-assign]
    told: list[tuple[float, bool]] = []
    tuner.run(after_measurement=lambda one, best: told.append((one.loss, best)))
    assert told == [(5.0, True), (4.0, True), (3.0, True), (3.5, False), (3.1, False), (3.2, False)]
    assert tuner.best is not None
    assert tuner.best.step == 2
    assert tuner.step == 5


def test_without_held_out_windows_nothing_is_measured(tmp_path: Path) -> None:
    sparse, dense = sparse_and_dense()
    tuner = make_tuner(sparse, dense, tmp_path, held_out=0)
    tuner.run()
    assert tuner.step == 6
    assert tuner.best is None


def test_what_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    sparse, dense = sparse_and_dense()
    tuner = make_tuner(sparse, dense, tmp_path)
    with torch.no_grad():
        sparse.get_submodule("model.norm").weight.fill_(torch.inf)
    with pytest.raises(NumericalError, match="Step 1 of the tuning"):
        tuner._train(torch.tensor([0, 1]))


def test_the_learning_rate_rises_and_falls() -> None:
    settings = TuneSettings(learning_rate=1.0, warmup_steps=2)
    rates = [settings.rate(step, 6) for step in range(6)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4])
    assert [replace(settings, schedule="constant").rate(step, 6) for step in (1, 2, 5)] == [2 / 3, 1, 1]
    cosine = [replace(settings, schedule="cosine").rate(step, 6) for step in range(2, 6)]
    assert cosine == pytest.approx([1, 0.8535534, 0.5, 0.1464466])
    assert replace(settings, warmup_steps=9).rate(0, 1) == 1.0


def test_steps_and_batches() -> None:
    settings = TuneSettings(batch_size=4, micro_batch=2, epochs=3)
    assert settings.steps(32) == 24
    assert settings.steps(33) == 25
    assert settings.measured_every(33) == 9
    assert replace(settings, max_steps=5).steps(32) == 5
    with pytest.raises(InputError, match="micro_batch is 3, but must be a divisor of batch_size"):
        TuneSettings(batch_size=4, micro_batch=3)


@pytest.mark.parametrize("name", ["nothing", "torch.optim:Nothing", "rarefy.errors:InputError"])
def test_an_optimiser_that_is_none(name: str, tmp_path: Path) -> None:
    sparse, dense = sparse_and_dense()
    with pytest.raises(InputError, match=f"--optimizer {name} cannot be used"):
        make_tuner(sparse, dense, tmp_path, optimizer=name)


def test_a_recorded_file_has_its_space_and_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "states"
    mapped(file, (2, 3), torch.float32, write=True)[:] = 1.5
    assert file.stat().st_size == 24
    assert torch.equal(mapped(file, (2, 3), torch.float32), torch.full((2, 3), 1.5))
    with pytest.raises(
        ValueError, match="has not the size of a"
    ):  # torch would make it longer, and fill it with zeros
        mapped(file, (3, 3), torch.float32)
    with pytest.raises(FileNotFoundError):
        mapped(tmp_path / "nothing", (3, 3), torch.float32)
    assert not (tmp_path / "nothing").exists()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher_module, "take_space", full)
    with pytest.raises(OutputError, match="states cannot be written: No space left on device"):
        mapped(file, (2, 3), torch.float32, write=True)


def test_another_optimiser(tmp_path: Path) -> None:
    sparse, dense = sparse_and_dense()
    tuner = make_tuner(sparse, dense, tmp_path, optimizer="torch.optim:Adam", epochs=6, learning_rate=3e-3)
    with keep_zeros(sparse):
        tuner.run()
    assert tuner.records[-1].kl < 0.9 * tuner.records[0].kl


def test_bfloat16_products_learn_as_well(tmp_path: Path) -> None:
    reached = []
    for precision in (torch.float32, torch.bfloat16):
        sparse, dense = sparse_and_dense()
        tuner = make_tuner(sparse, dense, tmp_path, precision=precision, epochs=4, learning_rate=3e-3)
        with keep_zeros(sparse):
            tuner.run()
        reached.append(tuner.records[-1].kl / tuner.records[0].kl)
    assert reached[1] == pytest.approx(reached[0], rel=0.05)
    assert next(iter(tuner.values().values())).dtype == torch.float32
