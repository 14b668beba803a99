"""
What every rank reports of its part of a save, and how rank 0 makes one checkpoint's tensors of all reports.

A rank's pieces of tensors travel as columns: a report of 5,000 pieces is 0.5 MB, and rank 0 makes no object for each
of them. What all ranks say alike, the names above all, is decoded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import msgspec
import numpy as np

from ckptman.errors import SaveFailed
from ckptman.format.columns import Boxes, ColumnChunks, Columns
from ckptman.format.digest import BLOCK_NBYTES
from ckptman.format.dtypes import DTYPES
from ckptman.format.manifest import Chunk, File, Tensor, box_of
from ckptman.format.tiling import Box

_Kind = tuple[str, str, tuple[int, ...]]
"""Name, dtype and shape of a tensor."""


class _Pieces(msgspec.Struct, frozen=True, array_like=True):
    """
    Pieces of tensors, one of each: ``kinds`` is msgpack of a list of `_Kind`, the others are columns of integers.

    ``boxes`` has each box once, ``box`` the number of that of each piece; ``digests`` are those of all, 16 bytes each.
    """

    kinds: bytes
    boxes: list[Box]
    box: bytes
    file: bytes
    start: bytes
    digests: bytes


class Report(msgspec.Struct, frozen=True):
    """What a rank has written: files, the tensors in them (``listed`` whole ones), and the values that are its own."""

    files: list[File]
    listed: list[Tensor]
    pieces: _Pieces
    own: dict[str, tuple[str, bytes]]


def report_of(files: Sequence[File], tensors: Iterable[Tensor], own: dict[str, tuple[str, bytes]]) -> Report:
    """
    The report on *files* and *tensors*.

    Args:
        files: What was written, or borrowed.
        tensors: Each with one chunk, whose number of a file counts within *files*.
        own: Component → kind and values.
    """
    listed: list[Tensor] = []
    pieces: list[tuple[Tensor, Chunk]] = []
    for tensor in tensors:
        chunk = tensor.chunks[0]
        if chunk.offset is not None and chunk.nbytes and chunk.key is None:
            pieces.append((tensor, chunk))
        else:
            listed.append(tensor)
    return Report(list(files), listed, _pieces_of(pieces), own)


def _pieces_of(pieces: Sequence[tuple[Tensor, Chunk]]) -> _Pieces:
    numbers: dict[Box, int] = {}
    box = [numbers.setdefault(box_of(chunk, tensor), len(numbers)) for tensor, chunk in pieces]
    return _Pieces(
        kinds=msgspec.msgpack.encode([(tensor.name, tensor.dtype, tensor.shape) for tensor, _ in pieces]),
        boxes=list(numbers),
        box=np.array(box, dtype=np.int64).tobytes(),
        file=np.array([chunk.file for _, chunk in pieces], dtype=np.int64).tobytes(),
        start=np.array([chunk.start for _, chunk in pieces], dtype=np.int64).tobytes(),
        digests=bytes.fromhex("".join(digest for _, chunk in pieces for digest in chunk.digests)),
    )


def joined(reports: Sequence[Report]) -> tuple[list[File], list[Tensor]]:
    """
    All files, each once, and all tensors with their chunks from all ranks.

    Raises:
        SaveFailed: A tensor has another dtype or shape on another rank.
    """
    numbers: dict[str, int] = {}
    files: list[File] = []
    listed: dict[str, list[Tensor]] = {}
    joining = _Joining()
    for report in reports:
        for file in report.files:
            if file.path not in numbers:
                numbers[file.path] = len(files)
                files.append(file)
        places = [numbers[file.path] for file in report.files]
        for tensor in report.listed:
            chunks = tuple(msgspec.structs.replace(chunk, file=places[chunk.file]) for chunk in tensor.chunks)
            listed.setdefault(tensor.name, []).append(msgspec.structs.replace(tensor, chunks=chunks))
        joining.add(report.pieces, places)
    sharded = []
    for tensor in joining.tensors():
        if len(tensor.chunks) == 1 or tensor.name in listed:
            listed.setdefault(tensor.name, []).append(msgspec.structs.replace(tensor, chunks=tuple(tensor.chunks)))
        else:
            sharded.append(tensor)
    return files, [*map(_one, listed.values()), *sharded]


def _one(parts: list[Tensor]) -> Tensor:
    first = parts[0]
    for part in parts:
        _check_alike(first.name, (first.dtype, first.shape), (part.dtype, part.shape))
    chunks = sorted((chunk for part in parts for chunk in part.chunks), key=lambda chunk: box_of(chunk, first))
    return msgspec.structs.replace(first, chunks=tuple(chunks))


def _check_alike(name: str, one: tuple[str, tuple[int, ...]], other: tuple[str, tuple[int, ...]]) -> None:
    if one != other:
        raise SaveFailed(f"{name} is {one[0]} {list(one[1])} on one rank and {other[0]} {list(other[1])} on another")


class _Joining:
    """Puts the pieces of all ranks together, without an object for each."""

    def __init__(self) -> None:
        self._kinds: list[_Kind] = []
        self._numbers: dict[str, int] = {}  # of the kinds, by name
        self._known: dict[bytes, list[int]] = {}  # what ranks said of kinds, and their numbers
        self._boxes: list[Box] = []
        self._nelements: list[int] = []
        self._columns: list[tuple[np.ndarray, ...]] = []  # of each rank: kind, box, file, start
        self._digests: list[bytes] = []

    def add(self, pieces: _Pieces, places: Sequence[int]) -> None:
        """Add what a rank has; *places* are the numbers of its files."""
        if pieces.kinds not in self._known:
            self._known[pieces.kinds] = [self._number(*kind) for kind in _decoded(pieces.kinds)]
        box = np.frombuffer(pieces.box, dtype=np.int64) + len(self._boxes)
        self._boxes += pieces.boxes
        self._nelements += [math.prod(shape) for _, shape in pieces.boxes]
        file = np.array(places, dtype=np.int64)[np.frombuffer(pieces.file, dtype=np.int64)]
        kind = np.array(self._known[pieces.kinds], dtype=np.int64)
        self._columns.append((kind, box, file, np.frombuffer(pieces.start, dtype=np.int64)))
        self._digests.append(pieces.digests)

    def _number(self, name: str, dtype: str, shape: tuple[int, ...]) -> int:
        number = self._numbers.setdefault(name, len(self._kinds))
        if number == len(self._kinds):
            self._kinds.append((name, dtype, shape))
        _check_alike(name, self._kinds[number][1:], (dtype, shape))
        return number

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of which somebody has a piece."""
        kind, box, file, start = (np.concatenate(column) for column in zip(*self._columns, strict=True))
        itemsizes = np.array([DTYPES[dtype].itemsize for _, dtype, _ in self._kinds], dtype=np.int64)
        nbytes = np.array(self._nelements, dtype=np.int64)[box] * itemsizes[kind]
        blocks = -(-nbytes // BLOCK_NBYTES)
        order = np.lexsort((start, file, kind))
        columns = Columns(
            files=file[order],
            starts=start[order],
            nbytes=nbytes[order],
            first=(np.cumsum(blocks) - blocks)[order],
            digests=np.frombuffer(b"".join(self._digests), dtype=np.uint8).reshape(-1, 16),
            block_nbytes=BLOCK_NBYTES,
        )
        box = box[order]
        cuts: dict[bytes, Boxes] = {}
        first = 0
        for (name, dtype, shape), count in zip(
            self._kinds, np.bincount(kind, minlength=len(self._kinds)).tolist(), strict=True
        ):
            numbers = box[first : first + count]
            if (cut := cuts.get(numbers.tobytes())) is None:
                found = [self._boxes[number] for number in numbers.tolist()]
                cut = cuts[numbers.tobytes()] = Boxes([one for one, _ in found], [extent for _, extent in found])
            yield Tensor(name=name, dtype=dtype, shape=shape, chunks=ColumnChunks(columns, first, cut))
            first += count


def _decoded(kinds: bytes) -> list[_Kind]:
    return msgspec.msgpack.decode(kinds, type=list[_Kind])
