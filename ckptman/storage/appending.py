"""
How bytes are appended to a large local file: past the page cache or through it, whichever suits the disk.

*Direct* (``O_DIRECT``), the disk fetches the bytes from the caller's own memory: no copy, no dirty pages, so nothing
piles up until fsync. It wants offset, length and memory aligned. *Buffered*, the kernel takes a copy, and we ask it to
write each piece back at once, so that the disk does not idle until fsync. Which is faster depends on the disk, the
filesystem and the memory, and no system says so. Hence two rules:

- Whether direct writes work is found out by a real one. Refused or cut short, its bytes are written buffered, and the
  disk is never asked again.
- Which way is faster is measured on the first bytes of the first large file: nothing is written twice or for nothing.

Neither way makes anything durable: a direct write passes the page cache, but neither the disk's own cache nor the
file's size and extents. Only fsync does, after either.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from io import FileIO

from ckptman.storage.system import System

ALIGNMENT = 4096
"""Offset, length and address of a direct write are multiples of it: the largest block of the disks in use."""

DIRECT_NBYTES = 1 << 20
"""Below it, nothing is gained: one way to the disk and back costs about what a copy of these bytes does."""

PIECE_NBYTES = 16 << 20
"""At most so much in one call: enough to keep a disk busy, little enough that write-back begins early."""

SAMPLE_NBYTES = 64 << 20
"""Timed in each way: 0.1 s on a disk of 0.6 GB/s, long beside an fsync (milliseconds); half a second on a slow one."""

CLEARLY_FASTER = 0.8
"""Buffered wins below this part of direct's time: its own timings vary by half, those of direct writes hardly."""

_IS_NO_DISK_FOR_DIRECT = frozenset(
    {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EFAULT}  # EFAULT: memory that only a copy can read
)
_HAS_NO_WRITE_BACK = frozenset(
    {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ESPIPE, errno.EPERM}  # EPERM: a sandbox
)


@dataclass(slots=True)
class DiskTraits:
    """
    What its files have taught a storage about the disk below.

    The threads that write files share it without a lock: a field is one assignment, and a race costs at most a
    second measurement or a second refusal.

    Attributes:
        takes_direct: No direct write was refused so far.
        takes_advice: Nor was a request to begin write-back.
        is_buffered_faster: As measured; None until a large file was written.
    """

    takes_direct: bool = True
    takes_advice: bool = True
    is_buffered_faster: bool | None = None


class Appender:
    """
    Appends to *file*, new and empty, in the way that *traits* suggest, and adds to them what it learns.

    Raises the system's own errors, after which the end of the file is unknown: nothing more may be appended.
    """

    def __init__(self, file: FileIO, *, traits: DiskTraits, system: System) -> None:
        self._file = file
        self._traits = traits
        self._system = system
        self._offset = 0
        self._direct = _Sample()
        self._buffered = _Sample()

    def append(self, data: memoryview) -> None:
        """Write all of *data*; the caller may change it afterwards. Not durable before fsync."""
        while data:
            self._way_for(data)(data[:PIECE_NBYTES])
            data = data[PIECE_NBYTES:]

    def _way_for(self, data: memoryview) -> Callable[[memoryview], None]:
        is_buffered_faster = self._traits.is_buffered_faster
        if is_buffered_faster or not self._traits.takes_direct or not is_aligned(data, offset=self._offset):
            return self._write_buffered
        return self._write_direct if is_buffered_faster is False else self._measure

    def _write_direct(self, data: memoryview) -> None:
        """Write *data* direct, but for an end that fills no block, and all that the disk does not take so."""
        whole = len(data) - len(data) % ALIGNMENT
        try:
            count = self._system.write_direct(self._file, data[:whole])
        except OSError as error:
            if error.errno not in _IS_NO_DISK_FOR_DIRECT:
                raise
            count = 0
        self._offset += count
        self._write_buffered(data[count:])
        if count < whole:  # only now: if the disk is full, that was the reason, and buffered writing has raised it
            self._traits.takes_direct = False

    def _write_buffered(self, data: memoryview) -> None:
        write_all(self._file, data, system=self._system)
        if len(data) >= DIRECT_NBYTES and self._traits.takes_advice:
            self._begin_write_back(len(data))
        self._offset += len(data)

    def _begin_write_back(self, nbytes: int) -> None:
        """Of the *nbytes* just written. An error that is no refusal is the file's own, and perhaps its only report."""
        try:
            self._system.begin_write_back(self._file, self._offset, nbytes)
        except OSError as error:
            if error.errno not in _HAS_NO_WRITE_BACK:
                raise
            self._traits.takes_advice = False

    def _measure(self, data: memoryview) -> None:
        """Write *data* in the way that is being timed: first a sample of direct writing, then one of buffered."""
        sample, write = (
            (self._buffered, self._write_buffered) if self._direct.is_complete else (self._direct, self._write_direct)
        )
        begun = self._system.seconds()
        write(data)
        sample.nbytes += len(data)
        if sample.is_complete:
            self._system.fsync(self._file)  # both must have reached the disk to be compared
        sample.seconds += self._system.seconds() - begun
        if self._buffered.is_complete:
            self._traits.is_buffered_faster = self._buffered.pace < CLEARLY_FASTER * self._direct.pace


@dataclass(slots=True)
class _Sample:
    nbytes: int = 0
    seconds: float = 0.0

    @property
    def is_complete(self) -> bool:
        return self.nbytes >= SAMPLE_NBYTES

    @property
    def pace(self) -> float:
        return self.seconds / self.nbytes


def write_all(file: FileIO, data: memoryview, *, system: System) -> None:
    """Write every byte of *data*: the system may take fewer at a time."""
    while data:
        count = system.write(file, data)
        if count <= 0:
            raise OSError(errno.EIO, "the system took none of the bytes")
        data = data[count:]


def is_aligned(data: memoryview, *, offset: int) -> bool:
    """Whether *data* is worth a direct write at *offset*, and lies where the disk can fetch it."""
    if len(data) < DIRECT_NBYTES or offset % ALIGNMENT or data.readonly:
        return False  # of memory that is read-only, Python does not tell the address; it is never ours
    import ctypes  # only large files need it

    return ctypes.addressof(ctypes.c_char.from_buffer(data)) % ALIGNMENT == 0
