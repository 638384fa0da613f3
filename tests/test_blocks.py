"""Blocks and sites of every architecture: found, named, read and written as they are; others refused."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from torch import nn

from models_for_tests import ARCHITECTURES, make_model
from rarefy.errors import InputError, ModelError
from rarefy.models.blocks import Block, find_blocks, left_dense, select_sites

_LLAMA = [
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
]
_NAMES = {
    "llama": ("model.layers", _LLAMA),
    "opt": ("model.decoder.layers", [*(f"self_attn.{x}_proj" for x in "kvq"), "self_attn.out_proj", "fc1", "fc2"]),
    "gpt2": ("transformer.h", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]),
    "qwen3": ("model.layers", _LLAMA),
    "gemma3": ("model.layers", _LLAMA),
    "mistral": ("model.layers", _LLAMA),
    "phi3": ("model.layers", ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]),
    "gpt_neox": (
        "gpt_neox.layers",
        ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
    ),
}  # fmt: skip
_TIED = {"opt", "gpt2", "qwen3", "gemma3"}
_TOKENS = torch.arange(40).reshape(2, 20) + 3


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(_TOKENS, use_cache=False).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_blocks_and_sites_of_every_architecture(architecture: str, device: str) -> None:
    model = make_model(architecture)
    if device == "meta":
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(model.config)
    blocks = find_blocks(model)
    block_list, linears = _NAMES[architecture]
    assert [block.index for block in blocks] == [0, 1]
    assert [block.name for block in blocks] == [f"{block_list}.{index}" for index in (0, 1)]
    for block in blocks:
        assert block.module is model.get_submodule(block.name)
        assert [site.name for site in block.sites] == [f"{block.name}.{linear}" for linear in linears]
        assert all(site.module is model.get_submodule(site.name) for site in block.sites)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_head_and_embedding_are_no_sites_and_keep_their_tie(architecture: str) -> None:
    model = make_model(architecture)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    sites = [site for block in find_blocks(model) for site in block.sites]
    assert (head is embedding) == (architecture in _TIED)
    assert all(site.module.weight is not head and site.module.weight is not embedding for site in sites)
    before = embedding.clone()
    for site in sites:
        site.write(torch.zeros(site.shape))
    assert torch.equal(embedding, before)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (architecture in _TIED)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_read_is_what_the_module_multiplies_with(architecture: str) -> None:
    model = make_model(architecture)
    for site in (site for block in find_blocks(model) for site in block.sites):
        X = torch.randn(5, site.shape[1], generator=torch.Generator().manual_seed(1))
        weight = site.read()
        assert tuple(weight.shape) == site.shape
        assert weight.is_contiguous()
        bias = site.module(torch.zeros_like(X))
        torch.testing.assert_close(site.module(X), X @ weight.T + bias)
        site.write(-2 * weight)
        torch.testing.assert_close(site.module(X), -2 * X @ weight.T + bias)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_finding_reading_and_writing_back_change_no_bit(architecture: str) -> None:
    model = make_model(architecture)
    before = _logits(model)
    parameters = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for block in find_blocks(model):
        for site in block.sites:
            site.write(site.read())
    assert all(torch.equal(parameter, parameters[name]) for name, parameter in model.named_parameters())
    assert torch.equal(_logits(model), before)


def test_read_gives_a_copy_and_write_casts_in_place() -> None:
    model = make_model("gpt2").to(torch.bfloat16)
    site = find_blocks(model)[0].sites[0]
    parameter, weight = site.module.weight, site.read()
    assert weight.dtype == torch.bfloat16
    weight.zero_()
    assert parameter.count_nonzero() > 0
    new = torch.randn(site.shape, dtype=torch.float64)
    site.write(new)
    assert site.module.weight is parameter
    assert parameter.dtype == torch.bfloat16
    assert torch.equal(site.read(), new.to(torch.bfloat16))


def test_a_weight_of_another_shape_is_not_written() -> None:
    site = find_blocks(make_model("llama"))[0].sites[1]  # k_proj, 16 x 32
    before = site.read()
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.k_proj is \(16, 32\)"):
        site.write(torch.zeros(site.shape[::-1]))
    with pytest.raises(ValueError, match="k_proj"):
        site.write(torch.zeros(1, site.shape[1]))
    assert torch.equal(site.read(), before)


class _Toy(nn.Module):
    """An embedding, a list of blocks, each made by ``block``, and a head."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8)
        self.layers = nn.ModuleList(blocks)


def _names_of(blocks: list[Block]) -> list[str]:
    return [site.name for block in blocks for site in block.sites]


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))


def test_a_list_of_modules_without_a_router_is_of_ordinary_linears() -> None:
    block = nn.ModuleDict({"attention": nn.Linear(8, 8), "parts": nn.ModuleList([_mlp(), _mlp()])})
    sites = find_blocks(_Toy(block))[0].sites
    assert [site.name for site in sites] == [
        "layers.0.attention",
        *(f"layers.0.parts.{part}.{linear}" for part in (0, 1) for linear in (0, 2)),
    ]
    assert all(site.expert is None for site in sites)


