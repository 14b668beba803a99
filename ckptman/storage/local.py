"""
A directory as a storage: POSIX filesystems, NFS mounts, Windows.

How ``create`` commits, and what a kill or a power loss leaves after each step:

    0  the folder is made where it is missing, and its name and those of its parents are fsynced
    1  a temporary file is created exclusively        a temporary file, perhaps empty, torn or zeros; no key
    2  all is written to it
    3  it is fsynced and closed, both checked         a whole temporary file, perhaps without its name; no key
    4  it is linked to the name (fails if taken)      the key, whole, or no key; readers see it from here on
    5  the folder is fsynced                          the key
    6  the temporary name is removed                  the key, perhaps with a second, temporary name

What is linked was durable before it had its name, so a name that survives has its bytes. Step 5 comes before
``create`` returns, so a key that was acknowledged has its name. Step 4 is one atomic operation on local filesystems
and on NFS alike, so two writers never both get a name.

What an error leaves: before 4, no key. In 4, an answer may have been lost: if the name is taken, but the temporary file
has two names, the link was ours. In 5, the key is there for readers, but a power loss may take it: ``create`` raises
`NotDurable`, and nobody may acknowledge it. In 6, nothing: the key is durable.

Where the filesystem has no hard links, the name itself is created exclusively in place of 4, written, fsynced: still
exclusive and durable, but a kill between leaves a torn value under the key. The catalog's digests catch that.

``open_new`` writes to the name itself: an attempt counts for nothing before a manifest and a record name its files.

A failed fsync is never tried again on the same file: the kernel may have dropped the pages already, and would answer
that all is well. Temporary files are called ``.tmp-<16 hex digits>``, which is no valid key, so they are never listed.

Why `remove_temporaries` may remove the temporary file of another process that is alive: only the holder of the
writer's lock creates records, and only the holder sweeps. A process that lost the lock while it slept between 1 and 4
finds its temporary file gone at 4, gets a `StorageError` and has stored nothing, which is what its fate was to be.
(After 4, the temporary name is no longer needed.)

Below the root no symbolic link is followed. The folder of a key is looked at just before it is used; that keeps
mistakes and stale links out, not an attacker who can write into the root at this very moment.
"""

# Paths are text here: one string goes to the system as it is.
# ruff: noqa: PTH100, PTH111, PTH120

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import TypeVar

from ckptman.errors import StorageError
from ckptman.storage.appending import DiskTraits, write_all
from ckptman.storage.base import Buffer, KeyExists, NotAFile, NotDurable, Stored, check_key, is_key
from ckptman.storage.failures import hinted, reporting
from ckptman.storage.local_file import NewLocalFile
from ckptman.storage.local_folders import LocalFolders, folder_of, with_parents
from ckptman.storage.local_looking import STALE, LocalLooking
from ckptman.storage.system import SYSTEM, System

Result = TypeVar("Result")

_TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{16}")
_NO_HARD_LINKS = frozenset(
    {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV, errno.EINVAL}
)


READ_NBYTES = 1 << 20
"""
What is read in one call, at most. The kernel then fetches what comes next while this is copied.

Four ranks that read 100 MiB each, nothing cached, took 0.8 – 0.9 of the time that they took with 8 MiB in one call.
"""


