"""
A system that fails at a chosen call: errors, short and torn writes, death.

    system = FaultySystem(fail(3, errno.ENOSPC))              # the 3rd call that changes the disk finds it full
    system = FaultySystem(fail(1, errno.EIO, name="fsync"))   # the 1st fsync fails
    system = FaultySystem(die(5, moment="after"))             # nothing more happens after the 5th call
    storage = LocalStorage(root, system=system)

To try every place, run once with `FaultySystem()` and count ``calls``; then run again with k = 1 … ``len(calls)``.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO
from typing import Literal, NamedTuple, NoReturn, TypeVar

from ckptman.storage.appending import ALIGNMENT
from ckptman.storage.system import SYSTEM, System

Moment = Literal["before", "torn", "after"]
MOMENTS: tuple[Moment, ...] = ("before", "torn", "after")
"""Before the call takes effect, in the middle of it (a write of half its bytes; else as before), or after it did."""

Result = TypeVar("Result")


class Killed(BaseException):
    """The process is dead, as far as its disk is concerned. Only a test catches it."""


class Call(NamedTuple):
    """One call that changes the disk; of a link, the path is the new name."""

    name: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """
    What goes wrong, and where. Made by `fail`, `die`, `sigkill` and `short_write`.

    Attributes:
        at: The number of the call, from 1.
        name: Count the calls of this name only, reading ones included; else all that change the disk.
        moment: When within the call.
        lasting: Whether every later call (that counts) fails too.
        strike: What happens then: it raises, ends the process, or returns (after a pause, say) and the call goes on.
    """

    at: int
    name: str | None = None
    moment: Moment = "before"
    lasting: bool = False
    strike: Callable[[], object]


def fail(at: int, error: int, *, name: str | None = None, moment: Moment = "before", lasting: bool = False) -> Fault:
    """Call number *at* raises an `OSError` with the errno *error*, and with *lasting* so does every later one."""

    def strike() -> NoReturn:
        raise OSError(error, os.strerror(error))

    return Fault(at=at, name=name, moment=moment, lasting=lasting, strike=strike)


def die(at: int, *, name: str | None = None, moment: Moment = "before") -> Fault:
    """Call number *at*, and every later call that would change the disk, raises `Killed`."""

    def strike() -> NoReturn:
        raise Killed

    return Fault(at=at, name=name, moment=moment, strike=strike)


def sigkill(at: int, *, name: str | None = None, moment: Moment = "before") -> Fault:
    """This very process is killed at call number *at*, as by ``kill -9``."""

    def strike() -> NoReturn:
        os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
        raise Killed  # the signal comes first

    return Fault(at=at, name=name, moment=moment, strike=strike)


def short_write(at: int = 1, *, name: str = "write", lasting: bool = True) -> Fault:
    """From call *at* of *name* on (only that one, if not *lasting*), each takes about half of its bytes, never none."""
    return Fault(at=at, name=name, moment="torn", lasting=lasting, strike=lambda: None)


class FaultySystem(System):
    """
    *inner* with one *fault*; without one, it only counts. Safe to use from several threads.

    Attributes:
        calls: Every call that would change the disk, in order, failed ones included.
        struck: How often the fault happened: a test should see that it did.
    """

    def __init__(self, fault: Fault | None = None, *, inner: System = SYSTEM) -> None:
        self.calls: list[Call] = []
        self.struck = 0
        self._inner = inner
        self._fault = fault
        self._counted = 0
        self._is_dead = False
        self._lock = threading.Lock()  # guards the counts above
        self._paths: dict[int, str] = {}  # id of an open file → its path

    def open_new(self, path: str) -> FileIO:
        file = self._change("open_new", path, lambda: self._inner.open_new(path))
        self._paths[id(file)] = path
        return file

    def write(self, file: FileIO, data: memoryview) -> int:
        moment = self._moment_of("write", self._path(file), changes=True)
        if moment == "before":
            self._strike()
        written = self._inner.write(file, data[: max(1, len(data) // 2)] if moment == "torn" else data)
        if moment in ("torn", "after"):
            self._strike()
        return written

    def write_direct(self, file: FileIO, data: memoryview) -> int:
        moment = self._moment_of("write_direct", self._path(file), changes=True)
        if moment == "before":
            self._strike()
        half = max(ALIGNMENT, len(data) // 2 // ALIGNMENT * ALIGNMENT)
        written = self._inner.write_direct(file, data[:half] if moment == "torn" else data)
        if moment in ("torn", "after"):
            self._strike()
        return written

    def begin_write_back(self, file: FileIO, start: int, nbytes: int) -> None:
        begin = self._inner.begin_write_back
        self._change("begin_write_back", self._path(file), lambda: begin(file, start, nbytes))

    def fsync(self, file: FileIO) -> None:
        self._change("fsync", self._path(file), lambda: self._inner.fsync(file))

    def close(self, file: FileIO) -> None:
        try:
            self._change("close", self._path(file), lambda: self._inner.close(file))
        finally:
            file.close()  # a close that fails has closed all the same, and the dead leave no descriptors

    def link(self, source: str, target: str) -> None:
        self._change("link", target, lambda: self._inner.link(source, target))

    def unlink(self, path: str) -> None:
        self._change("unlink", path, lambda: self._inner.unlink(path))

    def mkdir(self, path: str) -> None:
        self._change("mkdir", path, lambda: self._inner.mkdir(path))

    def rmdir(self, path: str) -> None:
        self._change("rmdir", path, lambda: self._inner.rmdir(path))

    def fsync_dir(self, path: str) -> None:
        self._change("fsync_dir", path, lambda: self._inner.fsync_dir(path))

    def open_read(self, path: str) -> FileIO:
        return self._look("open_read", path, lambda: self._inner.open_read(path))

    def read_into(self, file: FileIO, start: int, into: memoryview) -> int:
        return self._look("read_into", "", lambda: self._inner.read_into(file, start, into))

    def read_ahead(self, file: FileIO, start: int, nbytes: int) -> None:
        self._look("read_ahead", "", lambda: self._inner.read_ahead(file, start, nbytes))

    def fstat(self, file: FileIO) -> os.stat_result:
        return self._look("fstat", "", lambda: self._inner.fstat(file))

    def lstat(self, path: str) -> os.stat_result:
        return self._look("lstat", path, lambda: self._inner.lstat(path))

    def scan(self, path: str) -> list[os.DirEntry[str]]:
        return self._look("scan", path, lambda: self._inner.scan(path))

    def _change(self, name: str, path: str, effect: Callable[[], Result]) -> Result:
        return self._perform(self._moment_of(name, path, changes=True), effect)

    def _look(self, name: str, path: str, effect: Callable[[], Result]) -> Result:
        return self._perform(self._moment_of(name, path, changes=False), effect)

    def _perform(self, moment: Moment | None, effect: Callable[[], Result]) -> Result:
        if moment in ("before", "torn"):
            self._strike()
        result = effect()
        if moment == "after":
            if isinstance(result, FileIO):
                result.close()  # nobody else will: the caller never sees it
            self._strike()
        return result

    def _moment_of(self, name: str, path: str, *, changes: bool) -> Moment | None:
        """Count the call; when within it the fault happens, or None."""
        with self._lock:
            if changes:
                if self._is_dead:
                    raise Killed
                self.calls.append(Call(name, path))
            fault = self._fault
            if fault is None or not (fault.name == name if fault.name else changes):
                return None
            self._counted += 1
            is_due = self._counted >= fault.at if fault.lasting else self._counted == fault.at
            return fault.moment if is_due else None

    def _strike(self) -> None:
        assert self._fault is not None
        with self._lock:
            self.struck += 1
        try:
            self._fault.strike()
        except Killed:
            self._is_dead = True  # only ever set, so it needs no lock
            raise

    def _path(self, file: FileIO) -> str:
        return self._paths.get(id(file), "")
