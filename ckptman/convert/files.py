"""Foreign files, opened for reading by position, and windows of bytes in them."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import torch

from ckptman.errors import FormatError, StorageError
from ckptman.state.tensors import as_bytes


class Bytes(Protocol):
    """Bytes that are read when they are asked for."""

    @property
    def nbytes(self) -> int:
        """How many."""

    def read_into(self, start: int, into: memoryview) -> None:
        """Fill *into* with the bytes from *start* on. Raises FormatError where the file ends before."""


class Window:
    """*nbytes* bytes of the open *file*, from *start* on."""

    __slots__ = ("file", "nbytes", "start")

    def __init__(self, file: ForeignFile, start: int, nbytes: int) -> None:
        if start < 0 or nbytes < 0 or start + nbytes > file.nbytes:
            raise FormatError(
                f"{file.path} is damaged or cut off: it has {file.nbytes} bytes, but {nbytes} should lie at {start}"
            )
        self.file = file
        self.start = start
        self.nbytes = nbytes

    def read_into(self, start: int, into: memoryview) -> None:
        """As `Bytes` says."""
        self.file.read_into(self.start + start, into)

    def read(self, start: int, nbytes: int) -> bytes:
        """A copy of some bytes. Raises FormatError where they reach beyond the window."""
        if start < 0 or nbytes < 0 or start + nbytes > self.nbytes:
            raise FormatError(f"{self.file.path} is damaged or cut off at byte {self.start + self.nbytes}")
        data = bytearray(nbytes)
        self.read_into(start, memoryview(data))
        return bytes(data)

    def window(self, start: int, nbytes: int) -> Window:
        """A window in this one. Raises FormatError where it reaches beyond it."""
        if start < 0 or nbytes < 0 or start + nbytes > self.nbytes:
            raise FormatError(f"{self.file.path} is damaged: {nbytes} bytes at {start} reach beyond {self.nbytes}")
        return Window(self.file, self.start + start, nbytes)

    def stream(self) -> io.BufferedReader:
        """The window as a file of its own."""
        return io.BufferedReader(_Stream(self))


class Whole:
    """
    The bytes of a tensor that has to be made first (strided, cut into boxes). Made at the first read, dropped after
    the last byte was read, so at most one such tensor is in memory while they are read in order.
    """

    __slots__ = ("_data", "_make", "nbytes")

    def __init__(self, make: Callable[[], torch.Tensor], nbytes: int) -> None:
        self._make = make
        self._data: memoryview | None = None
        self.nbytes = nbytes

    def read_into(self, start: int, into: memoryview) -> None:
        """As `Bytes` says."""
        if self._data is None:
            self._data = as_bytes(self._make())
        into[:] = self._data[start : start + len(into)]
        if start + len(into) == self.nbytes:
            self._data = None


class ForeignFile:
    """A regular file, open for reading. `Files` opens and closes it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever
            self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise StorageError.from_os(error, f"opening {path}") from error
        found = os.fstat(self._descriptor)
        if not stat.S_ISREG(found.st_mode):
            self.close()
            raise FormatError(f"{path} is not a regular file")
        self.nbytes = found.st_size
        self._seen = found.st_size, found.st_mtime_ns

    def read_into(self, start: int, into: memoryview) -> None:
        """Fill *into* with the bytes from *start* on. Raises FormatError where the file ends before."""
        done = 0
        while done < len(into):
            try:
                data = os.pread(self._descriptor, min(len(into) - done, _READ_NBYTES), start + done)
            except OSError as error:
                raise StorageError.from_os(error, f"reading {self.path}") from error
            if not data:
                raise FormatError(f"{self.path} is cut off: it ends before byte {start + len(into)}")
            into[done : done + len(data)] = data
            done += len(data)

    def whole(self) -> Window:
        """All of it."""
        return Window(self, 0, self.nbytes)

    def check_unchanged(self) -> None:
        """Raise FormatError if somebody wrote to the file since it was opened."""
        now = os.fstat(self._descriptor)
        if (now.st_size, now.st_mtime_ns) != self._seen:
            raise FormatError(f"{self.path} was changed while it was read: import it again when nobody writes to it")

    def close(self) -> None:
        """Close it."""
        os.close(self._descriptor)


class Files:
    """The foreign files of one import. Each is opened once, and stays open until ``with`` is left."""

    def __init__(self) -> None:
        self._open: dict[Path, ForeignFile] = {}
        self._stack = ExitStack()

    def open(self, path: Path) -> ForeignFile:
        """*path*, opened. Raises StorageError or FormatError."""
        file = self._open.get(path)
        if file is None:
            file = self._open[path] = ForeignFile(path)
            self._stack.callback(file.close)
        return file

    def read(self, path: Path, *, limit: int) -> bytes:
        """All bytes of *path*. Raises FormatError if there are more than *limit*."""
        whole = self.open(path).whole()
        if whole.nbytes > limit:
            raise FormatError(f"{path} has {whole.nbytes} bytes; more than {limit} are not plausible")
        return whole.read(0, whole.nbytes)

    def check_unchanged(self) -> None:
        """Raise FormatError if one of them was written to since it was opened."""
        for file in self._open.values():
            file.check_unchanged()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


class _Stream(io.RawIOBase):
    """A window as a raw file, for readers that want one."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # what io gives to raw files
        count = max(0, min(len(buffer), self._window.nbytes - self._position))
        self._window.read_into(self._position, memoryview(buffer)[:count])
        self._position += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._window.nbytes}[whence]
        self._position = max(0, origin + offset)
        return self._position


_READ_NBYTES = 8 << 20
