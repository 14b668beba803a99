"""A checkpoint of ours on its way out: its components as plain trees, its tensors whole and verified, in turn."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import msgspec
import torch

from ckptman.errors import CheckpointNotFound, UnsupportedState
from ckptman.format.manifest import Manifest, Tensor
from ckptman.format.ranks import ranks_with_own
from ckptman.format.values import ArrayRef, TensorRef
from ckptman.pipeline.reading import fill
from ckptman.repository.repository import Repository, Which, find
from ckptman.state.layouts import STRIDED
from ckptman.state.stored import Stored
from ckptman.state.tensors import as_bytes, dtype_of
from ckptman.storage.base import Storage

Progress = Callable[[int, int], object]
"""Called with how many bytes are done, and of how many."""

BATCH_NBYTES = 64 << 20
"""Tensors are read so many bytes at a time, or one at a time where one is larger."""


class StoredTensor:
    """
    A tensor of the checkpoint, as a place in a tree.

    Two that are one tensor of the checkpoint are one object. ``is_array`` says that NumPy's array was saved.
    """

    __slots__ = ("dtype", "is_array", "name", "nbytes", "shape")

    def __init__(self, tensor: Tensor, *, is_array: bool) -> None:
        self.name = tensor.name
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.nbytes = tensor.nbytes
        self.is_array = is_array


class StoredCheckpoint:
    """
    One checkpoint, opened for export.

    Attributes:
        expected_nbytes: How many bytes of tensors will be read in all, where several calls of `tensors` read them.
    """

    def __init__(
        self, storage: Storage, which: Which, only: Collection[str] | None, progress: Progress | None = None
    ) -> None:
        """
        Open the checkpoint *which* of *storage*, with the components *only* (None: all); tell *progress* what is read.

        Raises:
            CheckpointNotFound: There is no such checkpoint, or no such component in it.
            IntegrityError, FormatError, StorageError: The manifest cannot be read.
        """
        repository = Repository(storage)
        entry = find(repository.entries(), which, storage.url)
        self.storage = storage
        self.checkpoint = repository.checkpoint(entry)
        self.manifest: Manifest = repository.manifest(entry)
        lacking = sorted(set(only or ()) - set(self.manifest.shared_components))
        if lacking:
            raise CheckpointNotFound(f"step {entry.step} has no component {', '.join(lacking)}")
        self.components = tuple(name for name in self.manifest.shared_components if only is None or name in only)
        self.left_out = tuple(
            f"{name}: what ranks other than the first have of their own, for which foreign formats have no place"
            for name, ranks in ranks_with_own(self.manifest).items()
            if ranks and name in self.components
        )
        self._tensors = {tensor.name: tensor for tensor in self.manifest.tensors}
        self._made: dict[str, StoredTensor] = {}
        self._progress = progress
        self._done_nbytes = 0
        self.expected_nbytes = 0

    def kind(self, component: str) -> str:
        """The kind of *component*."""
        return self.manifest.components[component].kind

    def tree(self, component: str) -> Any:
        """
        The state of *component*; `StoredTensor` stands for tensors and arrays.

        Raises:
            UnsupportedState: A tensor of it is more than one block of memory (sparse, a subclass).
        """
        return _Tree(Stored(self.manifest, component, self._tensors), self._tensor).of(component)

    def stored(self, component: str) -> list[StoredTensor]:
        """Every tensor of *component*, each once."""
        prefix = f"{component}/"
        return [self._tensor(name, is_array=False) for name in self._tensors if name.startswith(prefix)]

    def aliases(self, component: str) -> dict[str, str]:
        """Other names of tensors of *component* → the names under which they are stored."""
        prefix = f"{component}/"
        return {alias: name for alias, name in self.manifest.aliases.items() if alias.startswith(prefix)}

    def tensors(self, wanted: Collection[StoredTensor]) -> Iterator[tuple[StoredTensor, memoryview]]:
        """
        The bytes of every one of *wanted*, in their order, each of them checked. Valid until the next is asked for.

        Raises:
            IntegrityError: The checkpoint is damaged.
            StorageError: The medium failed.
        """
        total = self.expected_nbytes or sum(one.nbytes for one in wanted)
        for batch in _batches(wanted):
            part = msgspec.structs.replace(self.manifest, tensors=tuple(self._tensors[one.name] for one in batch))
            targets = {one.name: torch.empty(one.shape, dtype=dtype_of(one.dtype)) for one in batch}
            fill(self.storage, part, targets)
            for one in batch:
                self._done_nbytes += one.nbytes
                if self._progress is not None:
                    self._progress(self._done_nbytes, total)
                yield one, as_bytes(targets[one.name])
            targets.clear()  # before the next ones are made

    def _tensor(self, name: str, *, is_array: bool) -> StoredTensor:
        if name not in self._made:
            self._made[name] = StoredTensor(self._tensors[name], is_array=is_array)
        return self._made[name]


class _Tree:
    """One walk over the tree of a component."""

    def __init__(self, stored: Stored, make: Callable[..., StoredTensor]) -> None:
        self._stored = stored
        self._make = make

    def of(self, path: str) -> Any:
        return self._value(self._stored.tree, path)

    def _value(self, value: Any, path: str) -> Any:
        if isinstance(value, TensorRef | ArrayRef):
            return self._ref(value, path)
        if isinstance(value, dict):
            made = type(value)()
            for key, item in value.items():
                made[key] = self._value(item, f"{path}.{key}")
            return made
        if type(value) in (list, tuple):
            return type(value)(self._value(item, f"{path}[{index}]") for index, item in enumerate(value))
        return value

    def _ref(self, ref: TensorRef | ArrayRef, path: str) -> StoredTensor:
        note = self._stored.note(ref)
        if note.parts or note.layout != STRIDED:
            raise UnsupportedState(
                f"{path} is stored as {note.layout}, which this format cannot hold. Leave its component out",
                path=path,
            )
        return self._make(ref.name, is_array=isinstance(ref, ArrayRef))


def _batches(wanted: Collection[StoredTensor]) -> Iterator[list[StoredTensor]]:
    batch: list[StoredTensor] = []
    nbytes = 0
    for one in wanted:
        if batch and nbytes + one.nbytes > BATCH_NBYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(one)
        nbytes += one.nbytes
    if batch:
        yield batch
