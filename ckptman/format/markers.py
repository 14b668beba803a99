"""Markers: what stands in the typed values for an object that only torch can make, or that is stored as a tensor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A torch tensor, stored under this name."""

    name: str


@dataclass(frozen=True, slots=True)
class ArrayRef:
    """A NumPy array, stored as the tensor of this name."""

    name: str


@dataclass(frozen=True, slots=True)
class TorchDtype:
    """A torch dtype, such as ``float32``."""

    name: str


@dataclass(frozen=True, slots=True)
class TorchDevice:
    """A torch device, such as ``cuda:0``."""

    name: str


@dataclass(frozen=True, slots=True)
class TorchSize:
    """A ``torch.Size``."""

    sizes: tuple[int, ...]


Marker = TensorRef | ArrayRef | TorchDtype | TorchDevice | TorchSize
