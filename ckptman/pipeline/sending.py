"""Sending one file of a checkpoint to another storage: nothing counts there before every byte of it was right here."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field

import xxhash

from ckptman.errors import IntegrityError
from ckptman.format.digest import Hasher, blocks
from ckptman.format.manifest import File, Manifest
from ckptman.repository.reading import Part
from ckptman.storage.base import Buffer, Expects, KeyMissing, NotAFile, Storage, lacking

PIECE_NBYTES = 16 << 20
"""What is read and written at a time, in buffers that begin at a page: what local files like best."""

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
    file that it borrows) have no digest in it, and are copied as they are. While a piece is written the next one is
    read and checked on another thread, so this takes 32 MiB of memory; when it returns or raises nothing is read any
    more.

    Raises:
        IntegrityError: The file differs from its digests, or is missing. Nothing is stored under *key*.
        StorageError: One of both storages failed.
    """
    step = manifest.step
    _check_size(source, file, step)
    checks = _Checks(file, _spans(manifest, file, parts), step)

    def read(start: int, into: memoryview) -> memoryview:
        _read(source, file, start, into, step)
        checks.feed(start, into)
        return into

    with target.open_new(key) as out:
        if isinstance(out, Expects):
            out.expect(file.nbytes)
        with closing(_ahead(read, file.nbytes)) as pieces:
            for piece in pieces:
                out.write(piece)
                progress(len(piece))


def _ahead(read: Callable[[int, memoryview], memoryview], nbytes: int) -> Generator[memoryview, None, None]:
    """Every piece of *nbytes* that *read* has read, in order; each is the caller's until the next one is asked for."""
    starts = [start for start, _ in blocks(nbytes, PIECE_NBYTES)]
    if len(starts) < 2:  # to start a thread takes longer
        yield from (read(start, _pages(nbytes)) for start in starts)
        return
    memory = _pages(PIECE_NBYTES), _pages(PIECE_NBYTES)
    with ThreadPoolExecutor(1, thread_name_prefix="ckptman-copy") as beside:

        def begin(number: int) -> Callable[[], memoryview]:
            start, into = starts[number], memory[number % 2][: nbytes - starts[number]]
            try:
                return beside.submit(read, start, into).result
            except RuntimeError:  # the interpreter waits for this copy before it ends, and starts no thread any more
                piece = read(start, into)
                return lambda: piece

        coming = begin(0)
        for number in range(len(starts)):
            piece = coming()
            if number + 1 < len(starts):
                coming = begin(number + 1)
            yield piece


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