_UNKNOWN = [[(4, 8, 8)], [(4, 8, 8), (4, 8, 8)], [(4, 32, 8), (4, 8, 8)]]


def _with_stacks(shapes: list[tuple[int, ...]], **beside: nn.Module) -> nn.Module:
    """A block with large linears, and a module that keeps stacks of matrices."""
    block = nn.ModuleDict({"up": nn.Linear(8, 512), "down": nn.Linear(512, 8), "mixer": nn.Module(), **beside})
    for index, shape in enumerate(shapes):
        block["mixer"].register_parameter(f"w{index}", nn.Parameter(torch.zeros(shape)))
    return block


@pytest.mark.parametrize("shapes", _UNKNOWN)
def test_experts_of_an_unknown_form_are_refused_unless_they_are_left_out(shapes: list[tuple[int, ...]]) -> None:
    model = _Toy(*(_with_stacks(shapes, router=nn.Linear(8, 4)) for _ in range(2)))
    blocks = find_blocks(model)
    assert _names_of(blocks) == ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
    message = (
        r"^layers\.0\.mixer\.w0 is a stack of 4 matrices, like experts, but Module is not built like the experts"
    )
    for include in ([], ["*.mixer", "*.up"]):
        with pytest.raises(ModelError, match=message) as error:
            select_sites(blocks, include)
        way_out = re.findall(r"--exclude '(\S+)'", str(error.value))
        assert way_out == ["layers.*.mixer"]
    assert _names_of(select_sites(blocks, exclude=way_out)) == _names_of(blocks)
    assert _names_of(select_sites(blocks, include=["*.up"])) == ["layers.0.up", "layers.1.up"]
    with pytest.raises(ModelError, match="not built like the experts"):
        select_sites(blocks, exclude=["layers.0.mixer"])


@pytest.mark.parametrize("shapes", _UNKNOWN)
def test_stacks_of_matrices_that_nothing_chooses_among_are_no_experts(shapes: list[tuple[int, ...]]) -> None:
    """As the gates of recurrent blocks, and mixers with several heads: linears beside them are ordinary ones."""
    block = _with_stacks(shapes, gate=nn.Linear(8, 1), heads=nn.Linear(8, 6))
    blocks = select_sites(find_blocks(_Toy(block)))
    assert _names_of(blocks) == [f"layers.0.{name}" for name in ("up", "down", "gate", "heads")]
    others = {name: size for name, size in blocks[0].others.items() if not name.endswith(".bias")}
    assert others == {f"layers.0.mixer.w{i}": torch.Size(shape).numel() for i, shape in enumerate(shapes)}
    share, name = left_dense(blocks)
    assert name == max(blocks[0].others, key=blocks[0].others.__getitem__)
    assert share == pytest.approx(sum(blocks[0].others.values()) / sum(p.numel() for p in block.parameters()))


_SMALL = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4,
}  # fmt: skip


def _on_meta(config: transformers.PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model


def test_matrices_for_each_head_are_no_experts_even_where_something_has_a_number_for_each_head() -> None:
    block = _with_stacks([(4, 2, 2)], beta=nn.Linear(8, 4))
    assert _names_of(select_sites(find_blocks(_Toy(block)))) == [
        f"layers.0.{name}" for name in ("up", "down", "beta")
    ]


def test_a_recurrent_block_has_no_experts() -> None:
    config = transformers.RecurrentGemmaConfig(**_SMALL, num_hidden_layers=3, lru_width=64, attention_window_size=16)
    blocks = select_sites(find_blocks(_on_meta(config)))
    recurrent = [f"temporal_block.linear_{name}" for name in ("y", "x", "out")]
    mlp = [f"mlp_block.{name}_proj" for name in ("gate", "up", "down")]
    assert [site.name.removeprefix("model.layers.0.") for site in blocks[0].sites] == recurrent + mlp
    assert not any(site.expert for block in blocks for site in block.sites)


def test_a_block_that_several_places_share_is_refused_unless_it_is_left_out() -> None:
    config = transformers.Zamba2Config(
        **_SMALL, num_hidden_layers=4, layers_block_type=["mamba", "hybrid"] * 2, mamba_d_state=8, n_mamba_heads=8,
        mamba_ngroups=1, num_mem_blocks=1, use_shared_attention_adapter=True, adapter_rank=8, chunk_size=16,
        attention_head_dim=32, attention_hidden_size=128,
    )  # fmt: skip
    blocks = find_blocks(_on_meta(config))
    with pytest.raises(
        ModelError, match=r"layers\.1\.shared_.*\.q_proj and .*layers\.3\..* share one weight, whi"
    ) as error:
        select_sites(blocks)
    way_out = re.findall(r"--exclude '(\S+)'", str(error.value))
    assert way_out == ["model.layers.*.shared_transformer.*"]
    left = select_sites(blocks, exclude=way_out)
    assert {site.name.split(".", 3)[3] for block in left for site in block.sites} == {
        "mamba.in_proj", "mamba.out_proj", "mamba_decoder.mamba.in_proj", "mamba_decoder.mamba.out_proj", "linear",
    }  # fmt: skip
    assert not any(site.expert for block in left for site in block.sites)


def test_experts_flattened_into_matrices_are_refused() -> None:
    block = nn.ModuleDict({"attention": nn.Linear(8, 8), "experts": nn.Module()})
    block["experts"].register_parameter("w1", nn.Parameter(torch.zeros(64, 8)))
    with pytest.raises(ModelError, match=r"^layers\.0 has most of its weights .*layers\.0\.experts\.w1"):
        find_blocks(_Toy(block))


def test_convolutions_are_no_experts() -> None:
    blocks = find_blocks(_Toy(nn.Sequential(nn.Linear(8, 32), nn.Conv1d(8, 8, 2))))
    assert [site.name for block in blocks for site in block.sites] == ["layers.0.0"]


def test_a_linear_with_the_weight_of_the_embedding_is_no_site() -> None:
    model = _Toy(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))
    model.layers[0][1].weight = model.embedding.weight
    assert [site.name for block in find_blocks(model) for site in block.sites] == ["layers.0.0"]


