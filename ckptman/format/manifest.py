"""
The manifest: what is in one checkpoint, and where its bytes are. Enough to read it without anything else.

A manifest is a border: `read_manifest` accepts it only if every rule below holds, whether or not the catalog
vouches for its digest, since ``repair`` has nothing but the manifest.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import msgspec

from ckptman.errors import FormatError
from ckptman.format.digest import ALGORITHM, BLOCK_NBYTES
from ckptman.format.dtypes import DTYPES
from ckptman.format.fields import Count, Digest, Utc, are_hex, check_utc
from ckptman.format.metrics import JsonMetrics, check_metrics
from ckptman.format.names import FORMAT, check_attempt, check_data_key, split_rank
from ckptman.format.sealed import seal, unseal
from ckptman.format.sharded import Sharded, ShardedTensor
from ckptman.format.tiling import Box, tiles
from ckptman.storage.base import Buffer

MAX_MANIFEST_NBYTES = 1 << 30
MAX_NDIM = 64
MAX_FILE_NBYTES = 1 << 62
MAX_HEADER_NBYTES = 100_000_000
"""What the safetensors library accepts: room for about 500,000 tensors in one file."""


class File(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, gc=False):
    """
    One safetensors file. ``path`` is relative to the root and may belong to an older attempt (borrowed).

    ``header_nbytes`` is the length of the JSON, without the 8 bytes before it that say so; ``header_digest`` is one
    digest of both, however long they are.
    """

    path: str
    nbytes: Count
    header_nbytes: Count
    header_digest: Digest


class Chunk(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """
    A stored box of a tensor: ``nbytes`` bytes from byte ``start`` of file number ``file``, row-major.

    ``offset`` and ``shape`` place the box in the tensor; both are left out for a chunk that is the whole tensor.
    ``key`` is its key in the safetensors header where that is not the tensor's name without its component.
    """

    file: Count
    start: Count
    nbytes: Count
    digests: tuple[str, ...]  # each as a `Digest`: found out of all chunks at once
    offset: tuple[Count, ...] | None = None
    shape: tuple[Count, ...] | None = None
    key: str | None = None


class ManyChunks(Sequence[Chunk]):
    """The chunks of a tensor in many pieces: made when one is asked for, since most never are."""

    __slots__ = ()

    @abstractmethod
    def touching(self, wanted: Iterable[Box]) -> Iterator[Chunk]:
        """Those that share an element with one of the boxes *wanted*."""

    @abstractmethod
    def at(self, offset: tuple[int, ...]) -> Chunk | None:
        """The one that begins at *offset* of the tensor."""

    @abstractmethod
    def files(self) -> list[int]:
        """The numbers of the files in which they lie, each once."""

    @abstractmethod
    def nbytes_in(self, files: Collection[int]) -> int:
        """Bytes of those that lie in *files*."""


if TYPE_CHECKING:
    Chunks = Sequence[Chunk]
else:
    Chunks = tuple[Chunk, ...]  # what lists them one by one is decoded as such; `ManyChunks` never is


class Tensor(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True, gc=False):
    """A tensor: ``name`` is ``<component>/<name in it>``, ``shape`` the global shape."""

    name: str
    dtype: str
    shape: tuple[Count, ...]
    chunks: Chunks

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def files(self) -> list[int]:
        """The numbers of the files in which its chunks lie, each once."""
        if isinstance(self.chunks, ManyChunks):
            return self.chunks.files()
        return list(dict.fromkeys(chunk.file for chunk in self.chunks))


class Component(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """``kind`` says how the component was captured, ``values`` is its typed JSON (format/values.py)."""

    kind: str
    values: msgspec.Raw


class Manifest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """
    One checkpoint. ``after`` is the number of the catalog record that it was written on top of: it orders
    checkpoints by commit when the catalog is lost. ``sharded`` is only in the document: `read_manifest` puts its
    tensors behind the others of ``tensors``, and `write_manifest` takes them from there.
    """

    format: int = FORMAT
    root: str
    step: Count
    attempt: str
    after: Count
    created_at: Utc
    world_size: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    metrics: JsonMetrics
    preempted: bool
    digest: str = ALGORITHM
    block_nbytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)] = BLOCK_NBYTES
    components: dict[str, Component]
    files: tuple[File, ...]
    tensors: tuple[Tensor, ...]
    aliases: dict[str, str]
    environment: dict[str, str]
    sharded: Sharded | msgspec.UnsetType = msgspec.UNSET

    @property
    def shared_components(self) -> tuple[str, ...]:
        """The names of the state's components, without what single ranks have of their own."""
        return tuple(name for name in self.components if not split_rank(name)[1])

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, borrowed ones included."""
        return _nbytes_in(self.tensors, range(len(self.files)))  # their chunks have all of them

    @property
    def new_nbytes(self) -> int:
        """Bytes of the chunks in this attempt's own files."""
        own = {index for index, file in enumerate(self.files) if file.path.startswith(f"{self.attempt}/")}
        return self.nbytes if len(own) == len(self.files) else _nbytes_in(self.tensors, own)

    @property
    def borrows(self) -> tuple[str, ...]:
        """The keys of files that belong to other attempts."""
        return tuple(sorted(file.path for file in self.files if not file.path.startswith(f"{self.attempt}/")))


