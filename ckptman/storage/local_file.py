"""A large local file while it is written: straight to its name, durable when ``commit`` returns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from types import TracebackType
from typing import Self

from ckptman.storage.appending import Appender, DiskTraits
from ckptman.storage.base import Buffer
from ckptman.storage.failures import reporting
from ckptman.storage.system import System


class NewLocalFile:
    """
    A `NewFile` on a local filesystem. *name* is how messages call it; *traits* say how its disk likes to be written.

    Nothing is tried twice: a file whose write, fsync or close failed is removed and never counts.

    Fastest if each write but the last is of 16 MiB, or a multiple, in writable private memory that begins at a page,
    better a huge one; `ckptman.storage.appending` says why. Every other write is as right.
    """

    def __init__(self, path: str, name: str, *, key: str, traits: DiskTraits, system: System) -> None:
        self._path = path
        self._name = name
        self._key = key
        self._system = system
        self._file: FileIO | None = system.open_new(path)  # None once committed or aborted
        self._appender = Appender(self._file, traits=traits, system=system)

    def write(self, data: Buffer) -> None:
        """Append all of *data*. Where that fails, the file is gone and `StorageError` is raised."""
        self._open_file()
        with reporting(f"cannot write {self._name}", self._key), self._gone_if_it_fails():
            self._appender.append(memoryview(data))

    def commit(self) -> None:
        """Fsync and close. Where either fails, the file is gone and `StorageError` is raised."""
        file = self._open_file()
        with reporting(f"cannot make {self._name} durable", self._key), self._gone_if_it_fails():
            self._system.fsync(file)
            self._system.close(file)
        self._file = None

    def abort(self) -> None:
        """Close and remove the file. Never raises; does nothing after a commit."""
        file, self._file = self._file, None
        if file is None:
            return
        with suppress(OSError):
            self._system.close(file)
        with suppress(OSError):
            self._system.unlink(self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif self._file is not None:
            self.commit()

    @contextmanager
    def _gone_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.abort()
            raise

    def _open_file(self) -> FileIO:
        if self._file is None:
            raise ValueError(f"{self._name} was committed or aborted already: nothing more can be written to it")
        return self._file
