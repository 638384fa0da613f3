"""Loading packed folders: with and without Rarefy, in whatever order things are imported, and damaged."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from models_for_tests import make_model, save_folder
from rarefy.errors import ModelError
from rarefy.models.blocks import find_blocks
from rarefy.models.source import resolve_model
from rarefy.packing.loading import packed_modules
from rarefy.packing.pack import pack
from rarefy.packing.unpack import unpack


@pytest.fixture(scope="session")
def packed_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives a packed folder, by architecture and values; tests must not write into it."""
    made: dict[tuple[str, str], Path] = {}

    def folder(architecture: str = "llama", values: str = "auto") -> Path:
        if (architecture, values) not in made:
            model = make_model(architecture).to(torch.bfloat16)
            for block in find_blocks(model):
                for site in block.sites:
                    site.write(torch.where(torch.rand(site.shape) < 0.6, 0.0, site.read()))
            dense = save_folder(model, tmp_path_factory.mktemp("dense"))
            out = tmp_path_factory.mktemp(architecture) / values
            pack(resolve_model(str(dense)), out, values)
            made[architecture, values] = out
        return made[architecture, values]

    return folder


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


# --- In processes of their own ----------------------------------------------------------------------------------

_FINDERS = "sum(type(finder).__module__.startswith('rarefy') for finder in sys.meta_path)"
_LOAD = """
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_importing_rarefy_first_is_enough_and_imports_nothing_heavy(packed_folder: Callable[..., Path]) -> None:
    code = (
        "import sys, rarefy\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'xxhash'} & set(sys.modules)))\n"
        f"print({_FINDERS})\n"
        "import inspect, transformers, transformers.quantizers.auto as auto\n"
        f"print({_FINDERS})\n"
        "print('def register_quantizer' in inspect.getsource(auto))\n" + _LOAD
    )
    done = run(code, packed_folder())
    assert done.stdout.splitlines() == ["[]", "1", "0", "True", "PackedLinear"], done.stderr


@pytest.mark.parametrize(
    "first", ["transformers.modeling_utils", pytest.param("transformers", marks=pytest.mark.slow)]
)
def test_importing_rarefy_later_is_enough(first: str, packed_folder: Callable[..., Path]) -> None:
    done = run(f"import sys, transformers, {first}, rarefy" + _LOAD, packed_folder())
    assert done.stdout == "PackedLinear\n", done.stderr


@pytest.mark.parametrize("values", ["auto", pytest.param("int8", marks=pytest.mark.slow)])
def test_without_rarefy_it_is_an_error(values: str, packed_folder: Callable[..., Path]) -> None:
    """Transformers only warns of a method that it does not know; the lengths of the values stop it."""
    done = run("import sys, transformers" + _LOAD, packed_folder("llama", values))
    assert done.returncode != 0
    assert "PackedLinear" not in done.stdout
    assert "RuntimeError" in done.stderr
    assert "mismatch" in done.stderr.lower()


# --- Damaged files ----------------------------------------------------------------------------------------------

Change = Callable[[dict[str, torch.Tensor]], object]
UP = "model.layers.0.mlp.up_proj.weight"


def _set(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return apply


def _flip(mask: torch.Tensor) -> torch.Tensor:
    mask = mask.clone()
    mask[5, 2] ^= 4
    return mask


def _drop(name: str) -> Change:
    return lambda tensors: tensors.__delitem__(name)


CHANGES: dict[str, tuple[Change, str]] = {
    "values too short": (_set(UP, lambda t: t[:-3]), "its mask claims"),
    "values too long": (_set(UP, lambda t: torch.cat([t, t[:1]])), "its mask claims"),
    "values of another kind": (_set(UP, lambda t: t.long()), "its values are int64"),
    "values as a matrix": (_set(UP, lambda t: t[:32][None]), "its values are bfloat16"),
    "codes without scales": (_set(UP, lambda t: t.to(torch.int8)), "its values are codes, but it has no scales"),
    "another value": (_set(UP, lambda t: torch.cat([2 * t[:1], t[1:]])), "its bytes have changed"),
    "values in another order": (_set(UP, lambda t: t.flip(0)), "its bytes have changed"),
    "a bit more in the mask": (_set(f"{UP}_mask", _flip), "its mask claims"),
    "a mask of ones": (_set(f"{UP}_mask", lambda t: torch.full_like(t, 255)), "its mask claims"),
    "a mask without rows": (_set(f"{UP}_mask", lambda t: t[:0]), "its mask is uint8"),
    "a mask too wide": (_set(f"{UP}_mask", lambda t: t.repeat(1, 2)), "its mask is uint8"),
    "a mask of signed bytes": (_set(f"{UP}_mask", lambda t: t.view(torch.int8)), "its mask is int8"),
    "no mask": (_drop(f"{UP}_mask"), f"there is no {UP}_mask"),
    "no values": (_drop(UP), f"lacks 1 weights of its model, {UP} for instance"),
    "no checksum": (_drop(f"{UP}_check"), f"there is no {UP}_check"),
    "neither mask nor checksum": (
        lambda tensors: [tensors.pop(f"{UP}{end}") for end in ("_mask", "_check")],
        f"there is no {UP}_mask",
    ),
    "nothing of a layer": (
        lambda tensors: [tensors.pop(f"{UP}{end}") for end in ("", "_mask", "_check")],
        f"lacks 1 weights of its model, {UP} for instance",
    ),
    "no norm": (_drop("model.norm.weight"), "lacks 1 weights of its model, model.norm.weight"),
    "a mask of nothing": (
        lambda tensors: tensors.__setitem__("model.norm.other_mask", torch.zeros(1)),
        "",  # a tensor that the model has no place for, which transformers reports and leaves out
    ),
    "a mask on the embeddings": (
        lambda tensors: tensors.__setitem__("model.embed_tokens.weight_mask", torch.zeros(1, dtype=torch.uint8)),
        "no weight of a linear",
    ),
}


def change_tensors(folder: Path, change: Change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", [name for name, (_, message) in CHANGES.items() if message])
def test_damage_is_one_sentence(name: str, packed_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(packed_folder(), tmp_path / "packed")
    change, message = CHANGES[name]
    change_tensors(folder, change)
    for act in (load, lambda path: unpack(path, tmp_path / "unpacked")):
        with pytest.raises(ModelError) as caught:
            act(folder)
        assert message in str(caught.value)
        assert str(caught.value).count("\n") == 0
        assert not (tmp_path / "unpacked").exists()


def test_a_truncated_file_is_one_sentence(packed_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(packed_folder(), tmp_path / "packed")
    file = folder / "model.safetensors"
    for keep in (0.9, 0.3, 0.001, 0):
        content = file.read_bytes()
        file.write_bytes(content[: int(keep * len(content))])
        for act in (load, lambda path: unpack(path, tmp_path / "unpacked")):
            with pytest.raises(ModelError, match=r"model.safetensors is damaged or cut off\.$"):
                act(folder)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("format", "bitmap-2", "packed in the format 'bitmap-2', but this release reads 'bitmap-1'"),
        ("format", None, "this release reads 'bitmap-1'"),
        ("group_size", 100, "scales for every 100 columns"),
        ("group_size", 1 << 20, "scales for every 1048576 columns"),
        ("group_size", "64", "scales for every '64' columns"),
        ("group_size", 0, "its scales are float16"),
    ],
)
def test_settings_that_no_packed_folder_has(
    setting: str, value: object, message: str, packed_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(packed_folder("llama", "int8"), tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"][setting] = value
    (folder / "config.json").write_text(json.dumps(config))
    for act in (load, lambda path: unpack(path, tmp_path / "unpacked")):
        with pytest.raises(ModelError, match=message):
            act(folder)


def test_a_dense_checkpoint_is_not_packed_while_it_is_loaded(model_folder: Callable[[str], Path]) -> None:
    from rarefy.packing.plugin import PackedConfig

    with pytest.raises(ValueError, match="does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(model_folder("llama"), quantization_config=PackedConfig("bitmap-1"))


# --- Damage by chance ---------------------------------------------------------------------------------------------


def _damaged(folder: Path, original: bytes, rand: random.Random) -> str:
    """Damages the file of weights in one way, and says in which.

    What is left alone are the bytes of dense tensors, such as embeddings: as in any checkpoint, nothing guards them.
    """
    file = folder / "model.safetensors"
    length = int.from_bytes(original[:8], "little")
    content = bytearray(original)
    kind = rand.choice(["cut", "header", "length", "bit", "tensors", "dtype"])
    if kind == "cut":
        del content[rand.randrange(len(content)) :]
    elif kind == "header":
        for _ in range(rand.randint(1, 3)):
            content[8 + rand.randrange(length)] = rand.randrange(256)
    elif kind == "length":
        content[rand.randrange(8)] = rand.randrange(256)
    else:
        file.write_bytes(original)
        tensors = load_file(file)
        names = sorted(name for name in tensors if name + "_mask" in tensors)
        name = rand.choice(names)
        if kind == "bit":
            part = rand.choice([part for part in _parts(name) if part in tensors])
            data = tensors[part].view(-1).view(torch.uint8)
            data[rand.randrange(len(data))] ^= 1 << rand.randrange(8)
        elif kind == "dtype":
            part = rand.choice([part for part in _parts(name) if part in tensors])
            dtypes = [torch.uint8, torch.int8, torch.int32, torch.float32, torch.bfloat16, torch.float16]
            dtypes = [dtype for dtype in dtypes if dtype != tensors[part].dtype]
            tensors[part] = tensors[part].to(rand.choice(dtypes))
        else:
            part = rand.choice([part for part in _parts(name) if part in tensors])
            change = rand.choice(["drop", "shorten", "lengthen", "swap"])
            tensor = tensors.pop(part)
            if change == "shorten":
                tensors[part] = tensor[: rand.randrange(len(tensor))].clone()
            elif change == "lengthen":
                tensors[part] = torch.cat([tensor, tensor[: rand.randint(1, len(tensor))]])
            elif change == "swap":
                other = rand.choice([other for other in tensors if tensors[other].shape != tensor.shape])
                tensors[part], tensors[other] = tensors[other].clone(), tensor
        save_file(tensors, file, metadata={"format": "pt"})
        return kind
    file.write_bytes(bytes(content))
    return kind


def _parts(name: str) -> list[str]:
    return [name + ending for ending in ("", "_mask", "_scale", "_check")]


def _fuzz(folder: Path, count: int, seed: int) -> dict[str, int]:
    """Load ``count`` damaged files: each must be refused, unless its tensors are what they were."""
    rand = random.Random(seed)
    original = (folder / "model.safetensors").read_bytes()
    expected = load(folder).state_dict()
    refused: dict[str, int] = {}
    for _ in range(count):
        kind = _damaged(folder, original, rand)
        try:
            state = load(folder).state_dict()
        except Exception:  # noqa: BLE001 (whatever transformers or the file's own library raises)
            refused[kind] = refused.get(kind, 0) + 1
            continue
        assert state.keys() == expected.keys(), kind
        for name, tensor in state.items():
            assert tensor.dtype == expected[name].dtype, (kind, name)
            assert torch.equal(tensor, expected[name]), (kind, name)
    return refused


@pytest.mark.parametrize("values", ["auto", "int4"])
def test_damage_by_chance_is_refused(values: str, packed_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(packed_folder("llama", values), tmp_path / "packed")
    refused = _fuzz(folder, 40, seed=0)
    assert sum(refused.values()) > 30


@pytest.mark.slow
@pytest.mark.parametrize("values", ["auto", "int8", "int4"])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_thousand_damaged_files(
    architecture: str, values: str, packed_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Over 1,000 in all: the process lives, and nothing that differs is loaded."""
    folder = shutil.copytree(packed_folder(architecture, values), tmp_path / "packed")
    refused = _fuzz(folder, 170, seed=1)
    assert set(refused) == {"cut", "header", "length", "bit", "tensors", "dtype"}