def _nbytes_in(tensors: Sequence[Tensor], files: Collection[int]) -> int:
    """Bytes of the chunks of *tensors* that lie in *files*."""
    few: list[Chunks] = [tensor.chunks for tensor in tensors if isinstance(tensor.chunks, tuple)]
    # whether a class is of an abstract one takes long: asked only where there may be one
    every = tensors if len(few) < len(tensors) else ()
    many = [tensor.chunks for tensor in every if isinstance(tensor.chunks, ManyChunks)]
    listed = [chunk.nbytes for chunks in few for chunk in chunks if chunk.file in files]
    return sum(listed) + sum(chunks.nbytes_in(files) for chunks in many)


def write_manifest(manifest: Manifest) -> bytes:
    """The bytes of ``manifest.json``. Reads them again: what cannot be read is never written. Raises FormatError."""
    data = seal(_packed(manifest))
    read_manifest(data, manifest.attempt)
    return data


def read_manifest(data: Buffer, attempt: str) -> Manifest:
    """
    The manifest in *data*, which was found in the folder *attempt*.

    Raises:
        Torn: The bytes differ from what was written.
        FormatError: A rule of the format is broken, the format is newer, or it belongs to another attempt.
    """
    what = f"{attempt}/manifest.json"
    manifest = _checked(unseal(data, Manifest, what), what)
    if manifest.attempt != attempt:
        raise FormatError(f"{what} belongs to the attempt {manifest.attempt}: was the folder renamed?")
    return manifest


def _packed(manifest: Manifest) -> Manifest:
    """*manifest* as its document has it."""
    if all(len(tensor.chunks) == 1 for tensor in manifest.tensors):
        return manifest
    from ckptman.format.columns import pack  # NumPy is slow to import, and most checkpoints need none

    listed, sharded = pack(manifest.tensors, manifest.block_nbytes)
    return msgspec.structs.replace(manifest, tensors=tuple(listed), sharded=sharded or msgspec.UNSET)


def _checked(manifest: Manifest, what: str) -> Manifest:
    """*manifest* as its document has it, with all its tensors in one list."""
    try:
        _check_head(manifest)
        for file in manifest.files:
            _check_file(file)
        _check_unique("file", [file.path.lower() for file in manifest.files])
        _check_unique("component", [name.lower() for name in manifest.components])
        known: set[str] = set()  # what tensors belong to
        _check_digests(manifest)
        for tensor in _unusual(manifest):
            _check_tensor(tensor, manifest, known)
        manifest = _expanded(manifest, known)
        names = _check_unique("tensor", [tensor.name for tensor in manifest.tensors])
        for alias, name in manifest.aliases.items():
            if alias in names or name not in names:
                raise FormatError(f"alias {alias!r} of {name!r}: the one must be no tensor, the other must be one")
            _check_tensor_name(alias, manifest, known)
    except ValueError as error:  # FormatError is one
        raise FormatError(f"{what} breaks the format: {error}") from error
    return manifest


