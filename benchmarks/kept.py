"""
A trained state that is trained once, and that every contestant of a question begins with.

Training it anew takes a process of its own longer than what is measured. The bytes are read into memory of the
contestant's own, so that all of it has been touched before any timer runs and nothing is mapped or shared.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks import system
from benchmarks.harness import Place
from benchmarks.states import State, blank, trained


def keep(place: Place) -> None:
    """What a question ``shares``: a state after real steps, as bare bytes, filled up to a page's border."""
    with _path(place).open("xb") as file:
        for tensor in trained(place.scale).tensors.values():
            file.write(_memory(tensor))
        file.write(bytes(-file.tell() % system.PAGE))


def kept(place: Place) -> State:
    """The state that `keep` has left, bit for bit, in fresh memory. Its next training step is the third."""
    state = blank(place.scale)
    with _path(place).open("rb") as file:
        for name, tensor in state.tensors.items():
            if file.readinto(_memory(tensor)) != tensor.nbytes:
                raise EOFError(f"the kept state ends within {name}")
    return state


def kept_bytes(place: Place) -> memoryview:
    """The whole file in one aligned buffer."""
    buffer = system.aligned(_path(place).stat().st_size)
    with _path(place).open("rb") as file:
        if file.readinto(buffer) != len(buffer):
            raise EOFError("the kept state ends early")
    return buffer


def _path(place: Place) -> Path:
    return place.shared / "state"


def _memory(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied."""
    memory: memoryview = tensor.detach().reshape(-1).view(torch.uint8).numpy().data
    return memory
