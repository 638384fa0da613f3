"""Makes transformers know packed checkpoints as soon as it is imported, and imports nothing before.

transformers has no entry points: what is not registered when ``from_pretrained`` runs does not exist. So ``import
rarefy`` registers at once where transformers is there already, and else leaves a finder of modules that lets
transformers' module of quantizers be imported as ever, registers, and is gone.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType

_TARGET = "transformers.quantizers.auto"
_PLUGIN = "rarefy.packing.plugin"


def register() -> None:
    """Register the plugin now, or as soon as transformers' quantizers are imported. Does nothing the second time."""
    if _TARGET in sys.modules:
        importlib.import_module(_PLUGIN)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds one module, by asking those that would have been asked, and has it followed by the plugin."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own specification, whose loader imports the plugin after the module."""
        if name != _TARGET:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                # On the loader itself, so that it stays of the kind that tools expect.
                spec.loader.exec_module = partial(_load, spec.loader.exec_module)  # type: ignore[method-assign]
                return spec
        return None


def _load(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    """Execute the module as its loader does, and then the plugin, which needs it."""
    execute(module)
    importlib.import_module(_PLUGIN)
