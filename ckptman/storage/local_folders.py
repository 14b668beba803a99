"""
The folders of a local root: made where they are missing, made durable, and never a symbolic link.

A new directory is as lost as a new file if the directory above it was not fsynced. So each directory that is made on
the way to the root is made durable before the next one is made in it, and what was there already is fsynced too, once.
"""

# Paths are text here: one string goes to the system as it is.
# ruff: noqa: PTH120

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from ckptman.storage.local_looking import STALE
from ckptman.storage.system import System


class LocalFolders:
    """
    The folders below *root*, an absolute path without symbolic links. Raises the system's own errors.

    Threads may use it together: two that make or fsync the same folder do no harm.
    """

    def __init__(self, root: str, *, system: System) -> None:
        self._root = root
        self._system = system
        # Names that this object saw made durable ("" is the root's own). Never needs a lock: see above.
        self._durable: set[str] = set()

    def path(self, name: str) -> str:
        """Where the key or folder *name* is; ``""`` is the root."""
        return os.path.join(self._root, *name.split("/")) if name else self._root

    def refuse_links(self, folder: str) -> None:
        """Raise ``ELOOP`` if *folder*, or one above it in the root, is a symbolic link."""
        for name in with_parents(folder):
            path = self.path(name)
            there = self._lstat(path)
            if there is not None and stat.S_ISLNK(there.st_mode):
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)

    def make(self, folder: str) -> None:
        """Make *folder* where it is missing; its name is durable after `persist_name`. The root's is at once."""
        if "" not in self._durable:
            self._make_root()
            self._durable.add("")
        for name in with_parents(folder):
            path = self.path(name)
            if self._lstat(path) is None:
                self._durable.discard(name)
                with suppress(FileExistsError):
                    self._system.mkdir(path)

    def persist_name(self, folder: str) -> None:
        """
        Make the name of *folder*, and those above it in the root, durable; once for each.

        Also where this process did not make it: whoever did may have been killed before it got that far.
        """
        for name in with_parents(folder):
            if name not in self._durable:
                self._system.fsync_dir(self.path(folder_of(name)))
                self._durable.add(name)

    def remove_if_empty(self, folder: str) -> None:
        """Remove *folder* if it is empty, and not the root. Never raises: an empty folder harms nobody."""
        if folder:
            with suppress(OSError):
                self._system.rmdir(self.path(folder))
                self._durable.discard(folder)

    def _make_root(self) -> None:
        missing = []
        path = self._root
        while (there := self._lstat(path)) is None:
            missing.append(path)
            path = os.path.dirname(path)
        if not stat.S_ISDIR(there.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        self._persist_path(path, there.st_dev)
        for path in reversed(missing):
            with suppress(FileExistsError):
                self._system.mkdir(path)
            self._system.fsync_dir(os.path.dirname(path))

    def _persist_path(self, path: str, device: int) -> None:
        """
        Fsync every directory above *path*, as far as its filesystem goes and as far as we may.

        Somebody may have made them a moment ago: ``os.makedirs`` does not fsync.
        """
        while (parent := os.path.dirname(path)) != path:
            with suppress(OSError):
                if self._system.lstat(parent).st_dev != device:
                    return
                self._system.fsync_dir(parent)
            path = parent

    def _lstat(self, path: str) -> os.stat_result | None:
        try:
            try:
                return self._system.lstat(path)
            except OSError as error:
                if error.errno != STALE:
                    raise
                return self._system.lstat(path)  # of a folder that was removed: now it is missing, or another one
        except FileNotFoundError:
            return None


def folder_of(name: str) -> str:
    """The folder that the key or folder *name* is in; ``""`` is the root."""
    return name.rpartition("/")[0]


def with_parents(folder: str) -> list[str]:
    """``a/b`` → ``["a", "a/b"]``; nothing for the root."""
    parts = folder.split("/") if folder else []
    return ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
