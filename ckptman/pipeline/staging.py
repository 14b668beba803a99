"""
Staging: the state is copied to where training cannot change it, laid out as the files that will be written.

A component's tensors become one safetensors file. The arena is one long-lived host buffer that holds the data of
all files at their final offsets; it grows to the largest state it has seen and is reused by every later save.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ckptman.format.safetensors_layout import Layout, Placed, Wanted, lay_out
from ckptman.state.capture import Captured, Leaf
from ckptman.state.tensors import as_bytes, dtype_name, is_row_major, overwrite

PAGE_NBYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """One file to be written: whose tensors, where each lies, and how to get the bytes of one."""

    component: str
    layout: Layout
    bytes_of: Callable[[Placed], memoryview]


class Arena:
    """
    The staging memory. Used by one save at a time.

    Peak memory is that of the largest state; none is taken before the first ``stage``.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)

    def stage(self, captured: Mapping[str, Captured]) -> list[Staged]:
        """Copy every leaf; then training may change the state. What is returned holds until the next call."""
        layouts = {name: _layout(component.leaves) for name, component in captured.items() if component.leaves}
        self._reserve(sum(_pages(layout.nbytes) for layout in layouts.values()))
        staged, offset = [], 0
        for name, layout in layouts.items():
            image = self._memory[offset : offset + layout.nbytes]
            offset += _pages(layout.nbytes)
            tensors = _by_inner_name(captured[name].leaves)
            for placed in layout.tensors:
                tensor = tensors[placed.name]
                region = image[placed.start : placed.start + placed.nbytes]
                overwrite(region.view(tensor.dtype).view(placed.shape), tensor)
            staged.append(Staged(component=name, layout=layout, bytes_of=_slices(as_bytes(image))))
        return staged

    def _reserve(self, nbytes: int) -> None:
        if self._memory.numel() < nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # free the old buffer before taking the new one
            self._memory = torch.empty(nbytes, dtype=torch.uint8)


def unstaged(captured: Mapping[str, Captured]) -> list[Staged]:
    """
    The same files straight from the live tensors' memory, for a save that training waits for.

    Only a tensor that is not on the host, or not row-major, is copied, one at a time.
    """
    return [
        Staged(component=name, layout=_layout(component.leaves), bytes_of=_live(component.leaves))
        for name, component in captured.items()
        if component.leaves
    ]


def _layout(leaves: Sequence[Leaf]) -> Layout:
    return lay_out(
        [
            Wanted(name=name, dtype=dtype_name(tensor.dtype), shape=tuple(tensor.shape))
            for name, tensor in _by_inner_name(leaves).items()
        ]
    )


def _by_inner_name(leaves: Sequence[Leaf]) -> dict[str, torch.Tensor]:
    """Under their names within the component, which other tools will see in the file."""
    return {leaf.name.partition("/")[2]: leaf.tensor for leaf in leaves}


def _pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_NBYTES) * PAGE_NBYTES


def _slices(image: memoryview) -> Callable[[Placed], memoryview]:
    return lambda placed: image[placed.start : placed.start + placed.nbytes]


def _live(leaves: Sequence[Leaf]) -> Callable[[Placed], memoryview]:
    tensors = _by_inner_name(leaves)

    def bytes_of(placed: Placed) -> memoryview:
        tensor = tensors[placed.name]
        if tensor.device.type != "cpu" or not is_row_major(tensor):
            copy = torch.empty(placed.shape, dtype=tensor.dtype)
            overwrite(copy, tensor)
            tensor = copy
        return as_bytes(tensor)

    return bytes_of
