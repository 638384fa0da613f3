"""Mixtures of experts: found, read and written slice by slice, fed by the tokens that are routed to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

import rarefy
from models_for_tests import EXPERT_ARCHITECTURES, VOCABULARY, make_model, save_folder
from rarefy.calibration.collect import collect, collect_all_tokens, gram_groups, starved
from rarefy.calibration.record import record
from rarefy.errors import InputError, ModelError
from rarefy.layer.gram import Gram
from rarefy.layer.pattern import NM, Pattern, Unstructured
from rarefy.models.blocks import Block, find_blocks, select_sites
from rarefy.runs.folder import RunFolder
from rarefy.runs.verify import inspect_folder

NUM, LENGTH, BATCH = 5, 48, 2  # enough tokens for every expert; the last batch is a half
# A sum of some 100 products in float32, relative to its largest entry.
GRAM = 1e-5

each_architecture = pytest.mark.parametrize("architecture", EXPERT_ARCHITECTURES)
every_size = pytest.mark.filterwarnings("ignore:.* weights of experts were solved with all tokens")


def windows(num: int = NUM, length: int = LENGTH) -> Tensor:
    return torch.randint(3, VOCABULARY, (num, length), generator=torch.Generator().manual_seed(0))


def last_block(model: nn.Module) -> Block:
    """In all architectures the last block has experts."""
    return find_blocks(model)[-1]


def experts_module(model: nn.Module) -> nn.Module:
    return next(site.module for site in last_block(model).sites if site.expert)


def grams_of_last_block(
    model: nn.Module, tokens: Tensor, collecting: Callable[..., dict[str, Gram]] = collect, **options: Any
) -> dict[str, Gram]:
    blocks = find_blocks(model)
    stream = record(model, [block.module for block in blocks], tokens, BATCH)
    for block in blocks[:-1]:
        stream.advance(block.module, block.index)
    sites = [site for site in blocks[-1].sites if collecting is collect or site.expert]
    return collecting(stream, blocks[-1].module, blocks[-1].index, sites, **options)


# --- what the slices are: written once more by hand, from the modelling code of each architecture


def matrices(architecture: str, experts: nn.Module, expert: int) -> dict[str, Tensor]:
    down = experts.down_proj[expert]
    if architecture == "nemotron_h":
        return {"up_proj": experts.up_proj[expert], "down_proj": down}
    both = experts.gate_up_proj[expert]
    if architecture == "gpt_oss":  # (in, out), a column of gate, a column of up
        return {"gate_proj": both[:, 0::2].T, "up_proj": both[:, 1::2].T, "down_proj": down.T}
    if architecture == "llama4":  # (in, out), gate before up
        gate, up = both.split(both.shape[1] // 2, dim=1)
        return {"gate_proj": gate.T, "up_proj": up.T, "down_proj": down.T}
    gate, up = both.split(both.shape[0] // 2, dim=0)
    return {"gate_proj": gate, "up_proj": up, "down_proj": down}


def intermediate(architecture: str, experts: nn.Module, expert: int, x: Tensor) -> Tensor:
    weight = {name: matrix.double() for name, matrix in matrices(architecture, experts, expert).items()}
    if architecture == "nemotron_h":
        return (weight["up_proj"] @ x).relu().square()
    gate, up = weight["gate_proj"] @ x, weight["up_proj"] @ x
    if architecture == "gpt_oss":
        bias = experts.gate_up_proj_bias[expert].double()
        gate, up = (
            (gate + bias[0::2]).clamp(max=experts.limit),
            (up + bias[1::2]).clamp(-experts.limit, experts.limit),
        )
        return gate * torch.sigmoid(experts.alpha * gate) * (up + 1)
    return gate * torch.sigmoid(gate) * up


def calls_of_experts(model: nn.Module, tokens: Tensor) -> list[list[list[Tensor]]]:
    """For each expert of the last block the tokens that reach it, one by one, in a plain pass of the model."""
    module, seen = experts_module(model), []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.inference_mode():
        model(input_ids=tokens, use_cache=False)
    handle.remove()
    ((hidden, *routing),) = seen
    reached: list[list[Tensor]] = [[] for _ in range(4)]
    if not routing:  # Llama 4: all tokens once for each expert, scaled by a weight that is zero for most
        for row, x in enumerate(hidden.reshape(-1, hidden.shape[-1])):
            if x.abs().sum() > 0:
                reached[row // (len(hidden) // 4)].append(x)
    else:
        for x, chosen in zip(hidden, routing[0].tolist()):
            for expert in chosen:
                reached[expert].append(x)
    return reached


def is_sum_of(gram: Gram, rows: list[Tensor], times: int = 1) -> bool:
    exact = torch.zeros(gram.size, gram.size, dtype=torch.float64)
    for row in rows:
        exact += times * torch.outer(row.double(), row.double())
    return gram.num_tokens == times * len(rows) and float((gram.H - exact).abs().max()) <= GRAM * float(exact.max())


# --- finding


@each_architecture
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_expert_is_found_and_no_router_is(architecture: str, device: str) -> None:
    model = make_model(architecture)
    if device == "meta":
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(model.config)
    block = last_block(model)
    parts = ("up_proj", "down_proj") if architecture == "nemotron_h" else ("gate_proj", "up_proj", "down_proj")
    mixture = {"nemotron_h": "mixer", "llama4": "feed_forward"}.get(architecture, "mlp")
    found = [site.name.removeprefix(f"{block.name}.") for site in block.sites if site.expert]
    assert found == [f"{mixture}.experts.{expert}.{part}" for expert in range(4) for part in parts]
    others = {site.name.removeprefix(f"{block.name}.") for site in block.sites if not site.expert}
    attention = {f"self_attn.{x}_proj" for x in "qkvo"}
    shared = ("gate_proj", "up_proj", "down_proj")
    assert others == {
        "deepseek_v3": {"self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa"}
        | {"self_attn.kv_b_proj", "self_attn.o_proj"}
        | {f"mlp.shared_experts.{part}" for part in shared},
        "qwen2_moe": attention | {f"mlp.shared_expert.{part}" for part in shared},
        "llama4": attention | {f"feed_forward.shared_expert.{part}" for part in shared},
        "nemotron_h": {f"mixer.shared_experts.{part}" for part in ("up_proj", "down_proj")}
        | {"mixer.fc1_latent_proj", "mixer.fc2_latent_proj"},
    }.get(architecture, attention)


@each_architecture
def test_a_site_reads_and_writes_its_slice_and_nothing_else(architecture: str) -> None:
    model = make_model(architecture)
    experts = experts_module(model)
    for site in last_block(model).sites:
        if site.expert is None:
            continue
        part = site.name.rpartition(".")[2]
        weight = site.read()
        assert tuple(weight.shape) == site.shape
        assert weight.is_contiguous()
        assert torch.equal(weight, matrices(architecture, experts, site.expert.index)[part])
        before = {name: value.clone() for name, value in model.state_dict().items()}
        site.write(-weight)
        assert torch.equal(matrices(architecture, experts, site.expert.index)[part], -weight)
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        assert changed == [site.parameter_name]
        difference = model.state_dict()[site.parameter_name] != before[site.parameter_name]
        assert int(difference.sum()) == weight.count_nonzero()


def test_globs_name_experts_like_modules() -> None:
    blocks = find_blocks(make_model("qwen2_moe"))
    names = [
        site.name for block in select_sites(blocks, ["*.experts.[02].*"], ["*.down_proj"]) for site in block.sites
    ]
    expected = [f"model.layers.{b}.mlp.experts.{e}.{p}_proj" for b in (0, 1) for e in (0, 2) for p in ("gate", "up")]
    assert names == expected
    for router in ("*.mlp.gate", "*.shared_expert_gate"):
        with pytest.raises(InputError, match=r"at least one of the 38 linears"):
            select_sites(blocks, exclude=[router])


# --- Grams


@each_architecture
def test_grams_are_those_of_a_slow_loop_over_tokens_and_experts(architecture: str) -> None:
    model = make_model(architecture)
    grams = grams_of_last_block(model, windows(), means=True)
    experts = experts_module(model)
    reached = calls_of_experts(model, windows())
    assert min(map(len, reached)) > 0
    for site in last_block(model).sites:
        if site.expert is not None:
            rows = reached[site.expert.index]
            if site.expert.part == "down_proj":
                rows = [intermediate(architecture, experts, site.expert.index, x.double()) for x in rows]
            assert is_sum_of(grams[site.name], rows), site.name
            torch.testing.assert_close(
                grams[site.name].mean, torch.stack(rows).double().mean(0), rtol=1e-4, atol=1e-5
            )
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "nemotron_h"])
def test_hooks_see_the_experts_in_every_implementation(architecture: str) -> None:
    reference = None
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model = make_model(architecture)
        model.set_experts_implementation(implementation)
        grams = grams_of_last_block(model, windows())
        reference = reference or grams
        for name, gram in grams.items():
            assert gram.num_tokens == reference[name].num_tokens
            torch.testing.assert_close(gram.H, reference[name].H, rtol=1e-5, atol=1e-5)


def test_gate_and_up_share_a_gram_and_experts_do_not() -> None:
    grams = grams_of_last_block(make_model("mixtral"), windows())
    experts = {name.partition("experts.")[2]: gram for name, gram in grams.items() if "experts" in name}
    assert experts["0.gate_proj"] is experts["0.up_proj"]
    assert len({id(gram) for gram in experts.values()}) == 8


@each_architecture
def test_all_tokens_for_experts_with_few(architecture: str) -> None:
    model = make_model(architecture)
    tokens = windows(num=3, length=8)
    own = grams_of_last_block(model, tokens)
    sites = last_block(model).sites
    short = starved(sites, own)
    assert short
    assert {site.name for site in short} == {
        site.name for site in sites if site.expert and own[site.name].num_tokens < site.shape[1]
    }
    grams = grams_of_last_block(model, tokens, collect_all_tokens)
    everything = _all_tokens(model, tokens)
    for site in sites:
        if site.expert is not None:
            rows = everything
            if site.expert.part == "down_proj":
                rows = [
                    intermediate(architecture, experts_module(model), site.expert.index, x.double()) for x in rows
                ]
            assert is_sum_of(grams[site.name], rows), site.name


def _all_tokens(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """Every token of the last block once, as some expert reads it."""
    unique: dict[tuple[float, ...], Tensor] = {}
    for rows in calls_of_experts(model, tokens):
        unique.update({tuple(row.tolist()): row for row in rows})
    return list(unique.values())


def test_a_mixture_that_computes_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("mixtral")
    module = experts_module(model)
    plain = module.act_fn
    monkeypatch.setattr(type(module), "forward", _with_swapped_gate)
    with pytest.raises(ModelError, match=r"^model\.layers\.1\.mlp\.experts does not compute as .*--exclude 'model\."):
        grams_of_last_block(model, windows())
    assert module.act_fn is plain


def _with_swapped_gate(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    output = torch.zeros_like(hidden_states)
    for token, x in enumerate(hidden_states):
        for expert, weight in zip(top_k_index[token].tolist(), top_k_weights[token]):
            up, gate = (self.gate_up_proj[expert] @ x).chunk(2)
            output[token] += weight * (self.down_proj[expert] @ (self.act_fn(gate) * up))
    return output


def test_experts_are_collected_one_after_the_other_where_their_grams_do_not_fit() -> None:
    sites = last_block(make_model("deepseek_v3")).sites
    one_expert = 4 * (32**2 + 16**2)
    assert gram_groups(sites) == [sites]
    assert gram_groups(sites, 4 * one_expert) == [sites]
    groups = gram_groups(sites, 2 * one_expert)
    experts = [site for site in sites if site.expert]
    assert groups == [experts[:6], experts[6:], [site for site in sites if not site.expert]]
    assert [len(group) for group in gram_groups(sites, 0)] == [3, 3, 3, 3, 8]
    assert gram_groups([]) == []


# --- pruning


def prune(model: PreTrainedModel, pattern: Pattern, tokens: Tensor | None = None, **options: Any) -> rarefy.Report:
    tokens = windows() if tokens is None else tokens
    return rarefy.prune(model, tokens, pattern=pattern, **({"method": rarefy.Wanda(), "batch_size": BATCH} | options))


@every_size
@each_architecture
@pytest.mark.parametrize("pattern", [Unstructured(0.6), NM(2, 4)], ids=["layer", "2:4"])
def test_what_is_pruned_is_what_is_loaded_again(architecture: str, pattern: Pattern, tmp_path: Path) -> None:
    model = make_model(architecture)
    for parameter in model.parameters():  # but no buffers, which from_pretrained leaves in float32
        parameter.data = parameter.data.to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    out = RunFolder(tmp_path / "out")
    report = prune(model, pattern, method=rarefy.SparseGPT())
    with out.writing():
        out.write_layers(report.layers)
        out.write_model(lambda path: save_folder(model, path))
        out.write_run({"method": "m", "pattern": "p"})
    sites = {site.name: site for block in find_blocks(model) for site in block.sites}
    assert [layer.name for layer in report.layers] == list(sites)
    for layer in report.layers:
        mask = sites[layer.name].read() != 0
        pattern.check(mask)
        assert layer.kept == pattern.count(tuple(layer.shape)) == int(mask.sum())
        assert ("routed_tokens" in layer.details) == (sites[layer.name].expert is not None)
        assert not layer.failed
    pruned = {site.parameter_name for site in sites.values()}
    routers = [name for name in before if "router" in name or ".gate." in name or "_gate." in name]
    assert routers
    assert not pruned & set(routers)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - pruned)
    again = transformers.AutoModelForCausalLM.from_pretrained(out.model, dtype="auto")
    assert all(torch.equal(value, after[name]) for name, value in again.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(again(windows()).logits, model(windows()).logits)
    inspection = inspect_folder(out.path)
    assert inspection.problems == []
    assert [layer.zeros for layer in inspection.layers] == [layer.pruned for layer in report.layers]


@every_size
@pytest.mark.parametrize(
    ("architecture", "tensor"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.2.up_proj.weight"),
        ("gpt_oss", "model.layers.1.mlp.experts.gate_up_proj"),
    ],
)
def test_a_broken_promise_of_an_expert_is_found_in_the_files(architecture: str, tensor: str, tmp_path: Path) -> None:
    model = make_model(architecture)
    out = RunFolder(tmp_path / "out")
    report = prune(model, NM(2, 4))
    with out.writing():
        out.write_layers(report.layers)
        out.write_model(lambda path: save_folder(model, path))
        out.write_run({"method": "m", "pattern": "p"})
    file = out.model / "model.safetensors"
    tensors = load_file(file)
    matrix = tensors[tensor][2].T[1::2] if architecture == "gpt_oss" else tensors[tensor]
    matrix[5, 8:12] = 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    problems = inspect_folder(out.path).problems
    assert len(problems) == 2  # too few zeros, and a group that is too full
    assert all(problem.startswith("model.layers.1.mlp.experts.2.up_proj: ") for problem in problems)
    del tensors[tensor]
    save_file(tensors, file, metadata={"format": "pt"})
    assert any("experts.2.up_proj: it " in problem for problem in inspect_folder(out.path).problems)


def test_starved_experts_are_pruned_named_and_solved_with_all_tokens() -> None:
    model = make_model("deepseek_v3")
    # The router never chooses the last two experts, and so always the others.
    model.model.layers[1].mlp.gate.e_score_correction_bias[:] = torch.tensor([9.0, 9.0, -9.0, -9.0])
    dense, pattern = copy.deepcopy(model), Unstructured(0.5)
    with pytest.warns(UserWarning, match=r"^6 weights of experts .*: model\.layers\.1\.mlp\.experts\.2\.gate_proj, "):
        report = prune(model, pattern, include=["*.experts.*"])
    records = {layer.name: layer for layer in report.layers}
    grams = grams_of_last_block(dense, windows(), collect_all_tokens)
    for site in last_block(dense).sites:
        if site.expert is None:
            continue
        layer = records[site.name]
        few = site.expert.index >= 2
        assert layer.details["routed_tokens"] == (0 if few else NUM * LENGTH)
        assert layer.details.get("starved", "") == (f"solved with {NUM * LENGTH} tokens, all of the block's" * few)
        assert layer.sparsity == 0.5
        expected = rarefy.solve(site.read(), grams[site.name], pattern, rarefy.Wanda())
        assert layer.relative_error == pytest.approx(expected.relative_error, rel=1e-5)


def test_taking_turns_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pruned = []
    for gram_bytes in (None, 0):
        model = make_model("mixtral")
        steps: list[tuple[int, int]] = []
        with monkeypatch.context() as patch:
            for module in ("pruning.loop", "pruning.block"):
                patch.setattr(f"rarefy.{module}.gram_groups", partial(gram_groups, gram_bytes=gram_bytes))
            report = prune(model, NM(2, 4), on_progress=lambda *step, steps=steps: steps.append(step[:2]))
        assert steps == [(done, steps[-1][0]) for done in range(1, len(steps) + 1)]
        pruned.append((model.state_dict(), sorted(report.layers, key=lambda layer: layer.name)))
    assert all(torch.equal(value, pruned[1][0][name]) for name, value in pruned[0][0].items())
    for once, other in zip(pruned[0][1], pruned[1][1]):
        assert (once.name, once.relative_error) == (other.name, other.relative_error)


# --- experts in a list


class _Expert(nn.Module):
    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (nn.Linear(*weight.shape[::-1], bias=False) for weight in (gate, down, up))
        for linear, weight in ((self.w1, gate), (self.w2, down), (self.w3, up)):
            linear.weight = nn.Parameter(weight.clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class _Mixture(nn.Module):
    """Mixtral's experts as modules in a list, each called with its tokens, behind a router that is a linear."""

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4, bias=False)
        self.gate.weight = fused.gate.weight
        slices = (matrices("mixtral", fused.experts, expert) for expert in range(4))
        self.experts = nn.ModuleList(_Expert(s["gate_proj"], s["up_proj"], s["down_proj"]) for s in slices)

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(0, 1)
        weights, chosen = self.gate(tokens).float().softmax(-1).topk(2)
        weights /= weights.sum(-1, keepdim=True)
        output = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            rows, k = torch.where(chosen == index)
            if len(rows):
                output.index_add_(0, rows, expert(tokens[rows]) * weights[rows, k, None])
        return output.view_as(hidden)


