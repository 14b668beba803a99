"""Markers: what stands in the typed values for an object that only torch can make, or that is stored as a tensor."""

from __future__ import annotations

import msgspec


class TensorRef(msgspec.Struct, frozen=True, gc=False):
    """A torch tensor, stored under this name."""

    name: str


class ArrayRef(msgspec.Struct, frozen=True, gc=False):
    """A NumPy array, stored as the tensor of this name."""

    name: str


class TorchDtype(msgspec.Struct, frozen=True, gc=False):
    """A torch dtype, such as ``float32``."""

    name: str


class TorchDevice(msgspec.Struct, frozen=True, gc=False):
    """A torch device, such as ``cuda:0``."""

    name: str


class TorchSize(msgspec.Struct, frozen=True, gc=False):
    """A ``torch.Size``."""

    sizes: tuple[int, ...]


class Ready(msgspec.Struct, frozen=True, gc=False):
    """A part of a tree that is as JSON says it already; whoever made it answers for that."""

    tree: object


Marker = TensorRef | ArrayRef | TorchDtype | TorchDevice | TorchSize
