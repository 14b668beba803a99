"""
Reading a checkpoint's bytes, every one of them checked against its digest before anybody may use it.

Chunks are read in the order of the file. Small neighbours are read together, large ones block by block, straight
into the memory that the caller gives.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import msgspec

from ckptman.errors import IntegrityError
from ckptman.format.digest import block_digest, blocks
from ckptman.format.manifest import Chunk, File, Manifest, Tensor
from ckptman.storage.base import Distant, KeyMissing, NotAFile, lacking

SPAN_NBYTES = 8 << 20
"""Chunks smaller than this are read together, up to this many bytes at a time."""

NEAR_SPAN_NBYTES = 1 << 20
"""
The same where a request costs little: what was read beside its place is then copied from the processor's cache.

Filling 400 tensors of 52 MB from the page cache took 30 – 33 ms of CPU; by 8 MiB, each in new memory, 38 – 51 ms.
"""

GAP_NBYTES = 64 << 10
"""Neighbours are read together only where no more than this, which nobody wants, lies between them."""

Memory = Callable[[Tensor, Chunk], memoryview | None]
"""Where a chunk's bytes shall go; None to check them only."""


Place = Callable[["Sequence[Part]", memoryview], None]
"""Puts parts where they belong, given the bytes from the beginning of the first one to the end of the last."""


class Readable(Protocol):
    """What is asked of a storage here: see `ckptman.storage.base.Storage`."""

    def read_into(self, key: str, start: int, into: memoryview) -> int: ...

    def size(self, key: str) -> int: ...


