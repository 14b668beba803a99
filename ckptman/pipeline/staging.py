"""
Staging: the state is copied to where training cannot change it, laid out as the files that will be written.

    fits into the budget       every segment is copied to a slot of its own; then ``save`` returns
    does not fit               slots go round: each is written and given back before the next segment is copied to it
    the caller waits anyway    the same with a few slots: they are what is written from, and all the memory it takes
    overlap                    as the first, but what only an optimizer's step can change is copied by a thread

A copy goes straight to the place that the bytes will have in the file: whole small tensors in bulk, large ones as they
are cut by the segments. Copies from devices are queued there: see `ckptman.pipeline.devices`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ckptman.pipeline.arena import Arena, Slot
from ckptman.pipeline.borrowing import Key, key_of
from ckptman.pipeline.devices import SideStreams
from ckptman.pipeline.planning import Part, PlannedFile, Planner, Run, Segment
from ckptman.pipeline.stream import Stream
from ckptman.state.capture import Captured, Leaf
from ckptman.state.tensors import has_copy_kernel, is_row_major

# views of one buffer in the shapes of others, made in C++ at once; DistributedDataParallel lives on it
_unflatten: Callable[[torch.Tensor, Sequence[torch.Tensor]], Sequence[torch.Tensor]] = (
    torch._utils._unflatten_dense_tensors
)

_TINY_NBYTES = 4096
"""Vectors that are smaller on average are copied by ``cat``, which takes half of the time of as many calls."""

_ALONE_NBYTES = 1 << 20
"""
Tensors up to this size are copied by the calling thread alone, without a view of each. Torch would share the copy among
its threads from 32,768 elements on, and wait for all of them: where others want the cores too, that wait takes longer
than the copy.
"""

Chosen = Callable[[torch.Tensor], bool]
"""Which tensors are to be copied now."""


def _everything(_: torch.Tensor) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class _Source:
    """One file and the live tensors that it will hold, in the order of their bytes."""

    file: PlannedFile
    tensors: Sequence[torch.Tensor]


class Staging:
    """
    One save on its way from the live tensors into slots.

    Holds the live tensors until it is staged. To be made by the thread that trains, and used by one at a time. A slot
    that comes from it is to be waited for (`Slot.wait`) before it is read.
    """

    def __init__(
        self,
        arena: Arena,
        planner: Planner,
        captured: Mapping[str, Captured],
        *,
        without: Collection[Key] = (),
        slots: int | None = None,
    ) -> None:
        """Plan to stage all of *captured* but the leaves *without*; with at most so many *slots*."""
        self._arena = arena
        self._sources = [
            _source(planner, name, leaves)
            for name, part in captured.items()
            if (leaves := [leaf for leaf in part.leaves if key_of(leaf) not in without] if without else part.leaves)
        ]
        self.files = [source.file for source in self._sources]
        self.count = sum(len(file.segments) for file in self.files)
        self._wanted = self.count if slots is None else min(slots, self.count)
        self._others = arena.in_use()
        self._side = SideStreams(tensor for source in self._sources for tensor in source.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of the files that will be written."""
        return sum(file.layout.nbytes for file in self.files)

    def reserve(self) -> bool:
        """Take memory for every segment; whether it is all there. If not, somebody must write while this stages."""
        return self._arena.reserve(self.count)

    def run(self, stream: Stream) -> None:
        """
        Copy every segment into a slot and send it, waiting for slots; stop early where nobody receives any more.

        Once this has returned, the live tensors may change.
        """
        try:
            for slot in self.copied():
                if not stream.put(slot):
                    return
            self._side.wait()
        except BaseException as error:
            stream.fail(error)
            raise
        stream.end()

    def run_partly(self, chosen: Chosen) -> list[Slot]:
        """
        Take a slot for every segment, and copy those tensors that are *chosen*. `finish` copies the others.

        Once this has returned, those that are chosen may change.
        """
        slots: list[Slot] = []
        for source, segment in self._segments():
            slots.append(self._arena.take(wanted=self._others + self._wanted))
            self._fill(slots[-1], segment, source.tensors, chosen)
        if any(not tensor.is_cpu and chosen(tensor) for source in self._sources for tensor in source.tensors):
            self._side.wait()
        return slots

    def finish(self, slots: Sequence[Slot], chosen: Chosen) -> None:
        """Copy what is *chosen* into the *slots* that ``run_partly`` gave; once this has returned, it may change."""
        for slot, (source, segment) in zip(slots, self._segments(), strict=True):
            self._fill(slot, segment, source.tensors, chosen)
        self._side.wait()

    def copied(self) -> Iterator[Slot]:
        """Every segment, copied into a slot when it is asked for; each is to be given back before the next may come."""
        for source, segment in self._segments():
            slot = self._arena.take(wanted=self._others + self._wanted)
            self._fill(slot, segment, source.tensors, _everything)
            yield slot

    def _fill(self, slot: Slot, segment: Segment, tensors: Sequence[torch.Tensor], chosen: Chosen) -> None:
        slot.view[: len(segment.header)] = segment.header
        with self._side.copying_to(slot):
            _copy(slot.tensor, segment, tensors, chosen, queued=self._side.are_used)

    def _segments(self) -> Iterator[tuple[_Source, Segment]]:
        for source in self._sources:
            for segment in source.file.segments:
                yield source, segment


