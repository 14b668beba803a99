"""Filling the live tensors with a checkpoint's bytes, on several threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import compress
from typing import NamedTuple

import torch

from ckptman.format.manifest import Chunk, File, Manifest, Tensor, box_of
from ckptman.repository.reading import CheckedReader, Part, Piece, parts_of, pieces
from ckptman.state.tensors import as_bytes, is_row_major, overwrite, overwrite_part
from ckptman.storage.base import Storage


def fill(storage: Storage, manifest: Manifest, targets: Mapping[str, torch.Tensor], *, threads: int = 1) -> None:
    """
    Read every tensor of *targets* into its target, in place; every byte is checked.

    Bytes go straight into a target that is row-major host memory; anything else takes a host copy of one block, one at
    a time (of one chunk, where blocks cut elements). So at most 8 MiB are taken for each of *threads*. A block is
    checked after it lies in a straight target: if this raises, some targets hold new or damaged data. Once it has
    returned or raised nothing is read any more.

    Raises:
        IntegrityError: The checkpoint is damaged; of several faults the first one in the order of the files.
        StorageError: The medium failed.
    """
    reader = CheckedReader(storage, manifest)
    placing = _Placing(targets, manifest.block_nbytes)
    straight: list[_Work] = []
    others: list[tuple[File, Part]] = []
    for file, parts in zip(manifest.files, parts_of(manifest, targets), strict=True):
        if parts:
            reader.header(file)
            is_straight = [placing.is_straight(part) for part in parts]
            straight += [
                _Work(file, piece) for piece in pieces(list(compress(parts, is_straight)), manifest.block_nbytes)
            ]
            others += [(file, part) for part, is_one in zip(parts, is_straight, strict=True) if not is_one]
    _Readers(reader, placing, straight).run(threads)
    for file, part in others:
        placing.through_a_copy(reader, file, part)


class _Work(NamedTuple):
    file: File
    piece: Piece


class _Readers:
    """Threads that read pieces in their order, until all are read or one of them failed."""

    def __init__(self, reader: CheckedReader, placing: _Placing, work: list[_Work]) -> None:
        self._reader = reader
        self._placing = placing
        self._count = len(work)
        self._mutex = threading.Lock()  # guards the three below
        self._left: Iterator[tuple[int, _Work]] = iter(enumerate(work))
        self._is_stopped = False
        self._failures: list[tuple[int, BaseException]] = []

    def run(self, threads: int) -> None:
        """
        Read everything, on this thread and *threads* - 1 more.

        Pieces are handed out in order and none after a failure, so whatever lies before the first fault was read: the
        same error is raised however the threads were timed.
        """
        helpers = [
            threading.Thread(target=self._work, name=f"ckptman-read-{number}")
            for number in range(min(threads, self._count) - 1)
        ]
        started = []
        try:
            for helper in helpers:
                with suppress(RuntimeError):  # no memory for one more thread, or the interpreter ends: fewer will do
                    helper.start()
                    started.append(helper)
            self._work()
        finally:
            with self._mutex:
                self._is_stopped = True
            for helper in started:
                helper.join()
        if self._failures:
            raise min(self._failures, key=lambda failure: failure[0])[1]

    def _work(self) -> None:
        while (got := self._next()) is not None:
            index, work = got
            try:
                self._reader.read(work.file, work.piece, self._placing.memory)
            except Exception as error:  # noqa: BLE001 - a thread's edge: run() raises it
                with self._mutex:
                    self._failures.append((index, error))
                    self._is_stopped = True

    def _next(self) -> tuple[int, _Work] | None:
        with self._mutex:
            return None if self._is_stopped else next(self._left, None)


class _Placing:
    """Where the bytes of a chunk go."""

    def __init__(self, targets: Mapping[str, torch.Tensor], block_nbytes: int) -> None:
        self._targets = targets
        self._block_nbytes = block_nbytes

    def is_straight(self, part: Part) -> bool:
        """Whether the target's own memory can be read into."""
        box = self._box(part.tensor, part.chunk)
        return box.is_cpu and is_row_major(box)

    def memory(self, tensor: Tensor, chunk: Chunk) -> memoryview:
        """The target's own memory."""
        return as_bytes(self._box(tensor, chunk))

    def through_a_copy(self, reader: CheckedReader, file: File, part: Part) -> None:
        """Read one chunk into host memory, block by block, and copy each to where it belongs."""
        box = self._box(part.tensor, part.chunk)
        if self._block_nbytes % box.element_size():  # blocks that cut elements: the format has them, we write none
            copy = torch.empty(box.shape, dtype=box.dtype)
            for _ in reader.chunks(file, [part], lambda tensor, chunk: as_bytes(copy)):
                overwrite(box, copy)
            return
        for start, block in reader.blocks(file, part):
            overwrite_part(box, start, torch.frombuffer(block, dtype=torch.uint8))

    def _box(self, tensor: Tensor, chunk: Chunk) -> torch.Tensor:
        target = self._targets[tensor.name]
        if chunk.offset is None and chunk.shape is None:
            return target
        offset, shape = box_of(chunk, tensor)
        return target[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]
