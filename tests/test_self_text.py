"""Text that a model writes: against a loop without a cache, and what is kept of it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from models_for_tests import ARCHITECTURES, VOCABULARY, build, make_model
from rarefy.calibration import generation, self_text
from rarefy.calibration.documents import CalibrationWarning
from rarefy.calibration.generation import (
    ALLOCATED_CACHE,
    NO_STATE,
    OWN_STATE,
    OWN_STATE_ONE_BY_ONE,
    Way,
    way_of_writing,
)
from rarefy.calibration.self_text import draw_tokens, write_text
from rarefy.errors import CalibrationError, InputError, NumericalError
from small_architectures import ALL, small_config
from test_architectures import NOT_BUILT

BOS = 1


def write(model: PreTrainedModel, num: int = 3, length: int = 12, seed: int = 0, **options: object) -> Tensor:
    return write_text(model, num, length, seed, **{"use_cache": False, **options})  # type: ignore[arg-type]


# --- Drawing a token ----------------------------------------------------------------------------------------


def inverted_slowly(logits: Tensor, draws: Tensor) -> Tensor:
    """The first token whose cumulated probability, in float64, reaches the draw."""
    cumulated = logits.double().softmax(-1).cumsum(-1)
    return (cumulated < draws.double()[:, None] * cumulated[:, -1:]).sum(1)


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 1000, 50_257])
def test_a_draw_inverts_the_cumulated_distribution(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, vocabulary, generator=generator)
    draws = torch.rand(64, generator=generator)
    drawn, expected = draw_tokens(logits, draws), inverted_slowly(logits, draws)
    # float32 may put a draw on the other side of a boundary, but only of a boundary that is very near.
    cumulated = torch.nn.functional.pad(logits.double().softmax(-1).cumsum(-1), (1, 0))
    lower, upper = cumulated.gather(1, drawn[:, None])[:, 0], cumulated.gather(1, drawn[:, None] + 1)[:, 0]
    assert ((draws > lower - 1e-6) & (draws < upper + 1e-6)).all()
    assert (drawn == expected).float().mean() > 0.95


def test_tokens_are_drawn_as_often_as_they_are_probable() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.25, 0.125, 0.125, 0.0])
    draws = (torch.arange(8000) + 0.5) / 8000
    counts = draw_tokens(probabilities.log().expand(8000, -1), draws).bincount(minlength=6)
    assert counts.tolist() == [4000, 0, 2000, 1000, 1000, 0]


@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-24, 1.0])  # 1 by rounding
@pytest.mark.parametrize("only", [0, 1, 255, 256, 700, 999])
def test_an_impossible_token_is_never_drawn(draw: float, only: int) -> None:
    logits = torch.full((1, 1000), -torch.inf)
    logits[0, only] = 2.0
    assert draw_tokens(logits, torch.tensor([draw])).item() == only


@pytest.mark.parametrize("vocabulary", [300, 512])
def test_rounding_leads_to_no_token_outside_of_the_vocabulary(vocabulary: int) -> None:
    logits = torch.randn(500, vocabulary, generator=torch.Generator().manual_seed(0))
    assert (draw_tokens(logits, torch.full((500,), 1 - 2**-24)) < vocabulary).all()
    logits[:, 250:] = -torch.inf
    assert (draw_tokens(logits, torch.full((500,), 1 - 2**-24)) < 250).all()


def test_half_precision_logits_are_drawn_from_in_float32() -> None:
    logits, draws = torch.randn(16, 300).bfloat16(), torch.rand(16)
    assert torch.equal(draw_tokens(logits, draws), draw_tokens(logits.float(), draws))


# --- Writing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_text_is_what_a_loop_without_a_cache_writes(architecture: str) -> None:
    # Longer than the sliding window of 16 that some of the models have.
    model, num, length = make_model(architecture), 4, 24
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(4)  # so that what was written before matters
    draws = torch.rand(num, length, generator=torch.Generator().manual_seed(7))
    texts = torch.full((num, 1), BOS)
    for position in range(1, length):
        logits = model(input_ids=texts, use_cache=False).logits[:, -1]
        texts = torch.cat([texts, draw_tokens(logits, draws[:, position])[:, None]], dim=1)
    assert torch.equal(write(model, num, length, seed=7, bos_id=BOS), texts)
    assert len(texts.unique()) > 20


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cached_logits_agree_with_a_full_pass(architecture: str) -> None:
    model = make_model(architecture)
    assert way_of_writing(model) is ALLOCATED_CACHE
    texts = write(model, num=2, length=24)
    full = model(input_ids=texts, use_cache=False).logits[:, :-1]
    torch.testing.assert_close(logits_on(model, ALLOCATED_CACHE, texts), full, rtol=1e-4, atol=1e-5)


def logits_on(model: PreTrainedModel, way: Way, texts: Tensor) -> Tensor:
    seen: list[Tensor] = []

    def choose(position: int, logits: Tensor) -> Tensor:
        seen.append(logits)
        return texts[:, position]

    way.write(model, texts[:, 0], texts.shape[1], choose)
    return torch.stack(seen, dim=1)


def test_the_same_seed_gives_the_same_bits() -> None:
    model = make_model("llama")
    texts = write(model)
    assert texts.shape == (3, 12)
    assert texts.dtype == torch.int64
    assert (texts[:, 0] == BOS).all()
    assert torch.equal(write(model), texts)
    assert torch.equal(write(model, batch_size=2), texts)
    assert torch.equal(write(model, progress=lambda _, __: torch.rand(5)), texts)
    assert not torch.equal(write(model, seed=1), texts)
    assert len({tuple(text) for text in texts.tolist()}) == 3
    texts[0, 0] += 1  # an ordinary tensor, and the caller's own


def test_the_seed_of_others_is_neither_used_nor_changed() -> None:
    model = make_model("llama")
    torch.manual_seed(1)
    first, following = write(model), torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), following)
    assert torch.equal(write(model), first)


def test_writing_goes_on_after_the_end_of_text() -> None:
    model = make_model("llama")
    model.config.eos_token_id = list(range(VOCABULARY))  # every token ends the text
    assert (write(model, 2, 40)[:, 1:] != 0).any(0).sum() > 30


def test_a_model_without_a_start_token_starts_anywhere() -> None:
    model = make_model("llama")
    model.config.bos_token_id = None
    texts = write(model, num=32)
    assert len(texts[:, 0].unique()) > 16
    assert (texts[:, 0] < VOCABULARY).all()
    assert torch.equal(write(model, num=32), texts)
    model.config.bos_token_id = VOCABULARY  # as some configurations have it that were cut down
    assert torch.equal(write(model, num=32), texts)
    assert (write(model, num=32, bos_id=9)[:, 0] == 9).all()


def test_a_window_of_several_texts() -> None:
    model = make_model("llama")
    texts = write(model, num=6, length=5)
    assert torch.equal(write(model, num=2, length=15, text_length=5), texts.view(2, 15))
    # Texts of one length that just fill the window: 14 tokens in 3 texts of 5, the last cut by one.
    assert torch.equal(write(model, num=2, length=14, text_length=6), texts.view(2, 15)[:, :14])
    assert torch.equal(write(model, text_length=12), write(model))
    assert torch.equal(write(model, text_length=None), write(model))


def test_long_windows_are_several_texts_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_text, "_write", lambda model, num, length, *_: torch.zeros(num, length).long() + length)
    model = make_model("llama")
    assert torch.equal(write(model, num=2, length=1024), torch.full((2, 1024), 256))
    assert torch.equal(write(model, num=2, length=300), torch.full((2, 300), 150))
    assert torch.equal(write(model, num=2, length=1024, text_length=None), torch.full((2, 1024), 1024))


def test_progress_counts_tokens_up_to_the_last() -> None:
    seen: list[tuple[int, int]] = []
    write(make_model("llama"), num=3, length=4, batch_size=2, progress=lambda *step: seen.append(step))
    assert seen == [(4, 12), (6, 12), (8, 12), (10, 12), (11, 12), (12, 12)]


def test_texts_are_spread_evenly_over_the_batches() -> None:
    model, sizes = make_model("llama"), []
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: sizes.append(len(logits)))
    write(model, num=9, length=2, batch_size=8)
    assert sizes[-2:] == [5, 4]


def test_the_default_batch_fits_its_keys_and_values_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    assert self_text._fitting_batch(model, 8, ALLOCATED_CACHE) == 128
    per_text = 2 * 2 * 2 * 8 * 1000 * 4  # layers, keys and values, heads, width, positions, bytes
    monkeypatch.setattr(self_text, "_CACHE_BYTES", 5 * per_text + 1)
    assert self_text._fitting_batch(model, 1000, OWN_STATE) == 5
    assert self_text._fitting_batch(model, 10_000, ALLOCATED_CACHE) == 1
    monkeypatch.setattr(self_text, "_CACHE_BYTES", 1)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert self_text._fitting_batch(model, 100, ALLOCATED_CACHE) == weights // 4 // (per_text // 10)


def test_nan_is_no_text() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[5, 5] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        write(model)


def test_no_window_is_an_error() -> None:
    with pytest.raises(InputError, match="number of windows is 0"):
        write(make_model("llama"), num=0)
    with pytest.raises(InputError, match="window length is 0"):
        write(make_model("llama"), length=0)


# --- Models that keep something else than keys and values ----------------------------------------------------

#: What cannot be called with token ids alone, or not as it is built small.
NOT_RUN = ("blt", "gemma4_unified_assistant")

#: What each of these keeps of the tokens before.
KEPT = {
    "bamba": OWN_STATE,  # both; without their positions it would count every token as the first
    "falcon_mamba": OWN_STATE,  # states
    "jamba": ALLOCATED_CACHE,  # both
    "mamba": OWN_STATE,
    "minimax": OWN_STATE,  # a cache of its own
    "openai-gpt": OWN_STATE,  # nothing, but it takes a cache and does not use it
    "qwen3_next": ALLOCATED_CACHE,  # both
    "recurrent_gemma": ALLOCATED_CACHE,  # both
    "rwkv": OWN_STATE_ONE_BY_ONE,  # states, which transformers mixes up in a batch
    "xlstm": OWN_STATE,
}


#: What shows every kind of state in a small model, and what does not depend on ties (scores of an index that are
#: all equal) or on a fault of transformers (Moshi's window, which it keeps to with a cache only).
GIVEN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "moshi": {"sliding_window": 128},
    "gemma4_text": {"head_dim": 8},  # and 16 in some layers
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},  # its widths are rounded up to multiples of 64
}


def model_with_states(model_type: str) -> PreTrainedModel:
    """A small model with larger logits, so that what was written before matters."""
    kind = CONFIG_MAPPING[model_type]
    given = dict(GIVEN.get(model_type, {}))
    if "index_topk" in inspect.signature(kind.__init__).parameters:
        given["index_topk"] = 64
    model = build(small_config(kind, **given))
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(4)
    return model


# A draw may be on the other side of a boundary that is as near as rounding of float32 moves it.
BOUNDARY = 1e-4


def assert_drawn_from_whole_passes(model: PreTrainedModel, texts: Tensor, seed: int) -> None:
    """Every token but the first is the one that its draw takes from the distribution after all tokens before it."""
    draws = torch.rand(texts.shape, generator=torch.Generator().manual_seed(seed))[:, 1:]
    with torch.no_grad():
        logits = model(input_ids=texts, use_cache=False).logits[:, :-1]
    cumulated = torch.nn.functional.pad(logits.double().softmax(-1).cumsum(-1), (1, 0))
    lower, upper = (cumulated.gather(2, texts[:, 1:, None] + end)[..., 0] for end in (0, 1))
    assert ((draws > lower - BOUNDARY) & (draws < upper + BOUNDARY)).all()


@pytest.mark.parametrize("model_type", KEPT)
def test_models_with_states_write_what_they_write_without(model_type: str) -> None:
    model = model_with_states(model_type)
    assert way_of_writing(model) is KEPT[model_type]
    before, settings = state(model), model.generation_config
    texts = write(model, 4, 20, seed=7, bos_id=BOS)
    assert_drawn_from_whole_passes(model, texts, seed=7)
    one_by_one = write(model, 4, 20, seed=7, bos_id=BOS, batch_size=1)
    assert_drawn_from_whole_passes(model, one_by_one, seed=7)
    assert len(texts.unique()) > 15
    assert state(model) == before
    assert model.generation_config is settings


def test_a_state_that_is_left_in_the_model_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with_states("recurrent_gemma")
    monkeypatch.setattr(type(model), "_is_stateful", False)  # so that it does not begin anew
    with pytest.warns(CalibrationWarning, match="keeps nothing"):
        assert way_of_writing(model) is NO_STATE


def test_a_model_that_keeps_nothing_is_given_the_whole_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_with_states("llama")
    expected = write(model, 4, 20, seed=7, bos_id=BOS)
    real = model.forward

    def forward(input_ids: Tensor, use_cache: bool = False, past_key_values: object = None, **_: object) -> object:
        return real(input_ids=input_ids, use_cache=False)  # as if the cache were empty

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr(model, "generate", None)
    with pytest.warns(CalibrationWarning, match="keeps nothing of what it has written"):
        assert torch.equal(write(model, 4, 20, seed=7, bos_id=BOS), expected)
    assert self_text._fitting_batch(model, 100, NO_STATE) == 128
    monkeypatch.setattr(self_text, "_CACHE_BYTES", 10 * 4 * 100 * (8 * 32 + VOCABULARY))
    assert self_text._fitting_batch(model, 100, NO_STATE) == 10


def test_a_model_that_cannot_be_called_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")

    def forward(**_: object) -> None:
        raise RuntimeError("no forward.\nsecond line")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(CalibrationError, match=r"^The model cannot write .* \(RuntimeError: no forward\); .*--calib"):
        write(model)


def test_no_memory_is_not_taken_for_a_cache_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")

    def generate(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(generation, "_allocated_cache", generate)
    with pytest.raises(torch.OutOfMemoryError):
        write(model)


def test_settings_that_differ_between_layers_are_no_number() -> None:
    model = model_with_states("gemma4_text")
    assert self_text._whole_number(model.config, "head_dim") is None
    assert self_text._fitting_batch(model, 8, ALLOCATED_CACHE) == 128
    assert write(model).shape == (3, 12)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ALL)
def test_every_decoder_writes_what_it_writes_without_a_cache(model_type: str) -> None:
    if model_type in NOT_BUILT or model_type in NOT_RUN:
        pytest.skip("it cannot be built small, or not be run on token ids alone")
    model = model_with_states(model_type)
    ids = torch.arange(40).view(2, 20) * 3 + 3
    with torch.no_grad():
        whole, part = (model(input_ids=one, use_cache=False).logits[:, :10] for one in (ids, ids[:, :10]))
    if not torch.allclose(whole, part, rtol=0, atol=1e-3 * float(whole.abs().max())):
        pytest.skip("its attention looks ahead")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)
        texts = write(model, 4, 20, seed=7, bos_id=BOS)
    assert_drawn_from_whole_passes(model, texts, seed=7)


# --- The model is left as it was ----------------------------------------------------------------------------


def state(model: PreTrainedModel) -> list[tuple[str, torch.dtype, int]]:
    return [(name, tensor.dtype, tensor.data_ptr()) for name, tensor in model.state_dict().items()]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sixteen_bits_are_computed_with_in_float32_on_the_cpu(architecture: str) -> None:
    model = make_model(architecture).bfloat16()
    before, kinds = state(model), []
    hook = model.get_output_embeddings().register_forward_hook(lambda _, __, logits: kinds.append(logits.dtype))
    texts = write(model)
    hook.remove()
    assert set(kinds) == {torch.float32}
    assert state(model) == before
    assert torch.equal(write(model.float()), texts)


def test_a_large_model_keeps_its_sixteen_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_text, "_FLOAT32_PARAMETERS", 1000)
    model, kinds = make_model("llama").bfloat16(), []
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: kinds.append(logits.dtype))
    write(model)
    assert set(kinds) == {torch.bfloat16}


def test_an_interruption_leaves_the_model_as_it_was() -> None:
    def interrupt(done: int, _: int) -> None:
        if done > 6:
            raise KeyboardInterrupt

    model = make_model("gpt2").bfloat16().train()
    before = state(model)
    with pytest.raises(KeyboardInterrupt):
        write(model, progress=interrupt)
    assert state(model) == before
    assert model.training


def test_dropout_is_off() -> None:
    model = make_model("gpt2")
    assert torch.equal(write(model.train()), write(model.eval()))


# --- What is kept -------------------------------------------------------------------------------------------


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How often text has really been written."""
    count, real = [], self_text._write

    def counting(*arguments: object) -> Tensor:
        count.append(1)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(self_text, "_write", counting)
    return lambda: len(count)


