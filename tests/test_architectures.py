"""Every decoder that transformers knows: its Grams are those of its own forward passes, or the plan refuses it.

Each is built small. It is pruned with batches of several sizes, the last of them smaller. The Grams of each block are
compared with those of hooks in a forward pass of the whole model, pruned before the block and dense from it on.
``python tests/test_architectures.py`` prints the table of all of them (``make architectures``).
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import rarefy
from cli_for_tests import is_one_sentence
from rarefy.calibration.check import check_blocks
from rarefy.errors import ModelError
from rarefy.layer.pattern import Pattern, PerRow
from rarefy.layer.problem import LayerProblem
from rarefy.layer.solution import Solution
from rarefy.models.blocks import Block, find_blocks, select_sites
from rarefy.models.experts import FusedExperts
from small_architectures import ALL, VOCABULARY, make, skeleton

WINDOWS = torch.randint(3, VOCABULARY, (5, 20), generator=torch.Generator().manual_seed(0))
BATCH_SIZES = (5, 2, 1)  # 2 leaves a batch of one window
# A sum of 100 products in float32, and states that went through four blocks in other batches; of the largest entry.
GRAM = 1e-5
# Rounding may turn a score over that is as good as equal to its neighbour: of some 1,000 weights, one.
MASKS = 2e-3

_CROSS_ATTENTION = ("*.encoder_attn.*",)
#: What must be left out of some models, as the plan says, because its module is not called.
EXCLUDE: dict[str, Sequence[str]] = {
    **dict.fromkeys(
        ["bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart"],
        _CROSS_ATTENTION,
    ),
    **dict.fromkeys(["trocr", "whisper"], _CROSS_ATTENTION),
    **dict.fromkeys(["falcon_mamba", "jamba", "mamba"], ("*.dt_proj",)),
    "prophetnet": ("*.cross_attn.*",),
}
#: What the plan refuses, and a part of the reason.
REFUSED = {
    "blt": "of its decoder's linear weights in",
    "dbrx": "has most of its weights outside of linears",
    "gemma4_unified_assistant": "cannot be run on token ids alone",
    "git": "of its decoder's linear weights in",
    "hrm_text": "of its decoder's linear weights in",
    "inkling_text": "not built like the experts that Rarefy knows",
    "inkling2_text": "has most of its weights outside of linears",
    "jetmoe": "not built like the experts that Rarefy knows",
    "mllama": "runs only 3 of its 4 blocks on text",
    "phi4_multimodal": "of its decoder's linear weights in",
    "recurrent_gemma": "not built like the experts that Rarefy knows",
    "rwkv": "changes hidden states between block 1 and block 2",
    "xlm": "of its decoder's linear weights in",
    "xlnet": "not built like the experts that Rarefy knows",
    "zamba": "not built like the experts that Rarefy knows",
}
#: What AutoModelForCausalLM cannot make here, and why.
NOT_BUILT = {
    "dots3_note": "the settings of its parts must agree",
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": "its default settings contradict each other",
    "musicgen": "it is not made from the settings that it is registered with",
    "musicgen_melody": "it is not made from the settings that it is registered with",
}
#: A quick selection: one for each way in which blocks hand on what is not a tensor of hidden states.
QUICK = {
    "bamba": "a tuple",
    "openai-gpt": "a list",
    "reformer": "a dataclass with a second stream, hidden states by keyword",
    "glm_moe_dsa": "indices that later attention reuses",
    "zaya": "states of the router before, and a linear that is called twice",
    "gemma4_text": "keys and values that later blocks share, inputs per layer",
    "gemma3n_text": "windows in the second dimension",
    "deepseek_v4": "states of four dimensions",
    "mamba": "a state-space model, with a linear that is not called",
    "llama4_text": "blocks that are called in different ways",
}


class Seen(rarefy.Wanda):
    """Wanda, which keeps the Gram of every layer that it solves, in order."""

    grams: ClassVar[list[Tensor]] = []

    def solve(self, problem: LayerProblem, pattern: Pattern, start: Solution | None = None) -> Solution:
        self.grams.append(problem.H.clone())
        return super().solve(problem, pattern, start)


@contextmanager
def reading(block: Block) -> Iterator[dict[str, Tensor]]:
    """Within the scope, the sums of x x^T of all that the block's sites read, by name, in float64."""
    sums: dict[str, Tensor] = {}
    fused: dict[FusedExperts, dict[int, list[Any]]] = {}
    handles = []

    def add(name: str, X: Tensor) -> None:
        X = X.reshape(-1, X.shape[-1]).double()
        sums[name] = sums.get(name, 0) + X.T @ X  # type: ignore[operator]

    for site in block.sites:
        if site.expert and isinstance(site.expert.mixture, FusedExperts):
            fused.setdefault(site.expert.mixture, {}).setdefault(site.expert.index, []).append(site)
            continue

        def hook(_: nn.Module, args: tuple[Any, ...], name: str = site.name) -> None:
            add(name, args[0])

        handles.append(site.module.register_forward_pre_hook(hook))
    for mixture, experts in fused.items():

        def routed(
            _: nn.Module,
            args: Any,
            kwargs: Any,
            mixture: FusedExperts = mixture,
            experts: dict[int, list[Any]] = experts,
        ) -> None:
            for index, X in mixture.inputs(mixture.call(args, kwargs), experts):
                for site in experts[index]:
                    add(site.name, mixture.intermediate(index, X) if site.expert.part == "down_proj" else X)

        handles.append(mixture.module.register_forward_pre_hook(routed, with_kwargs=True))
    yield sums
    for handle in handles:
        handle.remove()