def _expanded(manifest: Manifest, known: set[str]) -> Manifest:
    if manifest.sharded is msgspec.UNSET:
        return manifest
    from ckptman.format.columns import expand  # as above

    for tensor in manifest.sharded.tensors:
        _check_kind(tensor, manifest, known)
    tensors = expand(manifest.sharded, manifest.files, manifest.block_nbytes)
    return msgspec.structs.replace(manifest, tensors=(*manifest.tensors, *tensors), sharded=msgspec.UNSET)


def _check_head(manifest: Manifest) -> None:
    attempt = check_attempt(manifest.attempt)
    if attempt.step != manifest.step:
        raise FormatError(f"it says step {manifest.step} but lies in an attempt at step {attempt.step}")
    if manifest.digest != ALGORITHM:
        raise FormatError(f"digest {manifest.digest!r} is not known here, only {ALGORITHM!r}")
    check_utc(manifest.created_at)
    check_metrics(manifest.metrics)
    for name in manifest.components:
        split_rank(name)
        if not _is_of_a_rank(name, manifest):
            raise FormatError(f"component {name!r} is of a rank that did not save, or of none of this checkpoint's own")


def _check_file(file: File) -> None:
    check_data_key(file.path)
    if not 8 + file.header_nbytes <= file.nbytes <= MAX_FILE_NBYTES or file.header_nbytes > MAX_HEADER_NBYTES:
        raise FormatError(f"{file.path!r} cannot have {file.nbytes} bytes with a header of {file.header_nbytes}")


def _check_tensor_name(name: str, manifest: Manifest, known: set[str]) -> None:
    component, _, rest = name.partition("/")
    if component not in known and (component in manifest.components or _is_of_a_rank(component, manifest)):
        known.add(component)
    if not rest or component not in known:
        raise FormatError(f"tensor {name!r} belongs to no component of this checkpoint")


def _is_of_a_rank(part: str, manifest: Manifest) -> bool:
    """Whether *part* is what a rank calls its own part of a component."""
    component, rank = split_rank(part)
    return component in manifest.components and rank < manifest.world_size


def _check_kind(tensor: Tensor | ShardedTensor, manifest: Manifest, known: set[str]) -> None:
    _check_tensor_name(tensor.name, manifest, known)
    if tensor.dtype not in DTYPES:
        raise FormatError(f"tensor {tensor.name!r} has the unknown dtype {tensor.dtype!r}")
    if len(tensor.shape) > MAX_NDIM:
        raise FormatError(f"tensor {tensor.name!r} has {len(tensor.shape)} dimensions")


def _check_digests(manifest: Manifest) -> None:
    digests = [digest for tensor in manifest.tensors for chunk in tensor.chunks for digest in chunk.digests]
    if not are_hex(digests, 32):
        wrong = next(digest for digest in digests if not are_hex([digest], 32))
        raise FormatError(f"{wrong[:80]!r} is not the digest of a block")


