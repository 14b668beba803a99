"""Filling the live tensors, or the parts of them that this process holds, with a checkpoint's bytes."""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import compress
from typing import NamedTuple

import torch

from ckptman.format.manifest import Chunk, File, Manifest, Tensor, box_of
from ckptman.plan.boxes import Band, slices
from ckptman.plan.load import Need, needs
from ckptman.repository.ranges import RangedReader
from ckptman.repository.reading import NEAR_SPAN_NBYTES, CheckedReader, Part, Piece, parts_of, pieces
from ckptman.state.dtensor import Shard, is_sharded, shards
from ckptman.state.tensors import as_bytes, dtype_of, is_row_major, overwrite, overwrite_part
from ckptman.storage.base import Distant, Storage


def fill(storage: Storage, manifest: Manifest, targets: Mapping[str, torch.Tensor], *, threads: int = 1) -> None:
    """
    Read every tensor of *targets* into its target, in place; every byte is checked.

    Of a DTensor only what this process holds of it is read: the blocks that have bytes of it. Bytes go straight into a
    target that is row-major host memory; anything else takes a host copy of one block, one at a time (of one chunk,
    where blocks cut elements). So at most 8 MiB are taken for each of *threads*, or 16 where the storage is distant.
    A block is checked after it lies in a straight target: if this raises, some targets hold new or damaged data. Once
    it has returned or raised nothing is read any more.

    Raises:
        IntegrityError: The checkpoint is damaged; of several faults the first one in the order of the files.
        StorageError: The medium failed.
    """
    reader = CheckedReader(storage, manifest)
    placing = Placing({name: target for name, target in targets.items() if not is_sharded(target)}, manifest)
    resharding = _Resharding({name: target for name, target in targets.items() if is_sharded(target)}, manifest)
    whole = parts_of(manifest, placing.targets)
    needed: list[Job] = []
    straight: list[Job] = []
    others: list[tuple[File, Part]] = []
    for number, file in enumerate(manifest.files):
        parts = sorted([*whole[number], *resharding.whole(number, placing)], key=lambda part: part.chunk.start)
        if parts or resharding.has(number):
            needed.append(partial(reader.header, file))
            is_straight = [placing.is_straight(part) for part in parts]
            chosen = list(compress(parts, is_straight))
            if isinstance(storage, Distant):
                cut = pieces(chosen, manifest.block_nbytes)
                straight += RangedReader(storage, reader, file, placing.memory, placing.place).jobs(cut)
            else:
                cut = pieces(chosen, manifest.block_nbytes, span_nbytes=NEAR_SPAN_NBYTES)
                straight += [partial(reader.read, file, one, placing.memory, place=placing.place) for one in cut]
            straight += [partial(reader.read_run, file, *run) for run in resharding.runs(number, manifest.block_nbytes)]
            others += [(file, part) for part, is_one in zip(parts, is_straight, strict=True) if not is_one]
    Readers(needed).run(threads)  # nothing is changed before every file is there
    Readers(straight).run(threads)
    for file, part in others:
        placing.through_a_copy(reader, file, part)
    for number, file in enumerate(manifest.files):
        for need, where in resharding.scattered(number):
            _read_bands(reader, file, need, where, manifest.block_nbytes)


class _Run(NamedTuple):
    """The bytes of one block of a chunk that lie within a run, and the memory of the run."""

    part: Part
    block: int
    run: tuple[int, int]
    memory: memoryview


Job = Callable[[], object]
"""Reads one piece."""


class Readers:
    """Threads that do jobs in their order, until all are done or one of them failed."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._count = len(jobs)
        self._mutex = threading.Lock()  # guards the three below
        self._left: Iterator[tuple[int, Job]] = iter(enumerate(jobs))
        self._is_stopped = False
        self._failures: list[tuple[int, BaseException]] = []

    def run(self, threads: int) -> None:
        """
        Do everything, on this thread and *threads* - 1 more.

        Jobs are handed out in order and none after a failure, so whatever lies before the first fault was done: the
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
            index, job = got
            try:
                job()
            except Exception as error:  # noqa: BLE001 - a thread's edge: run() raises it
                with self._mutex:
                    self._failures.append((index, error))
                    self._is_stopped = True

    def _next(self) -> tuple[int, Job] | None:
        with self._mutex:
            return None if self._is_stopped else next(self._left, None)


