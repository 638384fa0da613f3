"""What packing did to a checkpoint, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PackedLayer:
    """What became of one parameter: ``size`` weights of which ``zeros`` are zero, its bytes before and after."""

    name: str
    size: int
    zeros: int
    dense_bytes: int
    nbytes: int

    @property
    def packed(self) -> bool:
        """Whether it is packed; it stays dense where it holds few zeros."""
        return self.nbytes != self.dense_bytes


@dataclass(frozen=True)
class Summary:
    """What packing did: the layers, and the bytes of all tensors before and after.

    For codes also how many columns share a scale, and how many weights were rounded to another value.
    """

    values: str
    layers: list[PackedLayer]
    dense_bytes: int
    nbytes: int
    group: int = 0
    rounded: int = 0

    def facts(self) -> dict[str, Any]:
        """The same in a few numbers, for ``run.json`` and the model card. Bytes are of tensors, without headers."""
        packed = [layer for layer in self.layers if layer.packed]
        size = sum(layer.size for layer in packed)
        return {
            "values": self.values,
            "group": self.group,
            "rounded": self.rounded,
            "layers": len(self.layers),
            "packed_layers": len(packed),
            "size": size,
            "kept": size - sum(layer.zeros for layer in packed),
            "dense_bytes": sum(layer.dense_bytes for layer in packed),
            "packed_bytes": sum(layer.nbytes for layer in packed),
            "all_dense_bytes": self.dense_bytes,
            "all_packed_bytes": self.nbytes,
        }