def _unusual(manifest: Manifest) -> Iterator[Tensor]:
    """
    The tensors of which `_check_tensor` is to be asked: all but those that are whole, in one piece where it may be, and
    of a dtype and shape that came before. Of very many, these are nearly all.
    """
    spans = [(8 + file.header_nbytes, file.nbytes) for file in manifest.files]
    sizes: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}  # bytes and blocks of a dtype and shape
    components, count = manifest.components, len(spans)
    for tensor in manifest.tensors:
        component, _, rest = tensor.name.partition("/")
        kind = tensor.dtype, tensor.shape
        size = sizes.get(kind)
        if size is not None and len(tensor.chunks) == 1 and rest and component in components:
            chunk = tensor.chunks[0]
            if chunk.offset is None and chunk.shape is None and chunk.file < count:
                start, stop = spans[chunk.file]
                nbytes = chunk.nbytes
                if (nbytes, len(chunk.digests)) == size and start <= chunk.start <= stop - nbytes:
                    continue
        yield tensor
        nbytes = tensor.nbytes  # of a dtype that is known: else whoever was given the tensor has raised
        sizes[kind] = nbytes, -(-nbytes // manifest.block_nbytes)


def _check_tensor(tensor: Tensor, manifest: Manifest, known: set[str]) -> None:
    _check_kind(tensor, manifest, known)
    nbytes = tensor.nbytes
    if len(tensor.chunks) == 1:
        (chunk,) = tensor.chunks
        if chunk.offset is None and chunk.shape is None:
            _check_place(chunk, nbytes, tensor, manifest)  # a whole in one piece, as most are
            return
    stored = 0
    for chunk in tensor.chunks:
        _check_chunk(chunk, tensor, manifest)
        stored += chunk.nbytes
    if stored != nbytes:
        raise FormatError(f"tensor {tensor.name!r} needs {nbytes} bytes, its chunks have {stored}")
    boxes = [box_of(chunk, tensor) for chunk in tensor.chunks if chunk.nbytes]
    if len(boxes) > 1 and not tiles(boxes, tensor.shape):
        raise FormatError(f"chunks of {tensor.name!r} overlap, and leave a part of it out")


def _check_chunk(chunk: Chunk, tensor: Tensor, manifest: Manifest) -> None:
    offset, shape = box_of(chunk, tensor)
    if len(offset) != len(tensor.shape) or len(shape) != len(tensor.shape):
        raise FormatError(f"a chunk of {tensor.name!r} has another number of dimensions than the tensor")
    if any(start + size > whole for start, size, whole in zip(offset, shape, tensor.shape, strict=True)):
        raise FormatError(f"a chunk of {tensor.name!r} reaches beyond the tensor")
    _check_place(chunk, math.prod(shape) * DTYPES[tensor.dtype].itemsize, tensor, manifest)


def _check_place(chunk: Chunk, nbytes: int, tensor: Tensor, manifest: Manifest) -> None:
    """Check that *chunk* has *nbytes* bytes within the data of its file, and a digest for each block of them."""
    if chunk.nbytes != nbytes:
        raise FormatError(f"a chunk of {tensor.name!r} has {chunk.nbytes} bytes, which is not its shape's size")
    if chunk.file >= len(manifest.files):
        raise FormatError(f"a chunk of {tensor.name!r} lies in a file that is not listed")
    file = manifest.files[chunk.file]
    if chunk.start < 8 + file.header_nbytes or chunk.start + chunk.nbytes > file.nbytes:
        raise FormatError(f"a chunk of {tensor.name!r} lies outside of the data of {file.path!r}")
    if len(chunk.digests) != -(-chunk.nbytes // manifest.block_nbytes):
        raise FormatError(f"a chunk of {tensor.name!r} has {len(chunk.digests)} digests for {chunk.nbytes} bytes")


def _check_unique(what: str, names: Iterable[str]) -> frozenset[str]:
    every = list(names)
    unique = frozenset(every)
    if len(unique) < len(every):
        twice = next(name for name, count in Counter(every).items() if count > 1)
        raise FormatError(f"the {what} {twice!r} is listed twice")
    return unique


def box_of(chunk: Chunk, tensor: Tensor) -> Box:
    """Where *chunk* lies within *tensor*."""
    offset = (0,) * len(tensor.shape) if chunk.offset is None else chunk.offset
    return offset, tensor.shape if chunk.shape is None else chunk.shape