_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def listed(model: PreTrainedModel) -> PreTrainedModel:
    for layer in model.model.layers:
        layer.mlp = _Mixture(layer.mlp)
    return model


def fused_name(name: str) -> str:
    path, _, part = name.rpartition(".")
    return f"{path}.{_PARTS.get(part, part)}"


@pytest.mark.parametrize("length", [48, 3])
def test_a_list_of_experts_gets_the_grams_of_the_fused_ones(length: int) -> None:
    tokens = windows(length=length)
    fused = grams_of_last_block(make_model("mixtral"), tokens)
    model = listed(make_model("mixtral"))
    assert not any(".gate" in site.name for site in last_block(model).sites)
    grams = grams_of_last_block(model, tokens)
    assert {fused_name(name) for name in grams} == fused.keys()
    for name, gram in grams.items():
        assert gram.num_tokens == fused[fused_name(name)].num_tokens
        torch.testing.assert_close(gram.H, fused[fused_name(name)].H, rtol=1e-4, atol=1e-5)
        if name.endswith(".w1"):
            assert grams[name.replace(".w1", ".w3")] is gram


def test_an_expert_of_a_list_that_is_first_called_in_a_later_batch() -> None:
    model = listed(make_model("mixtral"))
    tokens = windows(num=8, length=1)
    reference = grams_of_last_block(make_model("mixtral"), tokens)
    grams = grams_of_last_block(model, tokens)
    counts = {name: gram.num_tokens for name, gram in grams.items() if name.endswith(".w1")}
    assert 0 < min(counts.values()) < BATCH * 2  # so in some batch it was not called
    for name, gram in grams.items():
        torch.testing.assert_close(gram.H, reference[fused_name(name)].H, rtol=1e-4, atol=1e-5)


