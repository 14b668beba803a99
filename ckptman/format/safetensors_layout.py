"""
The image of a safetensors file, computed before a byte moves: where each tensor will lie, and the header that says so.

Files are plain safetensors, which any tool can read. Within that format, ckptman's files promise more: the data begins
at a multiple of 64 bytes, tensors lie in descending order of their item size and so all aligned, and a type that
safetensors cannot hold lies there as its raw bytes (``U8``). What the header must say follows from the manifest alone,
so `check_header` can compare the two.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from ckptman.errors import FormatError
from ckptman.format.digest import block_digest
from ckptman.format.dtypes import DTYPES
from ckptman.format.manifest import MAX_HEADER_NBYTES, MAX_NDIM, Chunk, File, Manifest, Tensor, box_of
from ckptman.format.names import MAX_STEP
from ckptman.format.strict_json import is_plain_text, parse

ALIGNMENT = 64

_METADATA = "__metadata__"
FOREIGN = {
    "C64": "complex64",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
}
"""Types that files of others may hold, and torch's names of them: newer than the oldest safetensors that reads ours."""

_ITEMSIZES = {dtype.safetensors: dtype.itemsize for dtype in DTYPES.values() if dtype.safetensors is not None} | {
    name: DTYPES[dtype].itemsize for name, dtype in FOREIGN.items()
}

Span = tuple[str, tuple[int, ...], int, int]
"""What a header says of one key: safetensors' dtype, shape, first byte and end, counted from the start of the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A tensor, or a box of one, that is to be in a file. ``dtype`` is torch's name of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Where it will be: ``nbytes`` bytes from byte ``start`` of the file on, under ``key`` in the header."""

    key: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """
    A whole file.

    Attributes:
        header: Everything before the data: the length of the JSON in 8 bytes, the JSON, spaces up to the alignment.
        tensors: In the order of their bytes, without holes.
        nbytes: Size of the file.
    """

    header: bytes
    tensors: tuple[Placed, ...]
    nbytes: int

    def file(self, path: str) -> File:
        """How the manifest describes the file once it lies at *path*."""
        return File(
            path=path, nbytes=self.nbytes, header_nbytes=len(self.header) - 8, header_digest=block_digest(self.header)
        )


def lay_out(tensors: Sequence[Wanted]) -> Layout:
    """
    Place *tensors* in one file.

    Deterministic: the same tensors in the same order give the same bytes. Two of one name get different keys.

    Raises:
        FormatError: A dtype is unknown, or the header would be larger than safetensors accepts.
    """
    keys = _keys([tensor.name for tensor in tensors])
    order = sorted(range(len(tensors)), key=lambda index: -_itemsize(tensors[index].dtype))
    fields: dict[str, object] = {_METADATA: {"format": "pt"}}
    starts: list[tuple[int, int, int]] = []
    stop = 0
    for index in order:
        start, stop = stop, stop + _nbytes(tensors[index])
        dtype, shape = native(tensors[index].dtype, tensors[index].shape)
        fields[keys[index]] = {"dtype": dtype, "shape": shape, "data_offsets": (start, stop)}
        starts.append((index, start, stop - start))
    header = _header(fields)
    placed = (_placed(tensors[index], keys[index], len(header) + start, nbytes) for index, start, nbytes in starts)
    return Layout(header=header, tensors=tuple(placed), nbytes=len(header) + stop)


