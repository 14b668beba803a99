"""
Reading a file of a distant storage in wide ranges: each by one request, whatever lies in it, and checked all the same.

A server does least for large ranges that begin where its own parts of the file do. Blocks do not: one that lies across
two ranges is checked by whoever has received the rest of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from ckptman.format.manifest import File
from ckptman.repository.reading import GAP_NBYTES, SPAN_NBYTES, CheckedReader, Memory, Piece, Place
from ckptman.storage.base import Distant


@dataclass(slots=True)
class _Coming:
    """A piece of which something is still to come."""

    piece: Piece
    missing_nbytes: int
    view: memoryview | None = None


@dataclass(slots=True)
class _Range:
    """Bytes that are asked for together, and the pieces that lie in them, wholly or in part."""

    start: int
    stop: int
    coming: list[_Coming] = field(default_factory=list)
    beside_nbytes: int = 0


class RangedReader:
    """
    Reads pieces of *file* by *reader* into *memory*; several threads may do its `jobs` at a time.

    What is read beside *memory* and given to *place* takes at most 16 MiB for each job under way.
    """

    def __init__(self, storage: Distant, reader: CheckedReader, file: File, memory: Memory, place: Place) -> None:
        self._storage = storage
        self._reader = reader
        self._file = file
        self._memory = memory
        self._place = place
        self._mutex = threading.Lock()  # guards what is coming

    def jobs(self, pieces: Iterable[Piece]) -> Iterator[Callable[[], None]]:
        """One for each range, in the order of the file: it reads, and checks every piece that is complete with it."""
        return (partial(self._read, one) for one in _ranges(pieces, self._storage.read_nbytes))

    def _read(self, one: _Range) -> None:
        self._reader.fill_each(self._storage, self._file, one.start, list(self._views(one)))
        for coming in one.coming:
            piece = coming.piece
            with self._mutex:
                coming.missing_nbytes -= min(piece.stop, one.stop) - max(piece.start, one.start)
                is_complete, view = not coming.missing_nbytes, coming.view
            if is_complete and view is not None:
                coming.view = None
                self._reader.accept(self._file, piece, view, self._place)

    def _views(self, one: _Range) -> Iterator[memoryview]:
        at = one.start
        for coming in one.coming:
            piece = coming.piece
            if at < piece.start:
                yield memoryview(bytearray(piece.start - at))
            with self._mutex:
                if coming.view is None:
                    coming.view = self._reader.room(piece, self._memory)
                view = coming.view
            at = min(piece.stop, one.stop)
            yield view[max(one.start - piece.start, 0) : at - piece.start]


def _ranges(pieces: Iterable[Piece], nbytes: int) -> Iterator[_Range]:
    """Cut at multiples of *nbytes*, at gaps, and where too much would be read beside the memory it is for."""
    current: _Range | None = None
    for piece in pieces:
        coming = _Coming(piece, piece.stop - piece.start)
        beside_nbytes = 0 if piece.block is not None else piece.stop - piece.start
        at = piece.start
        while at < piece.stop:
            if current is not None and not _reaches(current, at, beside_nbytes, nbytes):
                yield current
                current = None
            stop = min(piece.stop, (at // nbytes + 1) * nbytes)
            if current is None:
                current = _Range(at, stop)
            current.stop, at = stop, stop
            current.coming.append(coming)
            current.beside_nbytes += beside_nbytes
    if current is not None:
        yield current


def _reaches(current: _Range, at: int, beside_nbytes: int, nbytes: int) -> bool:
    """Whether what begins at byte *at* may be read with it."""
    return (
        at // nbytes == current.start // nbytes
        and at - current.stop <= GAP_NBYTES
        and current.beside_nbytes + beside_nbytes <= SPAN_NBYTES
    )