# --- Compiled -------------------------------------------------------------------------------------------------------


def test_compilers_see_one_operator(packed_folder: Callable[..., Path]) -> None:
    model = load(packed_folder())
    _, module = packed_modules(model)[0]
    x = torch.randn(2, 3, module.in_features, dtype=torch.bfloat16)
    arguments = (x, *(getattr(module, f"weight{end}") for end in ("", "_mask", "_offsets", "_scale")))
    rest = (None, module.in_features, 0)
    torch.library.opcheck(torch.ops.rarefy.packed_linear.default, (*arguments, *rest))
    exported = torch.export.export(module, (x,))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets == ["rarefy.packed_linear.default"]
    assert torch.equal(exported.module()(x), module(x))


@pytest.mark.slow
def test_torch_compile_gives_the_same_bits(packed_folder: Callable[..., Path]) -> None:
    model = load(packed_folder())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    tokens = torch.arange(3, 10)[None]
    with torch.no_grad():
        assert torch.equal(compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)


def test_gradients_pass_through_to_inputs_and_biases(packed_folder: Callable[..., Path]) -> None:
    model = load(packed_folder("gpt2"))
    _, module = packed_modules(model)[0]
    dense = module.original(torch.bfloat16)
    for rows in (2, 12):
        given = [torch.randn(rows, module.in_features, dtype=torch.bfloat16, requires_grad=True) for _ in range(1)]
        ours, theirs = given[0], given[0].detach().clone().requires_grad_()
        biases = []
        for each, x in ((module, ours), (dense, theirs)):
            each.bias.grad = None
            each.bias.requires_grad_()
            each(x).float().square().sum().backward()
            biases.append(each.bias.grad.clone())
        assert torch.allclose(ours.grad.float(), theirs.grad.float(), rtol=0.05, atol=0.01)
        assert torch.allclose(biases[0].float(), biases[1].float(), rtol=0.05, atol=0.05)


def test_headers_stay_readable_by_the_formats_own_library(packed_folder: Callable[..., Path]) -> None:
    with safe_open(packed_folder() / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert f"{UP}_mask" in file.keys()  # noqa: SIM118 (it is no dict)
