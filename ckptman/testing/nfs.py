"""
A system that behaves as a client of an NFS server does, where that differs from a local disk.

    a, b = LocalStorage(root, system=NfsClient()), LocalStorage(root, system=NfsClient())

Each client has a memory of its own; the server is the real filesystem below. The model is coarser than a kernel, and
always on the bad side of what was measured on one: what may be stale for seconds is stale for ever here.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Collection
from io import FileIO
from typing import Literal, NoReturn, TypeVar

from ckptman.storage.system import SYSTEM, System

Result = TypeVar("Result")

Lossy = Literal["link", "mkdir", "unlink", "rmdir"]
LOSSY: tuple[Lossy, ...] = ("link", "mkdir", "unlink", "rmdir")


class NfsClient(System):
    """
    A client's view of the server *inner*. Safe to use from several threads.

    - A name that was looked up and was not there stays missing, whoever makes it, until its folder is listed, or this
      client makes it itself.
    - A file that was removed on the server gives ``ESTALE`` to whoever has it open.
    - With *room*, the server takes so many more bytes, and the client finds out only at *full_at*.
    - The answer to each call in *loses* is lost, and the call sent again: ``link`` finds its own name taken, and
      ``unlink`` nothing to remove.

    Attributes:
        is_stale: While True, the server knows none of its file handles any more: every look is ``ESTALE``.
    """

    def __init__(
        self,
        *,
        room: int | None = None,
        full_at: Literal["fsync", "close"] = "fsync",
        loses: Collection[Lossy] = (),
        inner: System = SYSTEM,
    ) -> None:
        self.is_stale = False
        self._room = room
        self._full_at = full_at
        self._loses = loses
        self._inner = inner
        self._lock = threading.Lock()  # guards the two below, and makes a look and what is remembered of it one
        self._missing: set[str] = set()
        self._written: dict[str, int] = {}  # bytes that the client took, by path, as long as the file is there

    @property
    def free_nbytes(self) -> int | None:
        """What is left of *room*; less than nothing once the client has taken too much."""
        with self._lock:
            return None if self._room is None else self._room - sum(self._written.values())

    # looking

    def lstat(self, path: str) -> os.stat_result:
        return self._look(path, lambda: self._inner.lstat(path))

    def open_read(self, path: str) -> FileIO:
        return self._look(path, lambda: self._inner.open_read(path))

    def scan(self, path: str) -> list[os.DirEntry[str]]:
        entries = self._look(path, lambda: self._inner.scan(path))
        with self._lock:
            self._missing = {name for name in self._missing if os.path.dirname(name) != path}  # noqa: PTH120
        return entries

    def read_into(self, file: FileIO, start: int, into: memoryview) -> int:
        self._refuse_stale(file)
        return self._inner.read_into(file, start, into)

    def read_ahead(self, file: FileIO, start: int, nbytes: int) -> None:
        self._refuse_stale(file)
        self._inner.read_ahead(file, start, nbytes)

    def fstat(self, file: FileIO) -> os.stat_result:
        self._refuse_stale(file)
        return self._inner.fstat(file)

    # changing

    def open_new(self, path: str) -> FileIO:
        file = self._ask(path, lambda: self._inner.open_new(path))
        with self._lock:
            self._written[path] = 0
        return file

    def write(self, file: FileIO, data: memoryview) -> int:
        return self._took(file, self._inner.write(file, data))

    def write_direct(self, file: FileIO, data: memoryview) -> int:
        return self._took(file, self._inner.write_direct(file, data))

    def fsync(self, file: FileIO) -> None:
        self._refuse_full("fsync")
        self._inner.fsync(file)

    def close(self, file: FileIO) -> None:
        self._inner.close(file)
        self._refuse_full("close")

    def link(self, source: str, target: str) -> None:
        self._change("link", target, lambda: self._inner.link(source, target))

    def mkdir(self, path: str) -> None:
        self._change("mkdir", path, lambda: self._inner.mkdir(path))

    def unlink(self, path: str) -> None:
        self._change("unlink", path, lambda: self._inner.unlink(path))
        with self._lock:
            self._written.pop(path, None)

    def rmdir(self, path: str) -> None:
        self._change("rmdir", path, lambda: self._inner.rmdir(path))

    # the client's memory

    def _look(self, path: str, look: Callable[[], Result]) -> Result:
        if self.is_stale:
            _raise(errno.ESTALE)
        with self._lock:
            self._walk(path)
            if path in self._missing:
                _raise(errno.ENOENT)
            try:
                return look()
            except FileNotFoundError:
                self._missing.add(_first_missing(path))
                raise

    def _walk(self, path: str) -> None:
        """Whatever is done to *path*, the client finds its folders first."""
        if any(_is_below(path, name) for name in self._missing):
            _raise(errno.ENOENT)

    def _ask(self, path: str, change: Callable[[], Result]) -> Result:
        """Where something changes the server is asked, whatever the client remembers of *path* itself."""
        with self._lock:
            self._walk(path)
            self._missing.discard(path)
            return change()

    def _change(self, name: Lossy, path: str, change: Callable[[], None]) -> None:
        """An answer that was lost is asked for again."""
        self._ask(path, change)
        if name in self._loses:
            change()

    def _refuse_stale(self, file: FileIO) -> None:
        if self.is_stale or self._inner.fstat(file).st_nlink == 0:
            _raise(errno.ESTALE)

    def _took(self, file: FileIO, nbytes: int) -> int:
        with self._lock:
            path = str(file.name)
            self._written[path] = self._written.get(path, 0) + nbytes
        return nbytes

    def _refuse_full(self, moment: str) -> None:
        free_nbytes = self.free_nbytes
        if moment == self._full_at and free_nbytes is not None and free_nbytes < 0:
            _raise(errno.ENOSPC)


def _raise(number: int) -> NoReturn:
    raise OSError(number, os.strerror(number))


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(f"{folder}{os.sep}")


def _first_missing(path: str) -> str:
    """The name that the client found missing: of the folders on the way, the first."""
    parent = os.path.dirname(path)  # noqa: PTH120
    return path if parent == path or os.path.lexists(parent) else _first_missing(parent)