def test_linears_that_share_one_weight_are_refused_unless_all_are_left_out() -> None:
    shared = nn.Linear(8, 8)
    blocks = find_blocks(_Toy(*(nn.Sequential(shared, nn.Linear(8, 8)) for _ in range(2))))
    for exclude in ([], ["layers.0.0"]):
        with pytest.raises(
            ModelError, match=r"^layers\.\d\.0 and layers\.\d\.0 share one weight.*--exclude 'layers\.\*\.0'"
        ):
            select_sites(blocks, exclude=exclude)
    assert _names_of(select_sites(blocks, exclude=["layers.*.0"])) == ["layers.0.1", "layers.1.1"]


def test_packed_weights_are_refused() -> None:
    block = nn.Sequential(nn.Linear(8, 8))
    block[0].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"^layers\.0\.0 keeps its weight as uint8, but Rarefy prunes"):
        find_blocks(_Toy(block))


def test_models_without_one_list_of_blocks_are_refused() -> None:
    with pytest.raises(ModelError, match="_Toy has no list of blocks"):
        find_blocks(_Toy())
    two_stacks = nn.Module()
    two_stacks.encoder, two_stacks.decoder = _Toy(_mlp()), _Toy(_mlp(), _mlp())
    with pytest.raises(ModelError, match=r"67% of its decoder's linear weights in decoder\.layers"):
        find_blocks(two_stacks)


def test_blocks_of_different_classes_and_blocks_without_linears_are_found() -> None:
    blocks = find_blocks(_Toy(_mlp(), nn.Sequential(nn.Identity()), nn.ModuleDict({"linear": nn.Linear(8, 8)})))
    assert [[site.name for site in block.sites] for block in blocks] == [
        ["layers.0.0", "layers.0.2"],
        [],
        ["layers.2.linear"],
    ]


def _names(blocks: list[Block]) -> list[str]:
    return [site.name.removeprefix("model.layers.") for block in blocks for site in block.sites]


def test_globs_select_sites_by_full_name() -> None:
    blocks = find_blocks(make_model("llama"))
    everything = _names(blocks)
    assert _names(select_sites(blocks)) == everything
    assert _names(select_sites(blocks, include=["*.q_proj", "*.v_proj"])) == [
        f"{block}.self_attn.{name}_proj" for block in (0, 1) for name in "qv"
    ]
    assert _names(select_sites(blocks, exclude=["model.layers.0.*"])) == everything[7:]
    assert _names(select_sites(blocks, include=["*.mlp.*"], exclude=["*.down_proj"])) == [
        f"{block}.mlp.{name}_proj" for block in (0, 1) for name in ("gate", "up")
    ]


def test_selection_keeps_all_blocks_and_leaves_its_argument_alone() -> None:
    blocks = find_blocks(make_model("llama"))
    everything = _names(blocks)
    selected = select_sites(blocks, exclude=["model.layers.0.*"])
    assert [(block.index, block.name, len(block.sites)) for block in selected] == [
        (0, "model.layers.0", 0),
        (1, "model.layers.1", 7),
    ]
    assert _names(blocks) == everything


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("glob", ["lm_head", "q_proj", "*.Q_PROJ", "model.layers.2.*", ""])
def test_a_glob_that_matches_nothing_is_an_error(argument: str, glob: str) -> None:
    blocks = find_blocks(make_model("llama"))
    with pytest.raises(InputError, match="at least one of the 14 linears, such as ") as error:
        select_sites(blocks, **{argument: ["*.k_proj", glob]})
    assert str(error.value).startswith(f"{argument} is {glob!r}, but must be ")


def test_a_selection_of_nothing_is_an_error() -> None:
    blocks = find_blocks(make_model("llama"))
    with pytest.raises(InputError, match=r"exclude is \['\*proj'\]"):
        select_sites(blocks, include=["*.mlp.*"], exclude=["*proj"])
