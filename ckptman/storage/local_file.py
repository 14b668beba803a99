"""A large local file while it is written: straight to its name, durable when ``commit`` returns."""

from __future__ import annotations

import errno
from contextlib import suppress
from io import FileIO
from types import TracebackType
from typing import Self

from ckptman.storage.base import Buffer
from ckptman.storage.failures import reporting
from ckptman.storage.system import System


def write_all(file: FileIO, data: Buffer, *, system: System) -> None:
    """Write every byte of *data*: the system may take fewer at a time."""
    view = memoryview(data)
    while view:
        count = system.write(file, view)
        if count <= 0:
            raise OSError(errno.EIO, "the system took none of the bytes")
        view = view[count:]


class NewLocalFile:
    """
    A `NewFile` on a local filesystem. *name* is how messages call it.

    Nothing is tried twice: a file whose write, fsync or close failed is removed and never counts.
    """

    def __init__(self, path: str, name: str, *, key: str, system: System) -> None:
        self._path = path
        self._name = name
        self._key = key
        self._system = system
        self._file: FileIO | None = system.open_new(path)  # None once committed or aborted

    def write(self, data: Buffer) -> None:
        """Append all of *data*. On `StorageError`, abort."""
        with reporting(f"cannot write {self._name}", self._key):
            write_all(self._open_file(), data, system=self._system)

    def commit(self) -> None:
        """Fsync and close. Where either fails, the file is gone and `StorageError` is raised."""
        file = self._open_file()
        with reporting(f"cannot make {self._name} durable", self._key):
            try:
                self._system.fsync(file)
                self._system.close(file)
            except BaseException:
                self.abort()
                raise
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

    def _open_file(self) -> FileIO:
        if self._file is None:
            raise ValueError(f"{self._name} was committed or aborted already: nothing more can be written to it")
        return self._file
