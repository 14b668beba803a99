"""
The plan of a save: which bytes of which tensor lie where in which segment of which file. Made once, kept while the
names, types and shapes of the state stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ckptman.format.safetensors_layout import Layout, Placed, Wanted, header_key, lay_out
from ckptman.pipeline.arena import SLOT_NBYTES
from ckptman.state.capture import Leaf
from ckptman.state.tensors import dtype_name


@dataclass(frozen=True, slots=True)
class Run:
    """Whole tensors of one dtype, numbers *first* to *last* (exclusive) of the file, from byte *at* of the segment."""

    first: int
    last: int
    at: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes *start* to *stop* of tensor number *index*, from byte *at* of the segment on."""

    index: int
    start: int
    stop: int
    at: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive bytes of a file, no more than a slot holds: of the header first, then of tensors."""

    nbytes: int
    header: bytes
    pieces: tuple[Run | Part, ...]


class Box(NamedTuple):
    """A leaf's name, and where it lies in a tensor of which shape; None for a leaf that is the whole tensor."""

    name: str
    offset: tuple[int, ...] | None
    shape: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """
    One file: the tensors of a component that are to be written.

    ``order`` has, for each of ``layout.tensors``, the position of its leaf among the component's, and ``boxes`` what
    the leaf is.
    """

    component: str
    layout: Layout
    order: tuple[int, ...]
    boxes: tuple[Box, ...]
    segments: tuple[Segment, ...]


Signature = list[tuple[str, torch.dtype, torch.Size, tuple[int, ...] | None, tuple[int, ...] | None]]


class Planner:
    """Plans files, and keeps the last plan of each component. A plan serves only a state that agrees in full."""

    def __init__(self) -> None:
        self._plans: dict[str, tuple[Signature, PlannedFile]] = {}

    def plan(self, component: str, leaves: Sequence[Leaf]) -> PlannedFile:
        """The file for *leaves*, at least one."""
        signature = [(leaf.name, leaf.tensor.dtype, leaf.tensor.shape, leaf.offset, leaf.shape) for leaf in leaves]
        known = self._plans.get(component)
        if known is not None and known[0] == signature:
            return known[1]
        planned = _plan(component, signature)
        self._plans[component] = signature, planned
        return planned


def _plan(component: str, signature: Signature) -> PlannedFile:
    # under their names within the component, which other tools will see in the file
    names = _distinct([name.partition("/")[2] for name, *_ in signature])
    layout = lay_out(
        [
            Wanted(name=name, dtype=dtype_name(dtype), shape=tuple(shape))
            for name, (_, dtype, shape, _, _) in zip(names, signature, strict=True)
        ]
    )
    position = {name: index for index, name in enumerate(names)}
    order = tuple(position[placed.name] for placed in layout.tensors)
    boxes = [Box(name, offset, shape) for name, _, _, offset, shape in signature]
    return PlannedFile(component, layout, order, tuple(boxes[index] for index in order), tuple(_segments(layout)))


def _distinct(names: list[str]) -> list[str]:
    """*names*, changed where one comes again: a tensor of which several boxes are in one file."""
    if len(set(names)) == len(names):
        return names
    taken: set[str] = set(names)
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            names[index] = header_key(name, taken)
            taken.add(names[index])
        seen.add(name)
    return names


def _segments(layout: Layout) -> Iterator[Segment]:
    tensors = layout.tensors
    index, done = 0, 0  # the next tensor, and how many of its bytes are in a segment already
    for start in range(0, layout.nbytes, SLOT_NBYTES):
        stop = min(start + SLOT_NBYTES, layout.nbytes)
        pieces: list[Run | Part] = []
        while index < len(tensors):
            placed = tensors[index]
            at = placed.start + done - start
            room = stop - start - at
            if room < 0 or (room == 0 and placed.nbytes):
                break
            if done == 0 and placed.start + placed.nbytes <= stop:
                last = _end_of_run(tensors, index, stop)
                end = tensors[last - 1].start + tensors[last - 1].nbytes
                pieces.append(Run(index, last, at, end - placed.start))
                index = last
                continue
            take = min(placed.nbytes - done, room)
            pieces.append(Part(index, done, done + take, at))
            done += take
            if done < placed.nbytes:
                break
            index, done = index + 1, 0
        yield Segment(stop - start, layout.header[start:stop], tuple(pieces))


def _end_of_run(tensors: Sequence[Placed], first: int, stop: int) -> int:
    last = first + 1
    while (
        last < len(tensors)
        and tensors[last].dtype == tensors[first].dtype
        and tensors[last].start + tensors[last].nbytes <= stop
    ):
        last += 1
    return last
