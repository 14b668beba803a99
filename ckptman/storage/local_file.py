"""A large local file while it is written: straight to its name, durable when ``commit`` returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO

from ckptman.storage.appending import Appender, DiskTraits
from ckptman.storage.base import Buffer
from ckptman.storage.ending import Ending
from ckptman.storage.failures import reporting
from ckptman.storage.system import System


class NewLocalFile(Ending[FileIO]):
    """
    A `NewFile` on a local filesystem. *name* is how messages call it; *traits* say how its disk likes to be written.

    Nothing is tried twice: a file whose write, fsync or close failed is removed and never counts.

    Fastest if each write but the last is of 16 MiB, or a multiple, in writable private memory that begins at a page,
    better a huge one; `ckptman.storage.appending` says why. Every other write is as right.
    """

    def __init__(self, path: str, name: str, *, key: str, traits: DiskTraits, system: System) -> None:
        file = system.open_new(path)
        super().__init__(name, file)
        self._path = path
        self._key = key
        self._system = system
        self._appender = Appender(file, traits=traits, system=system)

    def write(self, data: Buffer) -> None:
        """Append all of *data*. Where that fails, the file is gone and `StorageError` is raised."""
        self._still()
        with reporting(f"cannot write {self._name}", self._key), self._gone_if_it_fails():
            self._appender.append(memoryview(data))

    def commit(self) -> None:
        """Fsync and close. Where either fails, the file is gone and `StorageError` is raised."""
        file = self._still()
        with reporting(f"cannot make {self._name} durable", self._key), self._gone_if_it_fails():
            self._system.fsync(file)
            self._system.close(file)
        self._held = None

    def abort(self) -> None:
        """Close and remove the file. Never raises; does nothing after a commit."""
        file, self._held = self._held, None
        if file is None:
            return
        with suppress(OSError):
            self._system.close(file)
        with suppress(OSError):
            self._system.unlink(self._path)

    @contextmanager
    def _gone_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.abort()
            raise