class Part(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One chunk of one tensor."""

    tensor: Tensor
    chunk: Chunk

    @property
    def stop(self) -> int:
        """The first byte of the file after the chunk."""
        return self.chunk.start + self.chunk.nbytes


@dataclass(frozen=True, slots=True)
class Piece:
    """
    What is checked at once: small neighbours together, or one *block* of a large chunk.

    ``start`` and ``stop`` are its bytes of the file; ``is_last`` says whether the parts are complete with it.
    """

    parts: Sequence[Part]
    block: int | None
    start: int
    stop: int
    is_last: bool


def pieces(parts: Sequence[Part], block_nbytes: int, *, span_nbytes: int = SPAN_NBYTES) -> Iterator[Piece]:
    """
    Cut *parts* of one file, in the order of their bytes, into pieces to be read independently.

    What is smaller than *span_nbytes* is read together with its neighbours, up to so much.
    """
    for span in _spans(parts, span_nbytes):
        nbytes = span[0].chunk.nbytes
        if len(span) > 1 or nbytes < span_nbytes:
            yield Piece(span, None, span[0].chunk.start, span[-1].stop, True)
        else:
            first = span[0].chunk.start
            for block, (start, stop) in enumerate(blocks(nbytes, block_nbytes)):
                yield Piece(span, block, first + start, first + stop, stop == nbytes)


def parts_of(manifest: Manifest, names: Iterable[str] | None = None) -> list[list[Part]]:
    """The chunks of the tensors *names* (None: all), for each file in the order in which they lie in it."""
    wanted = None if names is None else set(names)
    by_file: list[list[Part]] = [[] for _ in manifest.files]
    for tensor in manifest.tensors:
        if wanted is None or tensor.name in wanted:
            for chunk in tensor.chunks:
                by_file[chunk.file].append(Part(tensor=tensor, chunk=chunk))
    for parts in by_file:
        parts.sort(key=lambda part: part.chunk.start)
    return by_file


def _fresh(nbytes: int) -> memoryview:
    return memoryview(bytearray(nbytes))


class CheckedReader:
    """Reads the files of one checkpoint. Every method raises `IntegrityError` naming step, file and tensor."""

    def __init__(self, storage: Readable, manifest: Manifest) -> None:
        self._storage = storage
        self._manifest = manifest
        self._kept = threading.local()

    def header(self, file: File) -> bytes:
        """The safetensors header of *file* (its length field included), after checking the file's size."""
        header = bytearray(8 + file.header_nbytes)
        with self._naming_damage(file, None):
            if isinstance(self._storage, Distant):
                got, nbytes = self._storage.read_beginning(file.path, memoryview(header))
            else:
                nbytes, got = self._storage.size(file.path), self._storage.read_into(file.path, 0, memoryview(header))
        if nbytes != file.nbytes:
            raise self._damage(f"{file.path} has {nbytes} bytes instead of {file.nbytes}", file)
        self._refuse_short(file, 0, got, len(header), None)
        if block_digest(header) != file.header_digest:
            raise self._damage(f"the header of {file.path} is damaged", file)
        return bytes(header)

    def chunks(self, file: File, parts: Sequence[Part], memory: Memory) -> Iterator[Part]:
        """Read *parts* of *file* into *memory*; yield each one once its bytes are there and right."""
        for piece in pieces(parts, self._manifest.block_nbytes):
            self.read(file, piece, memory)
            if piece.is_last:
                yield from piece.parts

    def read(self, file: File, piece: Piece, memory: Memory, *, place: Place | None = None) -> None:
        """
        Read *piece* of *file* into *memory*, and check it. Pieces may be read by several threads at a time.

        What was read together is given to *place*, where there is one, instead of being copied into *memory*.
        """
        view = self.room(piece, memory, scratch=self._scratch)
        self._fill(file, piece.start, view, piece.parts[0].tensor)
        self.accept(file, piece, view, place or placing_in(memory))

    def room(self, piece: Piece, memory: Memory, *, scratch: Callable[[int], memoryview] = _fresh) -> memoryview:
        """Where the bytes of *piece* are to be read: into *memory*, or beside it, into *scratch* of so many bytes."""
        nbytes = piece.stop - piece.start
        if piece.block is not None:
            into = memory(piece.parts[0].tensor, piece.parts[0].chunk)
            if into is not None:
                start = piece.block * self._manifest.block_nbytes
                return into[start : start + nbytes]
        return scratch(nbytes)

    def _scratch(self, nbytes: int) -> memoryview:
        """Memory of this thread, until its next piece: pages that were touched before take no time to be had."""
        kept: memoryview | None = getattr(self._kept, "memory", None)
        if kept is None or len(kept) < nbytes:
            kept = self._kept.memory = _fresh(nbytes)
        return kept[:nbytes]

    def accept(self, file: File, piece: Piece, view: memoryview, place: Place) -> None:
        """Check the bytes of *piece*, which lie in *view*; have *place* put what was read beside where it belongs."""
        if piece.block is not None:
            self._check(file, piece.parts[0], piece.block, view)
            return
        for part in piece.parts:
            at = part.chunk.start - piece.start
            whole = view[at : at + part.chunk.nbytes]
            if len(part.chunk.digests) == 1:
                self._check(file, part, 0, whole)
            else:
                for index, (start, stop) in enumerate(blocks(part.chunk.nbytes, self._manifest.block_nbytes)):
                    self._check(file, part, index, whole[start:stop])
        place(piece.parts, view)

    def blocks(self, file: File, part: Part) -> Iterator[tuple[int, memoryview]]:
        """Every block of *part* of *file*, checked: where it begins in the chunk, and its bytes, until the next one."""
        scratch = memoryview(bytearray(min(part.chunk.nbytes, self._manifest.block_nbytes)))
        for index, (start, stop) in enumerate(blocks(part.chunk.nbytes, self._manifest.block_nbytes)):
            block = scratch[: stop - start]
            self._fill(file, part.chunk.start + start, block, part.tensor)
            self._check(file, part, index, block)
            yield start, block

    def fetch(self, file: File, start: int, into: memoryview) -> None:
        """Fill *into* with the bytes of *file* from *start* on, *unchecked*: for whoever has them checked by others."""
        self._fill(file, start, into, None)

    def read_run(self, file: File, part: Part, block: int, run: tuple[int, int], memory: memoryview) -> None:
        """
        Read and check *block* of a chunk, and give of it what lies within *run*: bytes (start, stop) of the chunk.

        Args:
            file: Where the chunk lies.
            part: The chunk.
            block: Number of a block that has bytes of the run.
            run: What is wanted.
            memory: Takes the run.
        """
        first = block * self._manifest.block_nbytes
        end = min(first + self._manifest.block_nbytes, part.chunk.nbytes)
        start, stop = max(run[0], first), min(run[1], end)
        into = memory[start - run[0] : stop - run[0]]
        is_whole = (start, stop) == (first, end)
        view = into if is_whole else memoryview(bytearray(end - first))
        self._fill(file, part.chunk.start + first, view, part.tensor)
        self._check(file, part, block, view)
        if not is_whole:
            into[:] = view[start - first : stop - first]

    def _fill(self, file: File, start: int, into: memoryview, tensor: Tensor | None) -> None:
        with self._naming_damage(file, tensor):
            got = self._storage.read_into(file.path, start, into)
        self._refuse_short(file, start, got, len(into), tensor)

    @contextmanager
    def _naming_damage(self, file: File, tensor: Tensor | None) -> Iterator[None]:
        try:
            yield
        except (KeyMissing, NotAFile) as error:
            raise self._damage(f"{file.path} {lacking(error)}", file, tensor) from error

    def _refuse_short(self, file: File, start: int, got: int, wanted: int, tensor: Tensor | None) -> None:
        if got != wanted:
            raise self._damage(f"{file.path} ends at byte {start + got}, before byte {start + wanted}", file, tensor)

    def fill_each(self, storage: Distant, file: File, start: int, into: Sequence[memoryview]) -> None:
        """As `fetch`, by one request for all of *into*, which are filled one after the other."""
        with self._naming_damage(file, None):
            got = storage.read_into_each(file.path, start, into)
        self._refuse_short(file, start, got, sum(map(len, into)), None)

    def _check(self, file: File, part: Part, index: int, block: memoryview) -> None:
        if block_digest(block) != part.chunk.digests[index]:
            start = part.chunk.start + index * self._manifest.block_nbytes
            raise self._damage(
                f"{file.path} is damaged: tensor {part.tensor.name!r}, bytes {start} to {start + len(block)}",
                file,
                part.tensor,
            )

    def _damage(self, what: str, file: File, tensor: Tensor | None = None) -> IntegrityError:
        step = self._manifest.step
        return IntegrityError(f"step {step}: {what}", step=step, file=file.path, tensor=tensor.name if tensor else None)


def placing_in(memory: Memory) -> Place:
    """Puts what was read beside *memory* into it."""

    def place(parts: Sequence[Part], span: memoryview) -> None:
        first = parts[0].chunk.start
        for part in parts:
            into = memory(part.tensor, part.chunk)
            if into is not None:
                into[:] = span[part.chunk.start - first : part.stop - first]

    return place


def _spans(parts: Sequence[Part], nbytes: int) -> Iterator[list[Part]]:
    """Group neighbours so that no group reaches over more than *nbytes*, unless it is one large chunk."""
    span: list[Part] = []
    first = end = 0
    for part in parts:
        start, stop = part.chunk.start, part.stop
        if span and (stop - first > nbytes or start - end > GAP_NBYTES):
            yield span
            span = []
        first, end = first if span else start, stop
        span.append(part)
    if span:
        yield span
