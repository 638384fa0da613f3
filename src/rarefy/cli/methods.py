"""``rarefy methods``: the methods with their hyperparameters."""

from __future__ import annotations

from dataclasses import fields


def methods() -> None:
    """List the methods: what each does, its hyperparameters with defaults, its paper."""
    from rarefy.methods import METHODS

    for name, method in METHODS.items():
        paper = f" ({method.paper})" if method.paper else ""
        print(f"{name}: {method.summary}{paper}; scope {method.default_scope}")
        for item in fields(method):
            if "help" in item.metadata:
                choices = f" ({', '.join(item.metadata['choices'])})" if item.metadata["choices"] else ""
                print(f"    --set {item.name}={getattr(method, item.name)}    {item.metadata['help']}{choices}")
