"""Calls into transformers and the hub's client: nothing printed, and one sentence for whatever goes wrong there."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import transformers

from rarefy.errors import ModelError


@contextmanager
def quiet() -> Iterator[None]:
    """Within the scope, transformers, the hub's client and compressed-tensors neither log, warn nor draw bars."""
    loggers = [logging.getLogger(library) for library in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = transformers.utils.logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    loguru = sys.modules.get("loguru")  # which compressed-tensors logs with
    if loguru is not None:
        loguru.logger.disable("compressed_tensors")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if loguru is not None:
            loguru.logger.enable("compressed_tensors")
        if bars:
            transformers.utils.logging.enable_progress_bar()


def cannot(what: str, name: str, error: Exception) -> ModelError:
    """One sentence for an error of another library: ``name`` cannot do ``what``, and why."""
    return ModelError.sentence(f"{name} cannot {what}: {first_line(error)}.")


def first_line(error: Exception) -> str:
    """The first line of an error's message without its full stop, or the error's kind where there is none."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".:")