def difference(name: str, exclude: Sequence[str], batch_sizes: Sequence[int]) -> tuple[float, float]:
    """How far Grams are from those of whole forward passes, and masks of one batch size from those of another."""
    dense, masks = make(name), []
    worst = 0.0
    for batch_size in batch_sizes:
        model, whole = copy.deepcopy(dense), copy.deepcopy(dense)
        Seen.grams.clear()
        report = rarefy.prune(
            model, WINDOWS, pattern=PerRow(0.5), method=Seen(), batch_size=batch_size, exclude=exclude
        )
        grams = dict(zip([layer.name for layer in report.layers], Seen.grams, strict=True))
        pruned = [site for block in select_sites(find_blocks(model), (), exclude) for site in block.sites]
        weights = {site.name: site.read() for site in pruned}
        masks.append({site_name: weight != 0 for site_name, weight in weights.items()})
        for block in select_sites(find_blocks(whole), (), exclude):
            with reading(block) as sums, torch.no_grad():
                whole(input_ids=WINDOWS, use_cache=False)
            for site in block.sites:
                # an expert that no token was sent to has the Gram of all tokens instead
                if site.name in sums and not _starved(report, site.name):
                    error = (grams[site.name] - sums[site.name]).abs().max() / sums[site.name].abs().max()
                    worst = max(worst, float(error.nan_to_num(float("inf"))))
                site.write(weights[site.name])
    differing = [float((mask != masks[0][key]).double().mean()) for other in masks for key, mask in other.items()]
    return worst, max(differing)


def _starved(report: rarefy.Report, name: str) -> bool:
    return any("starved" in layer.details for layer in report.layers if layer.name == name)


def refusal(name: str, exclude: Sequence[str] = ()) -> str:
    """What the plan says of a model of which there is no weight; nothing where it agrees."""
    model = skeleton(name)
    try:
        check_blocks(model, select_sites(find_blocks(model), (), exclude))
    except ModelError as error:
        return str(error)
    return ""


def outcome(name: str) -> tuple[str, str]:
    """ "graded", "refused" or "not built", and what is to be said of it."""
    if name in NOT_BUILT:
        try:
            make(name)
        except Exception as error:  # noqa: BLE001 (of any kind)
            return "not built", f"{NOT_BUILT[name]} ({type(error).__name__})"
    exclude = EXCLUDE.get(name, ())
    if reason := refusal(name, exclude):
        return "refused", reason
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* weights of experts were solved with all tokens")
        grams, masks = difference(name, exclude, BATCH_SIZES)
    fine = grams <= GRAM and masks <= MASKS
    left_out = f", without {' '.join(exclude)}" if exclude else ""
    return "graded" if fine else "wrong", f"Grams differ by {grams:.1e}, masks in {masks:.2%} of weights{left_out}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ALL)
def test_a_model_is_graded_or_the_plan_refuses_it(name: str) -> None:
    result, words = outcome(name)
    expected = "refused" if name in REFUSED else "not built" if name in NOT_BUILT else "graded"
    assert result == expected, words
    if result == "refused":
        assert REFUSED[name] in words
        assert is_one_sentence(words)
    if name in EXCLUDE:
        words = refusal(name)
        assert is_one_sentence(words)
        assert words.endswith(
            "leave them out with " + " ".join(f"--exclude '{glob}'" for glob in EXCLUDE[name]) + "."
        )


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.filterwarnings("ignore:.* weights of experts were solved with all tokens")
def test_grams_are_those_of_the_whole_model_whatever_crosses_its_blocks(name: str) -> None:
    assert refusal(name, EXCLUDE.get(name, ())) == ""
    grams, _ = difference(name, EXCLUDE.get(name, ()), (2,))
    assert grams <= GRAM


def main() -> int:
    """Print a line for each architecture, and the counts."""
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    for name in sys.argv[1:] or ALL:
        try:
            result, words = outcome(name)
        except Exception as error:  # noqa: BLE001 (there must be none)
            result, words = "traceback", f"{type(error).__name__}: {error}"
        counts[result] += 1
        print(f"{name:28}{result:12}{words}", flush=True)
    print(", ".join(f"{number} {result}" for result, number in counts.items()))
    return counts["traceback"] + counts["wrong"]


if __name__ == "__main__":
    sys.exit(main())