class LocalStorage:
    """
    The storage in the directory *path*, which need not exist yet: the first write makes it, reading never does.

    Keeps no descriptor and no lock, so it may be used from several threads and after a fork.

    *path* may itself be a symbolic link; it is resolved here and now, so neither a later ``chdir`` nor another target
    of the link moves a storage that is in use. ``~`` is expanded.

    Not promised: that the directories above the root are durable, where this process may not read them (then it
    cannot fsync them either); every other one on the same filesystem is fsynced before the first write.

    Raises:
        ValueError: *path* is empty, holds a NUL, or begins with the ``~`` of an unknown user.
    """

    def __init__(self, path: str | os.PathLike[str], *, system: System = SYSTEM) -> None:
        given = os.fspath(path)
        if not isinstance(given, str):
            raise TypeError(f"a root is a text path, got {type(given).__name__}")
        expanded = os.path.expanduser(given)
        if not given or "\0" in given or (given[0] == "~" and expanded == given):
            raise ValueError(f"{given!r} is no path that a root can have: give a path such as 'runs/a' or '~/runs/a'")
        self._system = system
        self._url = os.path.abspath(expanded)
        self._root = system.real_path(self._url)
        self._folders = LocalFolders(self._root, system=system)
        self._looking = LocalLooking(system=system)
        self._traits = DiskTraits()

    def __repr__(self) -> str:
        return f"LocalStorage({self._url!r})"

    @property
    def url(self) -> str:
        """The absolute path, as it was given."""
        return self._url

    @property
    def identity(self) -> str:
        """``file:`` and the path without symbolic links."""
        return f"file:{os.path.normcase(self._root)}"

    @property
    def lock_path(self) -> Path | None:
        """``writer.lock`` in the root."""
        return Path(self._root, "writer.lock")

    # writing

    def create(self, key: str, data: Buffer) -> None:
        """Store *data* under the new *key*, whole or not at all, durable with its name. See `Storage.create`."""
        with self._at(key, "create") as path:
            folder = folder_of(key)
            self._folders.make(folder)
            self._folders.persist_name(folder)
            parent = os.path.dirname(path)
            temporary = os.path.join(parent, f".tmp-{self._system.nonce()}")
            self._write_durably(temporary, data)
            try:
                linked = self._link(temporary, path, key=key)
                if linked:
                    self._persist_name(parent, key)
            finally:
                with suppress(OSError):  # a leftover is the sweep's; it must hide neither success nor failure
                    self._system.unlink(temporary)
            if not linked:
                self._write_in_place(path, data, key=key)
                self._persist_name(parent, key)

    def open_new(self, key: str) -> NewLocalFile:
        """Begin a large file under the new *key*; readers see it grow. See `Storage.open_new`."""
        with self._at(key, "create") as path:
            self._folders.make(folder_of(key))
            name = f"{key!r} in {self._url}"
            return NewLocalFile(path, name, key=key, traits=self._traits, system=self._system)

    def persist(self, folders: Iterable[str]) -> None:
        """Fsync each of *folders*, in their order (``""`` is the root itself)."""
        for folder in folders:
            with self._in(folder, "persist") as path:
                self._system.fsync_dir(path)

    def _persist_name(self, parent: str, key: str) -> None:
        try:
            self._system.fsync_dir(parent)
        except OSError as error:
            doing = f"{key!r} in {self._url} is visible, but could not be made durable"
            raise NotDurable.from_os(error, hinted(doing, error), key) from error

    def _write_in_place(self, path: str, data: Buffer, *, key: str) -> None:
        """As `_write_durably`, for a name that others look at: what failed and could not be removed is `NotDurable`."""
        try:
            self._write_durably(path, data)
        except FileExistsError:
            raise
        except OSError as error:
            with suppress(FileNotFoundError):
                self._system.lstat(path)
                doing = f"{key!r} in {self._url} is visible, but neither could be made durable nor removed"
                raise NotDurable.from_os(error, hinted(doing, error), key) from error
            raise

    def _write_durably(self, path: str, data: Buffer) -> None:
        """Create *path* with *data*, durable but for its name. Removes it again where that fails."""
        file = self._system.open_new(path)
        try:
            try:
                write_all(file, memoryview(data), system=self._system)
                self._system.fsync(file)
            finally:
                self._system.close(file)
        except BaseException:
            with suppress(OSError):
                self._system.unlink(path)
            raise

    def _link(self, temporary: str, path: str, *, key: str) -> bool:
        """Whether *temporary* is now at *path* too; False where the filesystem has no hard links."""
        try:
            self._system.link(temporary, path)
        except FileExistsError as error:
            if not self._has_two_names(temporary):
                raise KeyExists.from_os(
                    error, f"{key!r} in {self._url} is taken, and never overwritten", key
                ) from error
        except OSError as error:
            if error.errno in _NO_HARD_LINKS:
                return False
            raise
        return True

    def _has_two_names(self, path: str) -> bool:
        # Opened, because NFS asks its server at every open, and answers lstat from memory.
        with self._system.open_read(path) as file:
            return self._system.fstat(file).st_nlink > 1

    # reading

    def read(self, key: str, *, limit: int) -> bytes:
        """The whole value, of at most *limit* bytes. See `Storage.read`."""

        def whole(file: FileIO) -> bytes:
            nbytes = self._system.fstat(file).st_size
            if nbytes > limit:
                raise StorageError(f"{key!r} in {self._url} has {nbytes} bytes, at most {limit} can be right", key=key)
            data = io.BytesIO(bytes(nbytes))  # whose bytes are handed over at the end: no copy of megabytes
            with data.getbuffer() as view:
                done = self._fill(file, view, start=0)
            return data.getvalue() if done == nbytes else data.getvalue()[:done]

        return self._opened(key, whole)

    def read_into(self, key: str, start: int, into: memoryview) -> int:
        """Fill *into* from byte *start* on; return how many bytes there were. See `Storage.read_into`."""
        return self._opened(key, lambda file: self._fill(file, into, start=start))

    def read_ahead(self, key: str, start: int, nbytes: int) -> None:
        """Have the system fetch bytes into its page cache. See `ReadsAhead.read_ahead`."""
        self._opened(key, lambda file: self._system.read_ahead(file, start, nbytes))

    def size(self, key: str) -> int:
        """Bytes stored under *key*. Asks by opening: NFS may answer from memory otherwise."""
        return self._opened(key, lambda file: self._system.fstat(file).st_size)

    def modified_at(self, key: str) -> datetime:
        """When *key* was written, in UTC, by the clock of the machine that keeps the filesystem. Or `KeyMissing`."""
        return datetime.fromtimestamp(self._opened(key, lambda file: self._system.fstat(file).st_mtime), UTC)

    def listing(self, folder: str) -> list[Stored]:
        """Every key below *folder*, sorted. What vanishes meanwhile is left out, and what has no valid key."""
        with self._in(folder, "list") as path:
            return sorted(self._walk(path, folder), key=lambda stored: stored.key)

    def folders(self) -> list[str]:
        """The names of the root's own folders, sorted."""
        with self._in("", "list") as path:
            return sorted(key for key, _, is_folder in self._scan(path, "") if is_folder)

    def _opened(self, key: str, use: Callable[[FileIO], Result]) -> Result:
        """What *use* makes of the file of *key*; it is called again where the first answer may be stale."""
        with self._at(key, "read", missing=True) as path:

            def look() -> Result:
                with self._system.open_read(path) as file:
                    if not stat.S_ISREG(self._system.fstat(file).st_mode):
                        raise NotAFile(f"{key!r} in {self._url} is no regular file", key=key)
                    return use(file)

            return self._looking.certain(path, look, refuse=lambda: self._folders.refuse_links(folder_of(key)))

    def _fill(self, file: FileIO, into: memoryview, *, start: int) -> int:
        done = 0
        while done < len(into):
            count = self._system.read_into(file, start + done, into[done : done + READ_NBYTES])
            if count == 0:
                break
            done += count
        return done

    def _walk(self, path: str, folder: str) -> Iterator[Stored]:
        for key, entry, is_folder in self._scan(path, folder):
            if is_folder:
                yield from self._walk(entry.path, key)
            else:
                try:
                    nbytes = entry.stat(follow_symlinks=False).st_size
                except OSError as error:
                    if error.errno not in (errno.ENOENT, STALE):
                        raise
                    continue  # removed since its name was found
                yield Stored(key=key, nbytes=nbytes)

    def _scan(self, path: str, folder: str) -> Iterator[tuple[str, os.DirEntry[str], bool]]:
        """What has a key in *folder*: the key, the entry, and whether it is a folder. Nothing if *folder* is gone."""
        try:
            entries = self._looking.certain(
                path, lambda: self._system.scan(path), refuse=lambda: self._folders.refuse_links(folder)
            )
        except FileNotFoundError:
            return
        for entry in entries:
            key = f"{folder}/{entry.name}" if folder else entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            if is_key(key) and (is_folder or entry.is_file(follow_symlinks=False)):
                yield key, entry, is_folder

    # removing

    def delete(self, keys: Iterable[str]) -> None:
        """Remove *keys* in their order, and folders that this leaves empty (never the root). See `Storage.delete`."""
        folders: set[str] = set()
        for key in keys:
            with self._at(key, "delete") as path, suppress(FileNotFoundError):
                self._system.unlink(path)
            folders.update(with_parents(folder_of(key)))
        for folder in sorted(folders, key=len, reverse=True):
            self._folders.remove_if_empty(folder)

    def remove_temporaries(self, folder: str) -> None:
        """Remove the temporary files in *folder*, then *folder* if it is empty. See `Storage.remove_temporaries`."""
        with self._in(folder, "clean up") as path, suppress(FileNotFoundError):
            for entry in self._system.scan(path):
                if _TEMPORARY.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        self._system.unlink(entry.path)
            self._folders.remove_if_empty(folder)

    # names

    @contextmanager
    def _at(self, key: str, verb: str, *, missing: bool = False) -> Iterator[str]:
        """The path of *key*, checked, for a block whose system errors become ours."""
        check_key(key)
        with reporting(f"cannot {verb} {key!r} in {self._url}", key, missing=missing):
            self._folders.refuse_links(folder_of(key))
            yield self._folders.path(key)

    @contextmanager
    def _in(self, folder: str, verb: str) -> Iterator[str]:
        """The path of *folder*, checked likewise."""
        if folder:
            check_key(folder)
        with reporting(f"cannot {verb} the folder {self._folders.path(folder)}", folder):
            self._folders.refuse_links(folder)
            yield self._folders.path(folder)