class Placing:
    """Where the bytes of a chunk go of which all is wanted."""

    def __init__(self, targets: Mapping[str, torch.Tensor], manifest: Manifest) -> None:
        self.targets = targets
        self._block_nbytes = manifest.block_nbytes
        self._boxes: dict[tuple[int, int], torch.Tensor] = {}  # of parts of tensors, by file and first byte

    def put(self, need: Need, where: torch.Tensor) -> Part:
        """Place a chunk that belongs to a part of a tensor."""
        self._boxes[need.chunk.file, need.chunk.start] = where
        return Part(tensor=need.tensor, chunk=need.chunk)

    def piece(self, reader: CheckedReader, file: File, piece: Piece) -> None:
        """Read a piece of one block at most to where it belongs, by way of host memory where needed. Elements whole."""
        if all(map(self.is_straight, piece.parts)):
            reader.read(file, piece, self.memory, place=self.place)
            return
        copies = {part.chunk.start: bytearray(part.chunk.nbytes) for part in piece.parts if piece.block is None}
        if piece.block is None:
            reader.read(file, piece, lambda tensor, chunk: memoryview(copies[chunk.start]))
            for part in piece.parts:
                overwrite_part(self._box(part.tensor, part.chunk), 0, _bytes_of(copies[part.chunk.start]))
            return
        part = piece.parts[0]
        start, stop = piece.start - part.chunk.start, piece.stop - part.chunk.start
        copy = bytearray(stop - start)
        reader.read_run(file, part, piece.block, (start, stop), memoryview(copy))
        overwrite_part(self._box(part.tensor, part.chunk), start, _bytes_of(copy))

    def is_straight(self, part: Part) -> bool:
        """Whether the target's own memory can be read into."""
        return _is_host_memory(self._box(part.tensor, part.chunk))

    def memory(self, tensor: Tensor, chunk: Chunk) -> memoryview:
        """The target's own memory."""
        return as_bytes(self._box(tensor, chunk))

    def place(self, parts: Sequence[Part], span: memoryview) -> None:
        """Copy *parts*, which lie behind each other in *span*, into the targets' own memory."""
        if not span:
            return
        base = torch.frombuffer(span, dtype=torch.uint8).data_ptr() - parts[0].chunk.start
        for part in parts:
            chunk = part.chunk
            box = self._box(part.tensor, chunk)
            if box.nbytes != chunk.nbytes:
                raise ValueError(f"the target of {part.tensor.name!r} has {box.nbytes} bytes, not {chunk.nbytes}")
            ctypes.memmove(box.data_ptr(), base + chunk.start, chunk.nbytes)  # a view of each would take longer

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
        target = self.targets.get(tensor.name)
        if target is None:
            return self._boxes[chunk.file, chunk.start]
        if chunk.offset is None and chunk.shape is None:
            return target
        offset, shape = box_of(chunk, tensor)
        return target[tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))]


class _Resharding:
    """What is needed of the stored chunks for the parts of tensors that this process holds."""

    def __init__(self, targets: Mapping[str, torch.Tensor], manifest: Manifest) -> None:
        self._whole: list[list[tuple[Need, torch.Tensor]]] = [[] for _ in manifest.files]
        self._runs: list[list[tuple[Need, torch.Tensor]]] = [[] for _ in manifest.files]
        self._scattered: list[list[tuple[Need, torch.Tensor]]] = [[] for _ in manifest.files]
        for tensor in manifest.tensors if targets else ():
            if tensor.name in targets:
                for need, where in _needed(tensor, shards(targets[tensor.name])):
                    self._list_for(need, where)[need.chunk.file].append((need, where))

    def _list_for(self, need: Need, where: torch.Tensor) -> list[list[tuple[Need, torch.Tensor]]]:
        if need.is_whole:
            return self._whole
        return self._runs if _is_host_memory(where) and need.run() is not None else self._scattered

    def has(self, file: int) -> bool:
        """Whether anything but whole chunks is needed of file number *file*."""
        return bool(self._runs[file] or self._scattered[file])

    def whole(self, file: int, placing: Placing) -> Iterator[Part]:
        """The chunks that are needed whole, placed."""
        return (placing.put(need, where) for need, where in self._whole[file])

    def runs(self, file: int, block_nbytes: int) -> Iterator[_Run]:
        """Block by block, what is needed of chunks where it lies together and goes to one place."""
        for need, where in self._runs[file]:
            run = need.run()
            assert run is not None
            part, memory = Part(tensor=need.tensor, chunk=need.chunk), as_bytes(where)
            for block in range(run[0] // block_nbytes, -(-run[1] // block_nbytes)):
                yield _Run(part, block, run, memory)

    def scattered(self, file: int) -> list[tuple[Need, torch.Tensor]]:
        """What is needed of chunks otherwise, and where it goes."""
        return self._scattered[file]


def _needed(tensor: Tensor, held: Iterable[Shard]) -> Iterator[tuple[Need, torch.Tensor]]:
    filled = [shard.tensor for shard in held if shard.tensor.numel()]
    boxes = [(shard.offset, tuple(shard.tensor.shape)) for shard in held if shard.tensor.numel()]
    for need in needs(tensor, boxes):
        yield need, filled[need.number][slices(need.target)]


def _bytes_of(data: bytearray) -> torch.Tensor:
    return torch.frombuffer(data, dtype=torch.uint8)


def _is_host_memory(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and is_row_major(tensor)


def _read_bands(reader: CheckedReader, file: File, need: Need, where: torch.Tensor, block_nbytes: int) -> None:
    """Read the rows that have something of *need*, and copy what is needed of them to *where*."""
    dtype = dtype_of(need.tensor.dtype)
    part = Part(tensor=need.tensor, chunk=need.chunk)
    for band in need.bands(block_nbytes):
        row_nbytes = math.prod(band.row) * dtype.itemsize
        start = band.start * dtype.itemsize
        run = start, start + band.rows * row_nbytes
        held, done = 0, 0  # bytes in the buffer; rows that are at their place
        buffer = memoryview(bytearray(row_nbytes + block_nbytes))
        for block in range(run[0] // block_nbytes, -(-run[1] // block_nbytes)):
            first, stop = max(run[0], block * block_nbytes), min(run[1], (block + 1) * block_nbytes)
            fresh = buffer[held : held + stop - first]
            reader.read_run(file, part, block, (first, stop), fresh)
            held += stop - first
            count = held // row_nbytes
            if count:
                rows = torch.frombuffer(buffer, dtype=torch.uint8, count=count * row_nbytes).view(dtype)
                _place(where, rows.view(count, *band.row), band, done)
            buffer[: held - count * row_nbytes] = buffer[count * row_nbytes : held]
            held, done = held - count * row_nbytes, done + count


def _place(where: torch.Tensor, rows: torch.Tensor, band: Band, done: int) -> None:
    target = where[band.at[:-1]][done : done + len(rows)]
    overwrite(target, rows[(slice(None), *slices(band.inner))])
