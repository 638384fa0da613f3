"""Arguments that several commands take, checked by how they are written: neither torch nor a model is needed."""

from __future__ import annotations

import re

from rarefy.errors import InputError

#: How a device is written; which of them this machine has, torch knows.
DEVICES = r"^(auto|cpu|mps|cuda(:[0-9]{1,3})?)$"
DEVICE_WORDS = "auto, cpu, cuda, cuda:N or mps"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_device(text: str) -> None:
    """Raise InputError unless ``text`` is written as a device is."""
    if not re.fullmatch(DEVICES, text):
        raise InputError("--device", text, DEVICE_WORDS)


def check_dtype(text: str) -> None:
    """Raise InputError unless ``text`` is a dtype that weights can be used in."""
    if text.removeprefix("torch.") not in DTYPES:
        raise InputError("--dtype", text, ", ".join(DTYPES[:-1]) + f" or {DTYPES[-1]}")


def check_goes_with_tasks(tasks: object, **given: object) -> None:
    """Raise InputError where one of the options ``given`` (``task_data=...``) is there, but no tasks are."""
    for name, value in given.items():
        if value is not None and not tasks:
            raise InputError.sentence(f"--{name.replace('_', '-')} goes with --tasks, which is not given.")