def test_written_text_is_read_the_next_time(tmp_path: Path, writes: Callable[[], int]) -> None:
    folder = tmp_path / "new" / "self-text"
    first = write(make_model("llama"), use_cache=True, cache_folder=folder)
    again = write(make_model("llama"), use_cache=True, cache_folder=folder)
    assert torch.equal(first, again)
    assert writes() == 1
    assert torch.equal(first, write(make_model("llama")))
    assert len(list(folder.iterdir())) == 1
    again[0, 0] += 1  # what was read is the caller's own
    assert torch.equal(first, write(make_model("llama"), use_cache=True, cache_folder=folder))


def test_other_text_has_another_file(tmp_path: Path, writes: Callable[[], int]) -> None:
    options = {"use_cache": True, "cache_folder": tmp_path}
    pruned, scaled = make_model("llama"), make_model("llama")
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter[torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.5] = 0
    scaled.config.rms_norm_eps = 0.5
    write(make_model("llama"), **options)
    write(make_model("llama", seed=1), **options)
    write(make_model("llama").bfloat16(), **options)
    write(pruned, **options)
    write(scaled, **options)
    write(make_model("llama"), **options, seed=1)
    write(make_model("llama"), **options, num=4)
    write(make_model("llama"), **options, length=9)
    write(make_model("llama"), **options, text_length=6)
    write(make_model("llama"), **options, bos_id=5)
    assert writes() == len(list(tmp_path.iterdir())) == 10


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "longer", "folder"])
def test_a_damaged_file_is_written_anew(tmp_path: Path, writes: Callable[[], int], damage: str) -> None:
    options = {"use_cache": True, "cache_folder": tmp_path}
    first = write(make_model("llama"), **options)
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
        with pytest.warns(CalibrationWarning, match="could not be kept"):
            assert torch.equal(write(make_model("llama"), **options), first)
        return
    flipped = bytes([*data[:60], data[60] ^ 1, *data[61:]])
    file.write_bytes({"empty": b"", "cut": data[:-3], "changed": flipped, "longer": data + data}[damage])
    assert torch.equal(write(make_model("llama"), **options), first)
    assert writes() == 2
    assert file.read_bytes() == data
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(CalibrationWarning, match="could not be kept"):
        texts = write(make_model("llama"), use_cache=True, cache_folder=tmp_path / "file" / "self-text")
    assert torch.equal(texts, write(make_model("llama")))


def test_the_default_folder_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import platformdirs

    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / name)
    write(make_model("llama"), use_cache=True)
    assert len(list((tmp_path / "rarefy" / "self-text").iterdir())) == 1