def native(dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """How a safetensors header calls a tensor of *dtype* and *shape*: as it is, or as so many bytes (``U8``)."""
    safetensors = DTYPES[dtype].safetensors
    if safetensors is None:
        return "U8", (math.prod(shape) * DTYPES[dtype].itemsize,)
    return safetensors, shape


def header_key(name: str, taken: Container[str] = ()) -> str:
    """The key for a tensor called *name*: the name, with ``~`` behind it where that is taken or means metadata."""
    key = name
    while key == _METADATA or key in taken:
        key += "~"
    return key


def read_header(header: bytes, file_nbytes: int) -> dict[str, Span]:
    """
    What *header*, the bytes before the data of a file of *file_nbytes* bytes, says of each key.

    Stricter than the safetensors library: no key twice, no unknown field, no hole, no overlap, nothing beyond the
    end.

    Raises:
        FormatError: It breaks one of these rules.
    """
    if not 8 <= len(header) <= min(file_nbytes, 8 + MAX_HEADER_NBYTES):
        raise FormatError(f"a safetensors header of {len(header)} bytes in a file of {file_nbytes} is impossible")
    (length,) = struct.unpack_from("<Q", header)
    if length != len(header) - 8:
        raise FormatError(f"a safetensors header says that it has {length} bytes, but has {len(header) - 8}")
    tree = parse(header[8:])
    spans = {key: _span(key, entry, len(header)) for key, entry in _distinct(tree).items() if key != _METADATA}
    _check_packed(spans, len(header), file_nbytes)
    return spans


def check_header(header: bytes, file: File, held: Iterable[tuple[Tensor, Chunk]], manifest: Manifest) -> list[str]:
    """
    Compare the header of *file* with what *manifest* says: that it holds the chunks *held*.

    Keys, dtypes, shapes and byte ranges must be exactly the same. A borrowed file may hold more keys than the
    manifest needs, since the attempt that it belongs to needs them.

    Returns:
        Every difference, one sentence each; empty if there is none.
    """
    try:
        found = read_header(header, file.nbytes)
    except FormatError as error:
        return [str(error)]
    differences = []
    claimed = set()
    for tensor, chunk in held:
        key = chunk_key(chunk, tensor)
        claimed.add(key)
        if found.get(key) != (claim := _claim(chunk, tensor)):
            differences.append(f"{key!r}: the manifest says {claim}, the header {found.get(key, 'nothing')}")
    if file.path.startswith(f"{manifest.attempt}/"):
        differences += [f"{key!r} is in the header, but not in the manifest" for key in found if key not in claimed]
    return differences


def chunk_key(chunk: Chunk, tensor: Tensor) -> str:
    """The key of *chunk* in the header of its file."""
    return tensor.name.partition("/")[2] if chunk.key is None else chunk.key


def _claim(chunk: Chunk, tensor: Tensor) -> Span:
    return *native(tensor.dtype, box_of(chunk, tensor)[1]), chunk.start, chunk.start + chunk.nbytes


def _keys(names: list[str]) -> list[str]:
    """A key for each of *names*; the first of each name keeps it, whatever the others need."""
    counts = Counter(names)
    if len(counts) == len(names) and _METADATA not in counts:
        return names
    taken = set(names)
    keys = []
    for name in names:
        first = counts.pop(name, 0) > 0 and name != _METADATA
        keys.append(name if first else header_key(name, taken))
        taken.add(keys[-1])
    return keys


def _itemsize(dtype: str) -> int:
    if dtype not in DTYPES:
        raise FormatError(f"the dtype {dtype!r} is not known to the format")
    return DTYPES[dtype].itemsize


def _nbytes(tensor: Wanted) -> int:
    return math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize


def _placed(tensor: Wanted, key: str, start: int, nbytes: int) -> Placed:
    return Placed(key=key, name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, start=start, nbytes=nbytes)


def _header(fields: dict[str, object]) -> bytes:
    text = msgspec.json.encode(fields)
    nbytes = -(-(8 + len(text)) // ALIGNMENT) * ALIGNMENT
    if nbytes > MAX_HEADER_NBYTES:
        raise FormatError(f"{len(fields)} tensors are too many for one safetensors file: split the component")
    return struct.pack("<Q", nbytes - 8) + text.ljust(nbytes - 8)


def _distinct(pairs: object) -> dict[str, object]:
    """An object of the JSON, which the parser gave as a tuple of pairs."""
    if type(pairs) is not tuple:
        raise FormatError(f"{pairs!r:.80} is not a JSON object")
    result: dict[str, object] = dict(pairs)
    if len(result) != len(pairs):
        raise FormatError("a safetensors header has a key twice")
    if not all(map(is_plain_text, result)):
        raise FormatError("a safetensors header has a key that is not valid Unicode")
    return result


def _span(key: str, entry: object, data: int) -> Span:
    fields = _distinct(entry)
    if fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{key!r:.80} has other fields than dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], _counts(fields["shape"]), _counts(fields["data_offsets"])
    if type(dtype) is not str or dtype not in _ITEMSIZES:
        raise FormatError(f"{key!r:.80} has the unknown dtype {dtype!r:.80}")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _ITEMSIZES[dtype]:
        raise FormatError(f"{key!r:.80} has offsets that do not fit its shape: {offsets!r:.80}")
    return dtype, shape, data + offsets[0], data + offsets[1]


def _counts(node: object) -> tuple[int, ...]:
    if type(node) is list and len(node) <= MAX_NDIM and all(type(n) is int and 0 <= n <= MAX_STEP for n in node):
        return tuple(node)
    raise FormatError(f"{node!r:.80} is not a list of sizes")


def _check_packed(spans: dict[str, Span], data: int, file_nbytes: int) -> None:
    stop = data
    for start, end in sorted((start, end) for _, _, start, end in spans.values()):
        if start != stop:
            raise FormatError(f"the data has a hole or an overlap at byte {min(start, stop)}")
        stop = end
    if stop != file_nbytes:
        raise FormatError(f"the data should end at byte {stop}, but the file has {file_nbytes} bytes")
