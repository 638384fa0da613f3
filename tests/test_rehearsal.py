"""Linears that no pass calls are found without weights, before a run begins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from cli_for_tests import Rarefy, is_one_sentence
from models_for_tests import ARCHITECTURES, EXPERT_ARCHITECTURES, build, make_model, save_folder
from rarefy.errors import ModelError
from rarefy.models.blocks import find_blocks, select_sites
from rarefy.models.rehearsal import _calls, check_calls


def _skeleton(config: transformers.PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config).eval()
    return model


def _mamba() -> transformers.PreTrainedConfig:
    return transformers.MambaConfig(vocab_size=160, hidden_size=32, num_hidden_layers=2, state_size=4)


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *EXPERT_ARCHITECTURES])
def test_every_linear_is_called_once_without_weights(architecture: str) -> None:
    skeleton = _skeleton(make_model(architecture).config)
    blocks = find_blocks(skeleton)
    attention = skeleton.config._attn_implementation
    calls = _calls(skeleton, blocks)
    if architecture != "nemotron_h":  # whose mixer is written for kernels or for values
        assert calls is not None
        assert set(calls) == {site.name for block in blocks for site in block.sites if site.expert is None}
        assert {*calls.values()} == {1}
    check_calls(skeleton, blocks)
    assert all(not module._forward_pre_hooks for module in skeleton.modules())
    assert skeleton.config._attn_implementation == attention


def test_a_weight_that_is_used_without_its_linear_is_refused_unless_it_is_left_out() -> None:
    skeleton = _skeleton(_mamba())
    blocks = find_blocks(skeleton)
    message = (
        r"^backbone\.layers\.0\.mixer\.dt_proj cannot be pruned, because no pass .* --exclude 'backbone\.layers\.\*\."
    )
    with pytest.raises(ModelError, match=message):
        check_calls(skeleton, blocks)
    check_calls(skeleton, select_sites(blocks, exclude=["backbone.layers.*.mixer.dt_proj"]))


def test_a_linear_that_is_called_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = _skeleton(make_model("llama").config)
    mlp = type(skeleton.model.layers[0].mlp)
    plain = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: plain(self, x) + self.up_proj(x).sum())
    with pytest.raises(
        ModelError, match=r"up_proj cannot be pruned, because a pass of the model calls it several times"
    ):
        check_calls(skeleton, find_blocks(skeleton))


def test_nothing_is_said_of_a_model_that_cannot_do_without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    skeleton = _skeleton(make_model("llama").config)
    mlp = type(skeleton.model.layers[0].mlp)
    monkeypatch.setattr(mlp, "forward", lambda self, x: torch.tensor(x.tolist()))
    assert _calls(skeleton, find_blocks(skeleton)) is None
    check_calls(skeleton, find_blocks(skeleton))


def test_the_plan_of_a_run_finds_it(rarefy_: Rarefy, shelf: Path) -> None:
    save_folder(build(_mamba()), Path("mamba"))
    arguments = [
        "mamba",
        "-o",
        "out",
        "--calibration",
        shelf / "text.txt",
        "--num-samples",
        2,
        "--sequence-length",
        16,
    ]
    result = rarefy_("prune", *arguments)
    assert result.status == 2
    assert is_one_sentence(result.err)
    assert "no pass of the model calls it" in result.err
    assert not Path("out").exists()
