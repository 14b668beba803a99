"""
The lock of a root on POSIX, NFS and Windows: held by the process that may write, freed by the kernel when it dies.

It keeps writers from wasting each other's work. It does not make a root safe; the catalog does (commit.py). A lock
file that is left behind means nothing, only a *held* one does. filelock closes the descriptor in forked children, so
that a DataLoader worker which outlives its parent does not keep the lock.
"""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from ckptman.errors import StorageError
from ckptman.storage.failures import hinted


class RootLock:
    """A held or free lock on one path. Not re-entrant; may be released on another thread than it was taken on."""

    def __init__(self, path: Path) -> None:
        self._lock = FileLock(path, thread_local=False, fallback_to_soft=False)

    def acquire(self, timeout_s: float) -> bool:
        """
        Wait up to *timeout_s* seconds for the lock; return whether we hold it.

        Raises:
            StorageError: The filesystem cannot lock, or will not let us.
        """
        try:
            self._lock.acquire(timeout=timeout_s)
        except Timeout:
            return False
        except (OSError, NotImplementedError) as error:
            doing = f"cannot lock {self._lock.lock_file}"
            if isinstance(error, OSError) and (told := hinted(doing, error)) != doing:
                raise StorageError.from_os(error, told) from error
            raise StorageError(
                f"{doing}: {error}. A root needs a filesystem with working file locks",
                errno=getattr(error, "errno", None),
            ) from error
        return True

    def release(self) -> None:
        """Free the lock."""
        self._lock.release()
