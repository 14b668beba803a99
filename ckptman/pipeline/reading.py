"""Filling the live tensors with a checkpoint's bytes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ckptman.format.manifest import Chunk, Manifest, Tensor, box_of
from ckptman.repository.reading import CheckedReader, parts_of
from ckptman.state.tensors import as_bytes, is_row_major, overwrite
from ckptman.storage.base import Storage


def fill(storage: Storage, manifest: Manifest, targets: Mapping[str, torch.Tensor]) -> None:
    """
    Read every tensor of *targets* into its target, in place; every byte is checked.

    Bytes go straight into a target that is row-major host memory; anything else takes a host copy of one chunk.
    A block is checked after it lies in the target: if this raises, some targets hold new or damaged data.

    Raises:
        IntegrityError: The checkpoint is damaged.
        StorageError: The medium failed.
    """
    reader = CheckedReader(storage, manifest)
    placing = _Placing(targets)
    for file, parts in zip(manifest.files, parts_of(manifest, targets), strict=True):
        if parts:
            reader.header(file)
            for part in reader.chunks(file, parts, placing.memory):
                placing.place(part.tensor, part.chunk)


class _Placing:
    """Remembers the host copies of chunks that could not be read straight into their target."""

    def __init__(self, targets: Mapping[str, torch.Tensor]) -> None:
        self._targets = targets
        self._copies: dict[int, torch.Tensor] = {}

    def memory(self, tensor: Tensor, chunk: Chunk) -> memoryview:
        box = self._box(tensor, chunk)
        if box.device.type == "cpu" and is_row_major(box):
            return as_bytes(box)
        copy = self._copies[id(chunk)] = torch.empty(box.shape, dtype=box.dtype)
        return as_bytes(copy)

    def place(self, tensor: Tensor, chunk: Chunk) -> None:
        copy = self._copies.pop(id(chunk), None)
        if copy is not None:
            overwrite(self._box(tensor, chunk), copy)

    def _box(self, tensor: Tensor, chunk: Chunk) -> torch.Tensor:
        target = self._targets[tensor.name]
        if chunk.offset is None and chunk.shape is None:
            return target
        offset, shape = box_of(chunk, tensor)
        return target[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
