"""
The disk reads what a restore will ask for, while it is still being compared with the live state.

Comparing takes a core and leaves the disk idle, as long as some tens of megabytes take to be read. Nothing is read
into this process: the system is told what comes, and keeps it in its page cache. Every byte is read and checked by
`ckptman.pipeline.reading` as if nobody had been told.

For a process alone: of several ranks each wants another part of the files, which is known once it has compared.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

from ckptman.errors import StorageError
from ckptman.format.manifest import Manifest
from ckptman.repository.reading import GAP_NBYTES
from ckptman.storage.base import ReadsAhead, Storage

AHEAD_NBYTES = 256 << 20
"""At most so much is asked for: what memory the system has for its cache is needed by others too."""

STEP_NBYTES = 8 << 20
"""What is asked for before looking whether the restore has caught up."""


@contextmanager
def reading_ahead(storage: Storage, manifest: Manifest, only: Collection[str] | None) -> Iterator[None]:
    """
    Have the system fetch the tensors of the components *only* (None: all) during the block, in the order of the files.

    Stops at the end of the block, or after 256 MiB; what was asked for by then still comes. Never raises: what fails
    here fails again for whoever reads, and is reported there. Does nothing for storages that cannot be told.
    """
    if not isinstance(storage, ReadsAhead):
        yield
        return
    is_over = threading.Event()
    teller = threading.Thread(target=_tell, args=(storage, manifest, only, is_over), name="ckptman-ahead")
    try:
        with suppress(RuntimeError):  # no memory for one more thread, or the interpreter ends: it is only faster with
            teller.start()
        yield
    finally:
        is_over.set()
        if teller.ident is not None:
            teller.join()


def _tell(storage: ReadsAhead, manifest: Manifest, only: Collection[str] | None, is_over: threading.Event) -> None:
    left = AHEAD_NBYTES
    with suppress(StorageError):
        for file, first, last in _runs(manifest, only):
            stop = min(last, first + left)
            for start in range(first, stop, STEP_NBYTES):
                if is_over.is_set():
                    return
                storage.read_ahead(manifest.files[file].path, start, min(STEP_NBYTES, stop - start))
            left -= stop - first


def _runs(manifest: Manifest, only: Collection[str] | None) -> Iterator[tuple[int, int, int]]:
    """What lies together of the wanted tensors: file, first byte, end. In the order in which they are listed."""
    file, first, stop = -1, 0, 0
    for tensor in manifest.tensors:
        if only is None or tensor.name.partition("/")[0] in only:
            for chunk in tensor.chunks:
                if chunk.file != file or not 0 <= chunk.start - stop <= GAP_NBYTES:
                    if stop > first:
                        yield file, first, stop
                    file, first = chunk.file, chunk.start
                stop = chunk.start + chunk.nbytes
    if stop > first:
        yield file, first, stop
