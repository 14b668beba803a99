"""A system that writes down every call that changes the disk, for `ckptman.testing.power_loss` to play back."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from io import FileIO

from ckptman.storage.system import SYSTEM, System


@dataclass(frozen=True, slots=True)
class Made:
    """A file or a directory was created as *path*. Files are numbered; ``node`` is None for a directory."""

    path: str
    node: int | None


@dataclass(frozen=True, slots=True)
class Wrote:
    """*data* was appended to file number *node*, direct or not: neither is durable."""

    node: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Synced:
    """File number *node* was fsynced."""

    node: int


@dataclass(frozen=True, slots=True)
class Linked:
    """*source* got the second name *target*."""

    source: str
    target: str


@dataclass(frozen=True, slots=True)
class Removed:
    """The name *path* was removed."""

    path: str


@dataclass(frozen=True, slots=True)
class SyncedNames:
    """The directory *path* was fsynced."""

    path: str


@dataclass(frozen=True, slots=True)
class Marked:
    """The program acknowledged *label* to its user."""

    label: str


Entry = Made | Wrote | Synced | Linked | Removed | SyncedNames | Marked


class RecordingSystem(System):
    """
    *inner*, with a journal of what changed below the existing directory *base*, itself taken as durable.

    Calls are made one at a time, so that the journal has their true order.

    Attributes:
        journal: What changed, in order; paths are relative to *base*. Calls that failed are left out.
    """

    def __init__(self, base: str | os.PathLike[str], *, inner: System = SYSTEM) -> None:
        self.journal: list[Entry] = []
        self._base = os.path.realpath(base)
        self._inner = inner
        self._lock = threading.RLock()  # guards all of this, and the order of calls
        self._nodes: dict[int, int] = {}  # id of an open file → number of the file
        self._count = 0

    def mark(self, label: str) -> None:
        """Write down that *label* was acknowledged: from here on, no crash may lose it."""
        with self._lock:
            self.journal.append(Marked(label))

    def open_new(self, path: str) -> FileIO:
        with self._lock:
            file = self._inner.open_new(path)
            self._count += 1
            self._nodes[id(file)] = self._count
            self._note(Made(self._inside(path), self._count), path)
            return file

    def write(self, file: FileIO, data: memoryview) -> int:
        with self._lock:
            written = self._inner.write(file, data)
            self.journal.append(Wrote(self._nodes[id(file)], bytes(data[:written])))
            return written

    def write_direct(self, file: FileIO, data: memoryview) -> int:
        with self._lock:
            written = self._inner.write_direct(file, data)
            self.journal.append(Wrote(self._nodes[id(file)], bytes(data[:written])))
            return written

    def begin_write_back(self, file: FileIO, start: int, nbytes: int) -> None:
        self._inner.begin_write_back(file, start, nbytes)  # it promises nothing, so there is nothing to write down

    def fsync(self, file: FileIO) -> None:
        with self._lock:
            self._inner.fsync(file)
            self.journal.append(Synced(self._nodes[id(file)]))

    def close(self, file: FileIO) -> None:
        self._inner.close(file)

    def link(self, source: str, target: str) -> None:
        with self._lock:
            self._inner.link(source, target)
            self._note(Linked(self._inside(source), self._inside(target)), target)

    def unlink(self, path: str) -> None:
        with self._lock:
            self._inner.unlink(path)
            self._note(Removed(self._inside(path)), path)

    def mkdir(self, path: str) -> None:
        with self._lock:
            self._inner.mkdir(path)
            self._note(Made(self._inside(path), None), path)

    def rmdir(self, path: str) -> None:
        with self._lock:
            self._inner.rmdir(path)
            self._note(Removed(self._inside(path)), path)

    def fsync_dir(self, path: str) -> None:
        with self._lock:
            self._inner.fsync_dir(path)
            self._note(SyncedNames(self._inside(path)), path)

    def _inside(self, path: str) -> str:
        inside = os.path.relpath(path, self._base).replace(os.sep, "/")
        return "" if inside == "." else inside

    def _note(self, entry: Entry, path: str) -> None:
        if not self._inside(path).startswith(".."):  # of what is above, the storage fsyncs but makes nothing
            self.journal.append(entry)
