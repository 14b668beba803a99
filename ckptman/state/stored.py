"""The checkpoint's side of a restore: what is stored of one component."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch

from ckptman.errors import FormatError
from ckptman.format.manifest import Manifest, Tensor
from ckptman.format.names import rank_name
from ckptman.format.ranks import component_of, own_name
from ckptman.format.values import ArrayRef, Marker, TensorRef, TorchDevice, TorchDtype, TorchSize, from_json
from ckptman.state.dtensor import is_sharded
from ckptman.state.layouts import ARRAY, PARTS, SUBCLASS, Note, take_subclass_apart
from ckptman.state.tensors import dtype_name, dtype_of, is_ordinary, is_plain

Document = TypeVar("Document")


class _Component(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    state: Any
    notes: dict[str, Note] = {}


class Stored:
    """
    One component of a checkpoint.

    Attributes:
        name, kind: As the manifest has them.
        rank: Whose part it is, where ranks have something of their own.
        tree: Its state; `TensorRef` and `ArrayRef` stand in the places of tensors and arrays.
        tensors: All tensors of the checkpoint, by name.
    """

    def __init__(self, manifest: Manifest, name: str, tensors: Mapping[str, Tensor], *, rank: int = 0) -> None:
        component = component_of(manifest, name, rank)
        self._manifest = manifest
        self.name = name
        self.rank = rank
        self._prefixes = (f"{name}/",) if rank == 0 else (f"{name}/", f"{rank_name(name, rank)}/")
        self.kind = component.kind
        self.tensors = tensors
        whole = _convert(from_json(bytes(component.values), self._resolve), _Component, name)
        self.tree = whole.state
        self._notes = {self._own(tensor): self._own_parts(note) for tensor, note in whole.notes.items()}

    def _resolve(self, marker: Marker) -> object:
        if self.rank and isinstance(marker, TensorRef | ArrayRef):
            return type(marker)(self._own(marker.name))
        return _resolve(marker)

    def _own(self, name: str) -> str:
        own = own_name(name, self.rank)
        return own if own in self.tensors else name

    def _own_parts(self, note: Note) -> Note:
        if not self.rank or not note.parts:
            return note
        return msgspec.structs.replace(note, parts={part: self._own(name) for part, name in note.parts.items()})

    def of_others(self) -> list[Stored]:
        """The same component as other ranks had it, where any had something of its own in it."""
        known, ranks = self._manifest.components, self._manifest.world_size
        own = [rank for rank in range(1, ranks) if rank_name(self.name, rank) in known]
        others = [rank for rank in (0, *own) if rank != self.rank] if own else []
        return [Stored(self._manifest, self.name, self.tensors, rank=rank) for rank in others]

    @property
    def is_sharded(self) -> bool:
        """Whether some tensor of it was saved in boxes."""
        return any(self.is_in_parts(TensorRef(name)) for name in self.tensors if name.startswith(self._prefixes))

    def is_in_parts(self, ref: TensorRef) -> bool:
        """Whether it was saved in boxes, by the ranks that had each."""
        stored = self.tensors.get(ref.name)
        return stored is not None and any(chunk.offset is not None for chunk in stored.chunks)

    def read(self, kind: type[Document]) -> Document:
        """The tree as the document *kind*. Raises FormatError if it is none."""
        return _convert(self.tree, kind, self.name)

    def note(self, ref: TensorRef | ArrayRef) -> Note:
        """What is noted of *ref*. Raises FormatError if it is not the name of a tensor of this component."""
        note = self._notes.get(ref.name, _PLAIN)
        if note is _PLAIN and ref.name in self.tensors and ref.name.startswith(self._prefixes):
            return note
        if note.layout != SUBCLASS and note.parts.keys() != PARTS.get(note.layout, set()):
            raise FormatError(f"{ref.name!r} has the parts {sorted(note.parts)}, which no {note.layout!r} tensor has")
        leaves = note.parts.values() if note.parts else (ref.name,)
        for leaf in leaves:
            known = leaf in self.tensors or (note.layout == SUBCLASS and leaf in self._notes)
            if not known or not leaf.startswith(self._prefixes):
                raise FormatError(f"the values of {self.name!r} refer to a tensor {leaf!r} that it does not have")
        return note

    def agrees(self, ref: TensorRef, live: torch.Tensor) -> bool:
        """Whether *live* can hold exactly what is stored as *ref*: class, layout, dtype, shape."""
        note = self.note(ref)
        if note is _PLAIN and is_ordinary(live):
            known = self.tensors[ref.name]
            return live.shape == known.shape and dtype_name(live.dtype) == known.dtype
        if is_sharded(live):
            stored = self.tensors.get(ref.name)
            return stored is not None and live.shape == stored.shape and dtype_name(live.dtype) == stored.dtype
        if note.layout == SUBCLASS:
            return not is_plain(live) and self._subclass_agrees(note, live)
        if not is_plain(live):
            return False
        if str(live.layout) != f"torch.{note.layout}":
            return False
        values = self.tensors[note.parts["values"] if note.parts else ref.name]
        shape = note.shape if note.parts else values.shape
        if tuple(live.shape) != shape or dtype_name(live.dtype) != values.dtype:
            return False
        return note.layout != "sparse_coo" or live.sparse_dim() == self.tensors[note.parts["indices"]].shape[0]

    def agree(self, names: Sequence[str], live: Sequence[torch.Tensor]) -> bool:
        """Whether each of *live*, which are simple, can hold exactly what is stored under its name, without a note."""
        if not self._notes.keys().isdisjoint(names):
            return False
        known = [self.tensors.get(name) for name in names]
        return all(
            one is not None
            and one.name.startswith(self._prefixes)
            and tensor.shape == one.shape
            and dtype_name(tensor.dtype) == one.dtype
            for one, tensor in zip(known, live, strict=True)
        )

    def _subclass_agrees(self, note: Note, live: torch.Tensor) -> bool:
        apart = take_subclass_apart(live, self.name)
        return (
            tuple(live.shape) == note.shape
            and apart.facts == note.facts
            and apart.tensors.keys() == note.parts.keys()
            and all(self.agrees(TensorRef(note.parts[part]), inner) for part, inner in apart.tensors.items())
        )

    def array_agrees(self, ref: ArrayRef, live: np.ndarray) -> bool:
        """Whether *live* can hold exactly what is stored as *ref*: dtype and shape, and is writable."""
        dtype, shape = self.array_type(ref)
        return live.flags.writeable and live.dtype == dtype and live.shape == shape

    def array_type(self, ref: ArrayRef) -> tuple[np.dtype, tuple[int, ...]]:
        """The dtype and shape of the array *ref*. Raises FormatError where it is not one."""
        note = self.note(ref)
        if note.layout == ARRAY and isinstance(dtype := note.facts.get("dtype"), np.dtype):
            return dtype, note.shape
        stored = self.tensors[ref.name]
        try:
            return np.dtype(stored.dtype), stored.shape
        except TypeError as error:
            raise FormatError(f"the array {ref.name!r} is stored as {stored.dtype}, which NumPy has not") from error

    def describe(self, ref: TensorRef) -> str:
        """What is stored as *ref*, for people; as `tensors.describe` says it of a live tensor."""
        note = self.note(ref)
        if note.layout == SUBCLASS:
            return f"{note.facts.get('class')} {list(note.shape)} with {note.facts.get('metadata')}"
        values = self.tensors[note.parts["values"] if note.parts else ref.name]
        return (
            f"{note.layout} {values.dtype} {list(note.shape)}" if note.parts else f"{values.dtype} {list(values.shape)}"
        )


_PLAIN = Note()


def _convert(tree: object, kind: type[Document], name: str) -> Document:
    try:
        return msgspec.convert(tree, kind)
    except msgspec.ValidationError as error:
        raise FormatError(f"the values of {name!r} are not as its kind demands: {error}") from error


def _resolve(marker: Marker) -> object:
    """Torch's own small objects for their markers; tensors and arrays stay markers until they are placed."""
    if isinstance(marker, TensorRef):
        return marker
    if isinstance(marker, TorchDtype):
        return dtype_of(marker.name)
    if isinstance(marker, TorchSize):
        return torch.Size(marker.sizes)
    return device_of(marker.name) if isinstance(marker, TorchDevice) else marker


def device_of(name: str) -> torch.device:
    """The device that torch calls *name*, whether it is there or not. Raises FormatError."""
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise FormatError(f"{name!r:.80} is not a device that this torch knows") from error