def _source(planner: Planner, component: str, leaves: Sequence[Leaf]) -> _Source:
    file = planner.plan(component, leaves)
    return _Source(file, [leaves[index].tensor for index in file.order])


def _copy(
    slot: torch.Tensor, segment: Segment, tensors: Sequence[torch.Tensor], chosen: Chosen, *, queued: bool
) -> None:
    for piece in segment.pieces:
        if isinstance(piece, Part):
            if chosen(tensors[piece.index]):
                _copy_part(slot, piece, tensors[piece.index], queued)
        elif chosen is _everything:
            _copy_run(slot[piece.at : piece.at + piece.nbytes], tensors[piece.first : piece.last], queued)
        else:
            _copy_chosen(slot, piece, tensors, chosen, queued)


def _copy_run(region: torch.Tensor, tensors: Sequence[torch.Tensor], queued: bool) -> None:
    """Copy whole *tensors* of one dtype, one behind the other, into *region*."""
    if not has_copy_kernel(tensors[0].dtype):  # then they are contiguous: see plain_view
        tensors = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
    if all(one.is_cpu and one.is_contiguous() for one in tensors):
        _copy_host_memory(region, tensors)
        return
    places = _unflatten(region.view(tensors[0].dtype), tensors)
    torch._foreach_copy_(list(places), list(tensors), non_blocking=queued)


def _copy_host_memory(region: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """As `_copy_run`, of contiguous host memory."""
    itemsize = tensors[0].element_size()
    if len(region) < _TINY_NBYTES * len(tensors) and all(one.dim() == 1 for one in tensors):
        torch.cat(list(tensors), out=region.view(tensors[0].dtype))
        return
    base, at = region.data_ptr(), 0
    for tensor in tensors:
        nbytes = tensor.numel() * itemsize
        if nbytes <= _ALONE_NBYTES:
            ctypes.memmove(base + at, tensor.data_ptr(), nbytes)
        else:
            region[at : at + nbytes].copy_(tensor.view(-1).view(torch.uint8))
        at += nbytes


def _copy_chosen(slot: torch.Tensor, run: Run, tensors: Sequence[torch.Tensor], chosen: Chosen, queued: bool) -> None:
    at = run.at
    for tensor in tensors[run.first : run.last]:
        nbytes = tensor.nbytes
        if chosen(tensor):
            _copy_run(slot[at : at + nbytes], [tensor], queued)
        at += nbytes


def _copy_part(slot: torch.Tensor, part: Part, tensor: torch.Tensor, queued: bool) -> None:
    region = slot[part.at : part.at + part.stop - part.start]
    region.copy_(_bytes(tensor, part.start, part.stop), non_blocking=queued)


def _bytes(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Bytes *start* to *stop* of *tensor* in row-major order, on its device; a copy only where it is not so itself."""
    if is_row_major(tensor):
        return tensor.view(-1).view(torch.uint8)[start:stop]
    row_nbytes = tensor[0].numel() * tensor.element_size()
    first, last = start // row_nbytes, -(-stop // row_nbytes)
    rows = tensor[first:last].contiguous().view(-1).view(torch.uint8)
    return rows[start - first * row_nbytes : stop - first * row_nbytes]
