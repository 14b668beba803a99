"""
The operating-system calls that `LocalStorage` makes, one method each, and no decisions.

This is the seam where `ckptman.testing` injects faults, kills the process and records what a power loss could take:
whatever LocalStorage does to a disk goes through here. All paths are absolute.
"""

# This is where the system's own functions are called.
# ruff: noqa: PTH102, PTH106, PTH108

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
import time
from io import FileIO

_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_DIRECT = getattr(os, "O_DIRECT", 0)  # 0 where there is none: macOS, Windows
_SYNC_FILE_RANGE_WRITE = 2
_AHEAD_NBYTES = 512 << 10  # Linux cuts what is told at once to a limit of the disk's, mostly 1.25 MiB, and says nothing
_NO_FSYNC_OF_DIRECTORIES = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})


class System:
    """The real system. Raises the `OSError` that it got, never ours."""

    def nonce(self) -> str:
        """16 hex digits that no other call, process or machine gets."""
        return secrets.token_hex(8)

    def seconds(self) -> float:
        """Since some moment, for measuring."""
        return time.perf_counter()

    def real_path(self, path: str) -> str:
        """*path*, absolute and without symbolic links, as far as it exists."""
        return os.path.realpath(path)

    # what changes the disk

    def open_new(self, path: str) -> FileIO:
        """Create *path* and open it unbuffered for writing; its mode follows the umask. `FileExistsError` if taken."""
        # The builtin, because tools that test for crashes watch it; EXCL refuses a symbolic link by itself.
        return open(path, "xb", buffering=0, opener=lambda name, flags: os.open(name, flags | _NO_FOLLOW, 0o666))

    def write(self, file: FileIO, data: memoryview) -> int:
        """Write some of *data*; return how many bytes."""
        return file.write(data)

    def write_direct(self, file: FileIO, data: memoryview) -> int:
        """
        Write some of *data* past the page cache; return how many bytes. Not durable before fsync.

        Fails, most likely with ``EINVAL``, where system or filesystem have no such writes, or offset, length or memory
        are not aligned. Linux moves the file's position by what it reports only, so a failed one can be made good.
        """
        if sys.platform == "win32" or not _DIRECT:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        import fcntl

        # Switched on for this one write: the builtin opens the file, and all other writes may have any length.
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        fcntl.fcntl(file, fcntl.F_SETFL, flags | _DIRECT)
        try:
            return file.write(data)
        finally:
            fcntl.fcntl(file, fcntl.F_SETFL, flags)

    def begin_write_back(self, file: FileIO, start: int, nbytes: int) -> None:
        """
        Have the kernel begin to write *nbytes* from *start* on from its cache to the disk. Promises nothing.

        ``ENOSYS`` where there is no such call; ``ESPIPE`` or ``EINVAL`` where this file has none. Every other error is
        one of writing, and fsync may not report it again. What goes wrong later, it does report: without the flags
        that wait, this call does not take the error that the kernel keeps for it.
        """
        if sys.platform != "linux":
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        import ctypes

        library = ctypes.CDLL(None, use_errno=True)
        if not hasattr(library, "sync_file_range"):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        wanted = ctypes.c_int64(start), ctypes.c_int64(nbytes), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE)
        if library.sync_file_range(ctypes.c_int(file.fileno()), *wanted) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def fsync(self, file: FileIO) -> None:
        """Return once the bytes of *file* are on the disk."""
        if sys.platform == "darwin":
            import fcntl

            try:
                fcntl.fcntl(file, fcntl.F_FULLFSYNC)
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                    raise
            else:
                return  # there, fsync alone leaves the bytes in the drive's cache
        os.fsync(file)

    def close(self, file: FileIO) -> None:
        """Close *file*. A network filesystem may report here that it lost what was written."""
        file.close()

    def link(self, source: str, target: str) -> None:
        """Give the file *source* the second name *target*. `FileExistsError` if taken."""
        os.link(source, target)

    def unlink(self, path: str) -> None:
        """Remove the name *path*; of a symbolic link, the link itself."""
        os.unlink(path)

    def mkdir(self, path: str) -> None:
        """Make the directory *path*; its mode follows the umask."""
        os.mkdir(path)

    def rmdir(self, path: str) -> None:
        """Remove the directory *path* if it is empty."""
        os.rmdir(path)

    def fsync_dir(self, path: str) -> None:
        """
        Return once the names in the directory *path* are on the disk.

        Does nothing on Windows, nor on a filesystem that has no such call: those look after names themselves, or
        nobody can make them.
        """
        if sys.platform == "win32":
            return
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _NO_FOLLOW)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_FSYNC_OF_DIRECTORIES:
                raise
        finally:
            os.close(descriptor)

    # what only looks

    def open_read(self, path: str) -> FileIO:
        """Open *path* unbuffered for reading. ``ELOOP`` if it is a symbolic link; a planted FIFO does not block."""
        if not hasattr(os, "O_NOFOLLOW") and stat.S_ISLNK(os.lstat(path).st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)
        flags = _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0)
        return open(path, "rb", buffering=0, opener=lambda name, wanted: os.open(name, wanted | flags))

    def read_into(self, file: FileIO, start: int, into: memoryview) -> int:
        """Read from byte *start* on into *into*; return how many bytes, 0 only at the end of the file."""
        file.seek(start)
        return file.readinto(into)

    def read_ahead(self, file: FileIO, start: int, nbytes: int) -> None:
        """Have the kernel fetch *nbytes* from *start* on into its cache. Does nothing where there is no such call."""
        if sys.platform == "linux":
            for at in range(start, start + nbytes, _AHEAD_NBYTES):
                os.posix_fadvise(file.fileno(), at, min(_AHEAD_NBYTES, start + nbytes - at), os.POSIX_FADV_WILLNEED)

    def fstat(self, file: FileIO) -> os.stat_result:
        """What *file* is, and how large."""
        return os.fstat(file.fileno())

    def lstat(self, path: str) -> os.stat_result:
        """What lies at *path*, without following a symbolic link."""
        return os.lstat(path)

    def scan(self, path: str) -> list[os.DirEntry[str]]:
        """What lies in the directory *path*, in no order."""
        with os.scandir(path) as entries:
            return list(entries)


SYSTEM = System()
"""The one that everybody uses; it has no state."""
