"""Sending one file of a checkpoint to another storage: nothing counts there before every byte of it was right here."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import xxhash

from ckptman.errors import IntegrityError
from ckptman.format.digest import Hasher, blocks
from ckptman.format.manifest import File, Manifest
from ckptman.repository.reading import Part
from ckptman.storage.base import Buffer, Expects, KeyMissing, NotAFile, Storage, lacking

PIECE_NBYTES = 16 << 20
"""What is read and written at a time, in one buffer that begins at a page: what local files like best."""

Progress = Callable[[int], object]
"""Called with a number of bytes that are dealt with."""


def send(
    source: Storage,
    manifest: Manifest,
    file: File,
    parts: Sequence[Part],
    target: Storage,
    key: str,
    *,
    progress: Progress = lambda nbytes: None,
) -> None:
    """
    Copy *file* of *manifest* from *source* to the new *key* of *target*; *parts* are those of the manifest in it.

    Durable when it returns, but for its name (`Storage.persist`). The header and every part are compared with their
    digests as they pass, so what arrives is what was checked. Bytes of tensors that *manifest* does not name (in a
    file that it borrows) have no digest in it, and are copied as they are. Takes 16 MiB of memory.

    Raises:
        IntegrityError: The file differs from its digests, or is missing. Nothing is stored under *key*.
        StorageError: One of both storages failed.
    """
    step = manifest.step
    _check_size(source, file, step)
    checks = _Checks(file, _spans(manifest, file, parts), step)
    memory = _pages(min(PIECE_NBYTES, file.nbytes))
    with target.open_new(key) as out:
        if isinstance(out, Expects):
            out.expect(file.nbytes)
        for start, stop in blocks(file.nbytes, PIECE_NBYTES):
            piece = memory[: stop - start]
            _read(source, file, start, piece, step)
            checks.feed(start, piece)
            out.write(piece)
            progress(stop - start)


def _pages(nbytes: int) -> memoryview:
    """Memory that begins at a page, and that is freed with its last view."""
    if sys.platform == "win32":
        return memoryview(mmap.mmap(-1, nbytes))
    return memoryview(mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def _check_size(source: Storage, file: File, step: int) -> None:
    try:
        nbytes = source.size(file.path)
    except (KeyMissing, NotAFile) as error:
        raise _damage(file, step, lacking(error)) from error
    if nbytes != file.nbytes:
        raise _damage(file, step, f"has {nbytes} bytes instead of {file.nbytes}")


def _read(source: Storage, file: File, start: int, into: memoryview, step: int) -> None:
    try:
        got = source.read_into(file.path, start, into)
    except (KeyMissing, NotAFile) as error:
        raise _damage(file, step, lacking(error)) from error
    if got != len(into):
        raise _damage(file, step, f"ends at byte {start + got}, before byte {start + len(into)}")


def _damage(file: File, step: int, what: str, tensor: str | None = None) -> IntegrityError:
    return IntegrityError(f"step {step}: {file.path} {what}", step=step, file=file.path, tensor=tensor)


@dataclass(slots=True)
class _Span:
    """Bytes that have one digest, and what was hashed of them so far. ``tensor`` is None for the header."""

    start: int
    stop: int
    digest: str
    tensor: str | None
    hasher: xxhash.xxh3_128 = field(default_factory=Hasher)


def _spans(manifest: Manifest, file: File, parts: Sequence[Part]) -> Iterator[_Span]:
    yield _Span(0, 8 + file.header_nbytes, file.header_digest, None)
    for part in parts:
        first, chunk = part.chunk.start, part.chunk
        for (start, stop), digest in zip(blocks(chunk.nbytes, manifest.block_nbytes), chunk.digests, strict=True):
            yield _Span(first + start, first + stop, digest, part.tensor.name)


class _Checks:
    """Compares a file that passes by, piece after piece, with the digests of its *spans*, sorted by their start."""

    def __init__(self, file: File, spans: Iterator[_Span], step: int) -> None:
        self._file = file
        self._step = step
        self._coming = spans
        self._next = next(spans, None)
        self._begun: list[_Span] = []

    def feed(self, position: int, piece: Buffer) -> None:
        """The bytes from *position* on. Raises `IntegrityError` at the end of a span that is not as it was."""
        end = position + len(piece)
        while self._next is not None and self._next.start < end:
            self._begun.append(self._next)
            self._next = next(self._coming, None)
        view = memoryview(piece)
        for span in self._begun:
            span.hasher.update(view[max(span.start - position, 0) : span.stop - position])
            if span.stop <= end and span.hasher.hexdigest() != span.digest:
                raise self._differs(span)
        self._begun = [span for span in self._begun if span.stop > end]

    def _differs(self, span: _Span) -> IntegrityError:
        if span.tensor is None:
            return _damage(self._file, self._step, "has a damaged header")
        what = f"is damaged: tensor {span.tensor!r}, bytes {span.start} to {span.stop}"
        return _damage(self._file, self._step, what, span.tensor)
