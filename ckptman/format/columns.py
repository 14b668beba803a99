"""
The chunks of tensors in many pieces, as columns: 40 bytes for each, and a `Chunk` only when one is asked for.

`expand` makes them of what a manifest says, and trusts nothing of it; `pack` is the way back.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from ckptman.errors import FormatError
from ckptman.format.dtypes import DTYPES
from ckptman.format.manifest import MAX_FILE_NBYTES, Chunk, File, ManyChunks, Tensor, box_of
from ckptman.format.sharded import Cut, FileLayout, Sharded, ShardedTensor, ShardFile
from ckptman.format.strict_json import from_base64, to_base64
from ckptman.format.tiling import Box, tiles

_DIGEST_NBYTES = 16

Ints = npt.NDArray[np.int64]
Digests = npt.NDArray[np.uint8]
"""One row of 16 bytes for each block."""


@dataclass(frozen=True, slots=True)
class Columns:
    """
    Chunks of many tensors: those of one tensor side by side, in the order of files and of bytes.

    ``first`` is where the digests of a chunk begin among all ``digests``; of ``nbytes``, each block has one.
    """

    files: Ints
    starts: Ints
    nbytes: Ints
    first: Ints
    digests: Digests
    block_nbytes: int

    @property
    def blocks(self) -> Ints:
        """How many digests each chunk has."""
        return -(-self.nbytes // self.block_nbytes)


class Boxes:
    """One way of cutting a tensor. Shared by all tensors that are cut so."""

    def __init__(self, offsets: Sequence[tuple[int, ...]], shapes: Sequence[tuple[int, ...]]) -> None:
        self.offsets = tuple(offsets)
        self.shapes = tuple(shapes)

    def __len__(self) -> int:
        return len(self.offsets)

    @functools.cached_property
    def sizes(self) -> Ints:
        """Elements of each box."""
        return np.array([math.prod(shape) for shape in self.shapes], dtype=np.int64)

    @functools.cached_property
    def _corners(self) -> tuple[Ints, Ints]:
        starts = np.array(self.offsets, dtype=np.int64)
        return starts, starts + np.array(self.shapes, dtype=np.int64)

    @functools.cached_property
    def _by_offset(self) -> dict[tuple[int, ...], int]:
        return {offset: number for number, offset in enumerate(self.offsets)}

    def at(self, offset: tuple[int, ...]) -> int | None:
        """The number of the box that begins at *offset*."""
        return self._by_offset.get(offset)

    def touching(self, wanted: Iterable[Box]) -> list[int]:
        """The numbers of the boxes that share an element with one of *wanted*."""
        starts, stops = self._corners
        found = np.zeros(len(self), dtype=bool)
        for offset, shape in wanted:
            first = np.array(offset, dtype=np.int64)
            found |= ((starts < first + np.array(shape, dtype=np.int64)) & (first < stops)).all(axis=1)
        return [int(number) for number in np.flatnonzero(found)]


class ColumnChunks(ManyChunks):
    """The chunks of one tensor: those from *first* on among *columns*, as many as there are *boxes*."""

    __slots__ = ("_first", "boxes", "columns")

    def __init__(self, columns: Columns, first: int, boxes: Boxes) -> None:
        self.columns = columns
        self.boxes = boxes
        self._first = first

    @property
    def span(self) -> slice:
        """Where they are among the columns."""
        return slice(self._first, self._first + len(self.boxes))

    def __len__(self) -> int:
        return len(self.boxes)

    @overload
    def __getitem__(self, index: int) -> Chunk: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Chunk]: ...
    def __getitem__(self, index: int | slice) -> Chunk | Sequence[Chunk]:
        numbers = range(len(self))[index]
        return self._chunk(numbers) if isinstance(numbers, int) else tuple(map(self._chunk, numbers))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == one for mine, one in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # equal to a tuple, which would have another hash

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} chunks)"

    def _chunk(self, number: int) -> Chunk:
        columns, at = self.columns, self._first + number
        nbytes, first = int(columns.nbytes[at]), int(columns.first[at])
        rows = columns.digests[first : first - (-nbytes // columns.block_nbytes)].tobytes().hex()
        return Chunk(
            file=int(columns.files[at]),
            start=int(columns.starts[at]),
            nbytes=nbytes,
            digests=tuple(rows[i : i + 2 * _DIGEST_NBYTES] for i in range(0, len(rows), 2 * _DIGEST_NBYTES)),
            offset=self.boxes.offsets[number],
            shape=self.boxes.shapes[number],
        )

    def touching(self, wanted: Iterable[Box]) -> Iterator[Chunk]:
        return map(self._chunk, self.boxes.touching(wanted))

    def at(self, offset: tuple[int, ...]) -> Chunk | None:
        number = self.boxes.at(offset)
        return None if number is None else self._chunk(number)

    def files(self) -> list[int]:
        return [int(number) for number in dict.fromkeys(self.columns.files[self.span].tolist())]

    def nbytes_in(self, files: Collection[int]) -> int:
        inside = np.isin(self.columns.files[self.span], np.fromiter(files, np.int64, len(files)))
        return int(self.columns.nbytes[self.span][inside].sum())


def expand(section: Sharded, files: Sequence[File], block_nbytes: int) -> list[Tensor]:
    """
    The tensors of *section*, whose dtypes are known to be right, with their chunks.

    Takes time and memory in proportion to the section's own size, whatever it claims.

    Raises:
        FormatError: A rule is broken.
    """
    numbers = _file_numbers(section, files)
    layouts = [_layout(layout, len(section.tensors)) for layout in section.layouts]
    digests = [_digests(one, layouts[one.layout]) for one in section.files]
    owners = _joined([layouts[one.layout][0] for one in section.files])
    starts = _joined([layouts[one.layout][1] for one in section.files])
    lengths = np.array([len(layouts[one.layout][0]) for one in section.files], dtype=np.int64)
    order = np.argsort(owners, kind="stable")  # from the order of files to that of tensors
    cuts = [_boxes(cut) for cut in section.cuts]
    sizes = _sizes(section.tensors, cuts, np.bincount(owners, minlength=len(section.tensors)))
    nbytes = np.empty_like(sizes)
    nbytes[order] = sizes
    holders = np.repeat(numbers, lengths)
    _check_places(holders, starts, nbytes, files)
    blocks = -(-nbytes // block_nbytes)
    first = np.cumsum(blocks) - blocks
    stops = np.cumsum(lengths)
    _check_digests(np.diff(np.cumsum(blocks)[stops - 1], prepend=0) if len(stops) else stops, digests)
    columns = Columns(
        files=holders[order],
        starts=starts[order],
        nbytes=sizes,
        first=first[order],
        digests=np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, _DIGEST_NBYTES),
        block_nbytes=block_nbytes,
    )
    return list(_tensors(section.tensors, cuts, columns))


def _file_numbers(section: Sharded, files: Sequence[File]) -> Ints:
    numbers = [one.file for one in section.files]
    if any(number >= len(files) for number in numbers):
        raise FormatError("a file with pieces of tensors is not listed")
    if any(one >= other for one, other in pairwise(numbers)):
        raise FormatError("the files with pieces of tensors do not ascend")
    if any(one.layout >= len(section.layouts) for one in section.files):
        raise FormatError("a file has a layout that is not listed")
    return np.array(numbers, dtype=np.int64)


def _layout(layout: FileLayout, tensors: int) -> tuple[Ints, Ints]:
    owners, starts = np.array(layout.tensors, dtype=np.int64), np.array(layout.starts, dtype=np.int64)
    if not len(owners) or len(owners) != len(starts):
        raise FormatError(f"a layout has {len(owners)} tensors and {len(starts)} places")
    if owners.max() >= tensors:
        raise FormatError("a layout has a tensor that is not listed")
    if (np.diff(starts) <= 0).any():
        raise FormatError("a layout is not in the order of the bytes")
    return owners, starts


def _digests(one: ShardFile, layout: tuple[Ints, Ints]) -> bytes:
    """Checked first of all: so there are no more chunks than digests, each of which takes room in the document."""
    data = from_base64(one.digests)
    if len(data) % _DIGEST_NBYTES or len(data) < len(layout[0]) * _DIGEST_NBYTES:
        raise FormatError(f"file number {one.file} has {len(data)} bytes of digests for {len(layout[0])} chunks")
    return data


def _boxes(cut: Cut) -> Boxes:
    if len(cut.offsets) != len(cut.shapes):
        raise FormatError(f"a cut has {len(cut.offsets)} offsets and {len(cut.shapes)} shapes")
    return Boxes(cut.offsets, cut.shapes)


def _sizes(tensors: Sequence[ShardedTensor], cuts: Sequence[Boxes], counts: npt.NDArray[Any]) -> Ints:
    """The bytes of each chunk, in the order of the tensors."""
    fitting: set[tuple[int, tuple[int, ...]]] = set()  # a cut fits one shape, so there are few
    sizes = []
    for tensor, count in zip(tensors, counts.tolist(), strict=True):
        if tensor.cut >= len(cuts) or len(cuts[tensor.cut]) != count:
            raise FormatError(f"tensor {tensor.name!r} has {count} pieces in the files, its cut has another number")
        itemsize = DTYPES[tensor.dtype].itemsize
        if (tensor.cut, tensor.shape) not in fitting:
            _check_fit(tensor, cuts[tensor.cut], itemsize)
            fitting.add((tensor.cut, tensor.shape))
        sizes.append(cuts[tensor.cut].sizes * itemsize)
    return _joined(sizes)


def _check_fit(tensor: ShardedTensor, boxes: Boxes, itemsize: int) -> None:
    if math.prod(tensor.shape) * itemsize > MAX_FILE_NBYTES // max(1, len(boxes)):
        raise FormatError(f"tensor {tensor.name!r} is too large to be in many pieces")
    for offset, shape in zip(boxes.offsets, boxes.shapes, strict=True):
        if len(offset) != len(tensor.shape) or len(shape) != len(tensor.shape) or not math.prod(shape):
            raise FormatError(f"a piece of {tensor.name!r} is empty, or has another number of dimensions")
        if any(start + size > whole for start, size, whole in zip(offset, shape, tensor.shape, strict=True)):
            raise FormatError(f"a piece of {tensor.name!r} reaches beyond the tensor")
    whole = math.prod(tensor.shape)
    if boxes.sizes.sum() != whole or not tiles(list(zip(boxes.offsets, boxes.shapes, strict=True)), tensor.shape):
        raise FormatError(f"the pieces of {tensor.name!r} overlap, or leave a part of it out")


def _check_places(holders: Ints, starts: Ints, nbytes: Ints, files: Sequence[File]) -> None:
    ends = np.array([file.nbytes for file in files], dtype=np.int64)[holders]
    data = np.array([8 + file.header_nbytes for file in files], dtype=np.int64)[holders]
    if ((starts < data) | (starts > ends) | (nbytes > ends - starts)).any():
        raise FormatError("a piece of a tensor lies outside of the data of its file")


def _check_digests(expected: Ints, digests: Sequence[bytes]) -> None:
    if [len(data) for data in digests] != [count * _DIGEST_NBYTES for count in expected.tolist()]:
        raise FormatError("a file with pieces of tensors has too few or too many digests")


def _tensors(tensors: Sequence[ShardedTensor], cuts: Sequence[Boxes], columns: Columns) -> Iterator[Tensor]:
    first = 0
    for tensor in tensors:
        boxes = cuts[tensor.cut]
        chunks = ColumnChunks(columns, first, boxes)
        yield Tensor(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, chunks=chunks)
        first += len(boxes)


def pack(tensors: Iterable[Tensor], block_nbytes: int) -> tuple[list[Tensor], Sharded | None]:
    """The tensors that a manifest lists one by one, and those in many pieces (None: there are none)."""
    listed: list[Tensor] = []
    sharded: list[ShardedTensor] = []
    numbers: dict[object, int] = {}
    cuts: list[Boxes] = []
    found: list[_Pieces] = []
    for tensor in tensors:
        if not _is_sharded(tensor):
            listed.append(tensor)
            continue
        pieces = _pieces_of(tensor)
        found.append(pieces)
        number = numbers.setdefault(pieces.key, len(cuts))
        if number == len(cuts):
            cuts.append(pieces.boxes)
        sharded.append(ShardedTensor(name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, cut=number))
    if not sharded:
        return listed, None
    layouts, files = _by_file(found, block_nbytes)
    section = Sharded(
        tensors=tuple(sharded),
        cuts=tuple(Cut(offsets=boxes.offsets, shapes=boxes.shapes) for boxes in cuts),
        layouts=layouts,
        files=files,
    )
    return listed, section


def _is_sharded(tensor: Tensor) -> bool:
    """Whether it is in many pieces, all of them ordinary: with bytes, and under its own name in the header."""
    chunks = tensor.chunks
    return isinstance(chunks, ManyChunks) or (
        len(chunks) > 1 and all(chunk.nbytes and chunk.key is None for chunk in chunks)
    )


@dataclass(frozen=True, slots=True)
class _Pieces:
    """The columns of one tensor. ``key`` is equal for tensors that are cut alike."""

    key: object
    boxes: Boxes
    files: Ints
    starts: Ints
    nbytes: Ints
    digests: Digests


def _pieces_of(tensor: Tensor) -> _Pieces:
    chunks = tensor.chunks
    if isinstance(chunks, ColumnChunks):
        columns, span = chunks.columns, chunks.span
        files, starts, nbytes = columns.files[span], columns.starts[span], columns.nbytes[span]
        rows = columns.digests[_ranges(columns.first[span], -(-nbytes // columns.block_nbytes))]
        return _Pieces(id(chunks.boxes), chunks.boxes, files, starts, nbytes, rows)
    ordered = sorted(chunks, key=lambda chunk: (chunk.file, chunk.start))
    boxes = [box_of(chunk, tensor) for chunk in ordered]
    offsets, shapes = tuple(offset for offset, _ in boxes), tuple(shape for _, shape in boxes)
    text = "".join(digest for chunk in ordered for digest in chunk.digests)
    return _Pieces(
        key=(offsets, shapes),
        boxes=Boxes(offsets, shapes),
        files=np.array([chunk.file for chunk in ordered], dtype=np.int64),
        starts=np.array([chunk.start for chunk in ordered], dtype=np.int64),
        nbytes=np.array([chunk.nbytes for chunk in ordered], dtype=np.int64),
        digests=np.frombuffer(bytes.fromhex(text), dtype=np.uint8).reshape(-1, _DIGEST_NBYTES),
    )


def _by_file(found: Sequence[_Pieces], block_nbytes: int) -> tuple[tuple[FileLayout, ...], tuple[ShardFile, ...]]:
    owners = np.repeat(np.arange(len(found)), [len(pieces.boxes) for pieces in found])
    files, starts = _joined([one.files for one in found]), _joined([one.starts for one in found])
    blocks = -(-_joined([one.nbytes for one in found]) // block_nbytes)
    order = np.lexsort((starts, files))  # from the order of tensors to that of files
    owners, files, starts = owners[order], files[order], starts[order]
    first, blocks = (np.cumsum(blocks) - blocks)[order], blocks[order]
    digests = np.concatenate([one.digests for one in found])[_ranges(first, blocks)]
    ends = np.cumsum(blocks)
    edges = [0, *(np.flatnonzero(np.diff(files)) + 1).tolist(), len(files)]
    numbers: dict[tuple[bytes, bytes], int] = {}
    layouts: list[FileLayout] = []
    shards: list[ShardFile] = []
    row = 0
    for begin, end in pairwise(edges):
        number = numbers.setdefault((owners[begin:end].tobytes(), starts[begin:end].tobytes()), len(layouts))
        if number == len(layouts):
            layouts.append(
                FileLayout(tensors=tuple(owners[begin:end].tolist()), starts=tuple(starts[begin:end].tolist()))
            )
        last = int(ends[end - 1])
        text = to_base64(digests[row:last].tobytes())
        shards.append(ShardFile(file=int(files[begin]), layout=number, digests=text))
        row = last
    return tuple(layouts), tuple(shards)


def _joined(arrays: Sequence[Ints]) -> Ints:
    return np.concatenate(arrays) if arrays else np.empty(0, dtype=np.int64)


def _ranges(first: Ints, counts: Ints) -> Ints:
    """All numbers from each of *first* on, as many as its of *counts*."""
    stops = np.cumsum(counts)
    total = int(stops[-1]) if len(stops) else 0
    return np.repeat(first - (stops - counts), counts) + np.arange(total)
