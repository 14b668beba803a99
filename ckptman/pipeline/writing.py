"""Writing the files of an attempt: large tensors straight from their memory, small ones together, digests beside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ckptman.format.digest import digests
from ckptman.format.manifest import Chunk, File, Tensor
from ckptman.format.names import data_key
from ckptman.format.safetensors_layout import Placed
from ckptman.pipeline.staging import Staged
from ckptman.storage.base import NewFile, Storage

TOGETHER_NBYTES = 1 << 20
"""Tensors below this size are gathered and written together, about this many bytes at a time."""


def write_files(storage: Storage, attempt: str, staged: Sequence[Staged]) -> tuple[list[File], list[Tensor]]:
    """
    Write every file under new names; return how the manifest describes them and their tensors.

    All bytes are durable when this returns; the files' names are not before ``persist``.

    Raises:
        StorageError: The medium failed. What was written is garbage.
    """
    files: list[File] = []
    tensors: list[Tensor] = []
    with ThreadPoolExecutor(1, thread_name_prefix="ckptman-digest") as beside:
        for one in staged:
            path = data_key(attempt, one.component)
            with storage.open_new(path) as out:
                written = _write_file(out, one, beside)
            files.append(one.layout.file(path))
            tensors += [_described(one.component, placed, sums, len(files) - 1) for placed, sums in written]
    return files, tensors


def _write_file(out: NewFile, staged: Staged, beside: ThreadPoolExecutor) -> list[tuple[Placed, tuple[str, ...]]]:
    written: list[tuple[Placed, tuple[str, ...]]] = []
    together = bytearray(staged.layout.header)
    for placed in staged.layout.tensors:
        data = staged.bytes_of(placed)
        if placed.nbytes < TOGETHER_NBYTES:
            together += data
            written.append((placed, digests(data)))
            if len(together) >= TOGETHER_NBYTES:
                out.write(together)
                together = bytearray()
            continue
        if together:
            out.write(together)
            together = bytearray()
        sums = _digests_beside(beside, data)
        out.write(data)
        written.append((placed, sums()))
    out.write(together)
    return written


def _digests_beside(beside: ThreadPoolExecutor, data: memoryview) -> Callable[[], tuple[str, ...]]:
    try:
        return beside.submit(digests, data).result
    except RuntimeError:  # the interpreter waits for this last save before it exits, and starts no thread any more
        sums = digests(data)
        return lambda: sums


def _described(component: str, placed: Placed, sums: tuple[str, ...], file: int) -> Tensor:
    key = placed.key if placed.key != placed.name else None
    chunk = Chunk(file=file, start=placed.start, nbytes=placed.nbytes, digests=sums, key=key)
    return Tensor(name=f"{component}/{placed.name}", dtype=placed.dtype, shape=placed.shape, chunks=(chunk,))
