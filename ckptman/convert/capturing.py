"""From foreign components to what a save takes: leaves by name, typed values, and bytes that come when they are due."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from msgspec import structs

from ckptman.convert.foreign import Document, Foreign, ForeignTensor, Part
from ckptman.convert.stored import Progress
from ckptman.errors import FormatError
from ckptman.format.names import rank_name
from ckptman.format.ranks import own_name
from ckptman.format.values import Marker, TensorRef, from_json
from ckptman.pipeline.arena import SLOT_NBYTES, Arena, Slot
from ckptman.pipeline.planning import PlannedFile, Planner, Run, Segment
from ckptman.state.capture import Captured, Leaf
from ckptman.state.collecting import Collector
from ckptman.state.kinds import KINDS
from ckptman.state.tensors import as_bytes, dtype_of

SLOTS = 2
"""Staging memory of an import: one slot is written while nothing else is read, and one lies between."""


@dataclass(frozen=True, slots=True)
class Taken:
    """Everything of a foreign checkpoint, captured; ``data`` has the bytes of the leaves by their names."""

    captured: dict[str, Captured]
    data: dict[str, ForeignTensor]


class _Collector(Collector):
    """Takes the tensors of foreign files out of a component, too. Their leaves are on the meta device: types only."""

    def __init__(self, component: str) -> None:
        super().__init__(component, {})
        self.data: dict[str, ForeignTensor] = {}
        self._ties: dict[object, TensorRef] = {}

    def foreign(self, name: str, tensor: ForeignTensor) -> TensorRef:
        """Take *tensor* under *name*; one that is tied to another becomes an alias of it."""
        full = self._unique(name)
        known = self._ties.get(tensor.tie) if tensor.tie is not None else None
        if known is not None:
            self.aliases[full] = known.name
            return known
        ref = TensorRef(full)
        if tensor.tie is not None:
            self._ties[tensor.tie] = ref
        self.data[full] = tensor
        self.leaves.append(Leaf(name=full, tensor=_typed(tensor)))
        return ref

    def _extract(self, value: object, path: str) -> Marker | None:
        if isinstance(value, ForeignTensor):
            return self.foreign(self._name_of(path), value)
        return super()._extract(value, path)


def take(foreign: Foreign) -> Taken:
    """
    Capture every component of *foreign*. No byte of a tensor is read.

    Raises:
        UnsupportedState: A value is of a type that the format does not have; the path says where it is.
    """
    captured: dict[str, Captured] = {}
    data: dict[str, ForeignTensor] = {}
    for name, part in foreign.parts.items():
        if isinstance(part.tree, Document):
            captured[name] = _documented(name, part.kind, part.tree)
            data.update(part.tree.tensors)
            continue
        collector = _Collector(name)
        values = collector.document(_tree(part, collector))
        captured[name] = Captured(
            kind=part.kind, leaves=tuple(collector.leaves), values=values, aliases=dict(collector.aliases)
        )
        data.update(collector.data)
    for rank, part in enumerate(foreign.other_streams, 1):
        _take_own(rank, part, captured, data)
    return Taken(captured, data)


def _take_own(rank: int, part: Part, captured: dict[str, Captured], data: dict[str, ForeignTensor]) -> None:
    """Take the random streams of *rank*: values that refer to tensors by plain names, tensors under its own."""
    collector = _Collector("rng")
    values = collector.document(part.tree)
    leaves = tuple(structs.replace(leaf, name=own_name(leaf.name, rank)) for leaf in collector.leaves)
    captured[rank_name("rng", rank)] = Captured(kind=part.kind, leaves=leaves, values=values, aliases={})
    data.update({own_name(name, rank): tensor for name, tensor in collector.data.items()})


def _documented(name: str, kind: str, document: Document) -> Captured:
    """A component that is encoded already. What it says is checked as that of a manifest is."""
    if kind not in {known.name for known in KINDS}:
        raise FormatError(f"{name}: {kind!r:.40} is no kind of component that this ckptman knows: install a newer one")
    from_json(document.values)
    strangers = [alias for alias, target in document.aliases.items() if target not in document.tensors]
    if strangers:
        raise FormatError(f"{name}: {strangers[0]!r:.80} is another name of a tensor that is not there")
    leaves = tuple(Leaf(name=full, tensor=_typed(one)) for full, one in document.tensors.items())
    return Captured(kind=kind, leaves=leaves, values=document.values, aliases=dict(document.aliases))


def _typed(tensor: ForeignTensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=dtype_of(tensor.dtype), device="meta")


def _tree(part: Part, collector: _Collector) -> object:
    """The tree of *part*; a module's tensors are taken here, since their names are not to be made of paths."""
    if part.kind == "tensor":
        return collector.foreign("value", cast("ForeignTensor", part.tree))
    if part.kind != "module":
        return part.tree
    entries = cast("dict[str, dict[str, Any]]", part.tree)["entries"]
    return {
        "entries": {
            key: collector.foreign(key, value) if isinstance(value, ForeignTensor) else value
            for key, value in entries.items()
        }
    }


def plan(captured: Mapping[str, Captured]) -> list[tuple[PlannedFile, Sequence[Leaf]]]:
    """The files of the components that have tensors, with the leaves in the order of their bytes."""
    planner = Planner()
    planned: list[tuple[PlannedFile, Sequence[Leaf]]] = []
    for name, part in captured.items():
        if part.leaves:
            file = planner.plan(name, part.leaves)
            planned.append((file, [part.leaves[index] for index in file.order]))
    return planned


def slots(
    planned: Sequence[tuple[PlannedFile, Sequence[Leaf]]],
    data: Mapping[str, ForeignTensor],
    arena: Arena,
    progress: Progress | None,
) -> Iterator[Slot]:
    """Every segment of every file, filled when it is asked for; *progress* is told what was."""
    total = sum(segment.nbytes for file, _ in planned for segment in file.segments)
    done = 0
    for file, leaves in planned:
        for segment in file.segments:
            slot = arena.take(wanted=SLOTS)
            _fill(slot.view[: segment.nbytes], segment, file, leaves, data)
            done += segment.nbytes
            if progress is not None:
                progress(done, total)  # before it is written: nobody comes back here for what follows the last slot
            yield slot


def _fill(
    into: memoryview, segment: Segment, file: PlannedFile, leaves: Sequence[Leaf], data: Mapping[str, ForeignTensor]
) -> None:
    into[: len(segment.header)] = segment.header
    for piece in segment.pieces:
        if not isinstance(piece, Run):
            at = piece.at
            _copy(leaves[piece.index], data, piece.start, into[at : at + piece.stop - piece.start])
            continue
        at = piece.at
        for index in range(piece.first, piece.last):
            nbytes = file.layout.tensors[index].nbytes
            if nbytes:
                _copy(leaves[index], data, 0, into[at : at + nbytes])
            at += nbytes


def _copy(leaf: Leaf, data: Mapping[str, ForeignTensor], start: int, into: memoryview) -> None:
    foreign = data.get(leaf.name)
    if foreign is not None:
        foreign.data.read_into(start, into)
    else:  # an array of the values, in memory already
        into[:] = as_bytes(leaf.tensor.contiguous())[start : start + len(into)]


def arena() -> Arena:
    """The staging memory of an import."""
    return Arena(SLOTS * SLOT_NBYTES)
