"""What packing did to a checkpoint, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


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
    """What packing did: the layers, and the bytes of all tensors before and after."""

    values: str
    layers: list[PackedLayer]
    dense_bytes: int
    nbytes: int
