"""The model card: README.md of the model folder, with the front matter that the hub reads.

It says what was done and what was measured, and promises a smaller or faster model only where it is packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, UndefinedError

from rarefy.errors import InputError
from rarefy.models.quiet import quiet
from rarefy.packing.card import packed_section
from rarefy.pruning.records import three_digits

#: Models that Rarefy knows by a name of its own.
_KNOWN: dict[str, dict[str, str | None]] = {
    "smollm2": {"hub_id": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
}

_SPEED = {
    True: "on NVIDIA GPUs from Ampere on: `torch.sparse.to_sparse_semi_structured` on each pruned weight, "
    "which pays off for large batches",
    False: "on GPUs: nothing that is common today; 2:4 is the pattern that they have kernels for",
}


def model_card(run: Mapping[str, Any]) -> str:
    """The card of the run that ``run`` (the content of run.json) tells of.

    Perplexities are shown where ``run["perplexity"]`` has any, each with its context length, and so are
    distances from the dense model and tasks; the hub links the base model where ``run["base_model"]["hub_id"]``
    names it. Raises InputError where ``run`` says less than a card needs.
    """
    try:
        return _card(run)
    except (KeyError, TypeError, ValueError, AttributeError, UndefinedError) as error:
        raise InputError.sentence(f"run.json says too little for a model card ({error}).") from error


def _card(run: Mapping[str, Any]) -> str:
    base = run["base_model"]
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=base.get("license"),
        base_model=base.get("hub_id"),
        tags=["rarefy", "pruning", *([] if run.get("shrink") else ["sparse"]), str(run["method"])],
    )
    name = str(base.get("hub_id") or base["name"]).rstrip("/")
    pattern = str(run["pattern"])
    shrunk = run.get("shrink")
    template = "shrunk.md.jinja" if shrunk else "card.md.jinja"
    return _ENVIRONMENT.get_template(template).render(
        {
            "divergence": [],
            "tuning": None,
            "tasks": {},
            **run,
            "front_matter": f"{front.to_yaml()}\n",
            "base": f"`{name}`",
            "title": f"{name.rpartition('/')[2]}, "
            + (f"without {pattern}" if shrunk else f"pruned ({run['method']}, {pattern})"),
            "calibration_words": _calibration_words(run["calibration"]),
            "speed": _SPEED[{"kind": "n:m", "keep": 2, "of": 4}.items() <= run["pattern_spec"].items()],
            "packed_section": packed_section(run["packed"]) if run.get("packed") else "",
        }
    )


def base_model(name: str, kind: str, path: Path) -> dict[str, str | None]:
    """Name, hub id and licence of the dense model, as far as they are known.

    ``kind`` is "hub", "folder" or "gguf"; ``path`` its folder, whose own card may name the licence.
    """
    if name in _KNOWN:
        return {"name": name, **_KNOWN[name]}
    return {"name": name, "hub_id": name if kind == "hub" else None, "license": _licence(path / "README.md")}


def _rounded(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def _licence(card: Path) -> str | None:
    """What a model's own card says of its licence; None where it says nothing that can be read."""
    try:
        with quiet():
            licence = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return licence if isinstance(licence, str) else None


def _calibration_words(calibration: Mapping[str, Any]) -> str:
    own = calibration["source"] == "self"
    where = "written by the dense model itself" if own else f"from `{calibration['source']}`"
    return f"{calibration['num_samples']:,} windows of {calibration['sequence_length']:,} tokens, {where}"


_ENVIRONMENT = Environment(
    loader=PackageLoader("rarefy.runs"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,
)
_ENVIRONMENT.filters |= {"rounded": _rounded, "digits": three_digits, "percent": _percent}
