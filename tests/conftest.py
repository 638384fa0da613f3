"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Before huggingface_hub is imported, which reads this once: no test may depend on a network.
os.environ["HF_HUB_OFFLINE"] = "1"

import transformers

from models_for_tests import make_model, save_folder

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a small model with tokenizer, by architecture; tests must not write into it."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = save_folder(make_model(architecture), tmp_path_factory.mktemp(architecture))
        return made[architecture]

    return folder