def test_starved_experts_of_a_list_get_all_tokens_as_often_as_they_are_routed() -> None:
    tokens = windows(num=3, length=8)
    reference = grams_of_last_block(make_model("mixtral"), tokens, collect_all_tokens)
    grams = grams_of_last_block(listed(make_model("mixtral")), tokens, collect_all_tokens)
    assert len(grams) == 12
    for name, gram in grams.items():
        assert gram.num_tokens == 2 * 3 * 8
        torch.testing.assert_close(gram.H, 2 * reference[fused_name(name)].H, rtol=1e-4, atol=1e-5)


def test_experts_that_take_more_than_tokens_cannot_be_given_others() -> None:
    model = listed(make_model("mixtral"))
    for layer in model.model.layers:
        for expert in layer.mlp.experts:
            plain = expert.forward
            expert.forward = lambda x, scale=1.0, plain=plain: scale * plain(x)
        mixture = layer.mlp
        mixture.experts.__class__ = _Scaling
    with pytest.raises(ModelError, match=r"^model\.layers\.1\.mlp\.experts has experts with too few tokens, and "):
        grams_of_last_block(model, windows(num=3, length=8), collect_all_tokens)


class _Scaling(nn.ModuleList):
    """Calls its experts with an argument more."""

    def __iter__(self) -> Any:
        return iter([lambda x, expert=expert: expert(x, 1.0) for expert in super().__iter__()])


@every_size
def test_a_list_of_experts_is_pruned_like_the_fused_ones() -> None:
    fused, model = make_model("mixtral"), listed(make_model("mixtral"))
    expected = {layer.name: layer for layer in prune(fused, NM(2, 4)).layers}
    for layer in prune(model, NM(2, 4)).layers:
        other = expected[fused_name(layer.name)]
        assert layer.details == other.details
        assert layer.relative_error == pytest.approx(other.relative_error, rel=1e-4)


def test_experts_of_a_list_that_are_called_with_no_tokens_share_their_inputs_all_the_same() -> None:
    model = listed(make_model("mixtral"))

    def call_all(mixture: nn.Module, args: tuple[Tensor]) -> None:
        for expert in mixture.experts:
            expert(args[0].new_empty(0, args[0].shape[-1]))

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(call_all)
    grams = grams_of_last_block(model, windows())
    plain = grams_of_last_block(listed(make_model("mixtral")), windows())
    for name, gram in grams.items():
        assert gram.num_tokens == plain[name].num_tokens
        if name.endswith(".w1"):
            assert grams[name.replace(".w1", ".w3")] is gram
