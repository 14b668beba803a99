"""
What ckptman asks of a storage, and nothing more.

A storage maps keys (``catalog/000000000042.json``) to immutable bytes. There is no rename, no mkdir, no
change in place and no exists-polling, so that a POSIX directory, an NFS mount and an object store can all
keep the same promises:

1. **A key is written once.** ``create`` and ``open_new`` fail with `KeyExists` if the key is there.
2. **``create`` is the commit.** When it returns, the bytes *and the name* are durable, and no reader ever saw a
   part of them. (A filesystem without hard links may show a torn file after a crash; the catalog's digests catch it.)
3. **``open_new`` streams.** When its ``commit`` returns the bytes are durable; the name is once ``persist`` returned.
4. **``listing`` is fresh.** What was created before it began is listed.

Every failure of the medium is a `StorageError`, raised here and nowhere above.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from ckptman.errors import FormatError, StorageError

Buffer = bytes | bytearray | memoryview
"""Contiguous bytes. A memoryview must be of format ``B``."""

_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\:*?\"<>|\ud800-\udfff]")
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
MAX_KEY_LENGTH = 512


@functools.lru_cache(4096)  # the same keys come again with every listing of a catalog
def check_key(key: str) -> str:
    """
    Return *key* if it names something inside a root on every operating system.

    Keys come from files too (a manifest's paths), so this is a border: relative, ``/`` between parts, no
    ``.`` or ``..``, no backslash, colon, control character or other character that some system forbids,
    no device name that Windows reserves, no part that ends in a dot or a space. No part begins with a dot either:
    such names are the storage's own (temporary files), so they are never listed and nobody can ask for one.

    Raises:
        FormatError: The key breaks a rule; the message quotes it.
    """
    parts = key.split("/")
    if (
        not key
        or len(key) > MAX_KEY_LENGTH
        or _FORBIDDEN.search(key)
        or any(not part or part[0] == "." or part[-1] in ". " or RESERVED.fullmatch(part) for part in parts)
    ):
        raise FormatError(f"{key[:80]!r} is not a valid key: keys are relative paths of plain names joined by '/'")
    return key


def is_key(name: str) -> bool:
    """Whether `check_key` lets *name* pass."""
    try:
        check_key(name)
    except FormatError:
        return False
    return True


class KeyExists(StorageError):
    """The key was there already. Nothing was changed."""


class KeyMissing(StorageError):
    """Nothing is stored under the key (any more)."""


class NotAFile(StorageError):
    """What lies under the key is nothing that was stored: a symbolic link, or a folder. It was not followed."""


def lacking(error: KeyMissing | NotAFile) -> str:
    """What is the matter with a file that a checkpoint needs, as the end of a sentence about it."""
    return "is missing" if isinstance(error, KeyMissing) else f"is not there, something else is: {error}"


class KeyChanged(StorageError):
    """The key holds another version than was expected. Nothing was changed."""


class NotDurable(StorageError):
    """``create`` made the key visible, but could not make its name durable: a power loss may take it back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One key of a listing, with its size in bytes."""

    key: str
    nbytes: int


class NewFile(Protocol):
    """
    A file being written. As a context manager it commits, or aborts if the block raised.

    After ``abort``, and after a ``commit`` that failed, nothing is stored under the key, as far as the storage still
    answers. What was committed stays: a later ``abort`` changes nothing. Belongs to one thread at a time.
    """

    def write(self, data: Buffer) -> None:
        """Append all of *data*."""

    def commit(self) -> None:
        """Return once every byte is durable. A failure leaves no promise: abandon the key, never retry on it."""

    def abort(self) -> None:
        """Drop what was written. Never raises."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


@runtime_checkable
class Expects(Protocol):
    """A `NewFile` that wants to know its size beforehand."""

    def expect(self, nbytes: int) -> None:
        """
        Prepare for *nbytes* in all; to be called before the first ``write``, which then says the truth or fails.

        Raises:
            StorageError: There is no room for so many under one key. Nothing was sent.
        """


@runtime_checkable
class Storage(Protocol):
    """Bytes by key. Safe to use from several threads. Reading never creates anything."""

    @property
    def url(self) -> str:
        """The root for people to read; credentials redacted."""

    @property
    def identity(self) -> str:
        """Equal for two objects of this process that reach the same root."""

    @property
    def lock_path(self) -> Path | None:
        """Where a lock file excludes other processes; None where no file lock can."""

    def create(self, key: str, data: Buffer) -> None:
        """
        Store *data* under the new *key*, whole or not at all, durable with its name.

        Raises:
            KeyExists: The key is taken (perhaps by our own try whose answer was lost: read it back).
            NotDurable: The key is visible, but its name may not survive a power loss.
            StorageError: The medium failed. The key may exist or not; if it does, it may not be durable: `persist` its
                folder before relying on it.
        """

    def open_new(self, key: str) -> NewFile:
        """
        Begin a large file under the new *key*.

        Raises:
            KeyExists: The key is taken.
            StorageError: The medium failed.
        """

    def persist(self, folders: Iterable[str]) -> None:
        """Make the names in *folders* durable (``""`` is the root itself). Nothing to do on object stores."""

    def read(self, key: str, *, limit: int) -> bytes:
        """
        The whole value.

        Raises:
            KeyMissing: There is none.
            StorageError: It is larger than *limit* bytes (checked before memory is taken), or could not be read.
        """

    def read_into(self, key: str, start: int, into: memoryview) -> int:
        """
        Fill *into* with the bytes from *start* on; return how many there were (fewer only at the end of the file).

        Raises:
            KeyMissing: There is no such key.
        """

    def size(self, key: str) -> int:
        """Bytes stored under *key*. Raises `KeyMissing`."""

    def listing(self, folder: str) -> list[Stored]:
        """Every key below *folder*, sorted; empty where there is no such folder. Symbolic links are left out."""

    def folders(self) -> list[str]:
        """
        The names of the root's own folders, sorted. Symbolic links are left out.

        Some object stores name a folder for a while after its last key is gone: what matters is in ``listing``.
        """

    def delete(self, keys: Iterable[str]) -> None:
        """
        Remove *keys* in their order, and folders that this leaves empty. Missing keys are no error.

        The order holds for readers and for a kill in between. It does not hold for a power loss: until the folder
        is written to the disk, any of the keys may come back.
        """

    def remove_temporaries(self, folder: str) -> None:
        """
        Remove what calls that never returned left in *folder*, and *folder* itself if that leaves it empty.

        For the writer's sweep, before or after `delete`: a temporary file keeps its folder from being empty.
        It may hit the temporary file of another process that is alive, which then gets a `StorageError` and has
        stored nothing: see `ckptman.storage.local`. Nothing to do where unfinished writes leave nothing behind.
        """


@runtime_checkable
class Distant(Protocol):
    """
    A storage across a network, asked by requests, each of which costs as much as many bytes.

    This machine keeps no copy of it: every process that reads fetches anew, so what several ranks of a host read is
    better fetched once. (Of files, NFS included, the page cache keeps it.)
    """

    @property
    def read_nbytes(self) -> int:
        """How much of a file to ask for at a time, in ranges that begin at multiples of it, if so much is wanted."""

    def read_into_each(self, key: str, start: int, into: Sequence[memoryview]) -> int:
        """As `Storage.read_into`, by one request for all of *into*, which are filled one after the other."""

    def read_beginning(self, key: str, into: memoryview) -> tuple[int, int]:
        """As `Storage.read_into` from byte 0 on; and what `Storage.size` says, by the same request if possible."""


@runtime_checkable
class ReadsAhead(Protocol):
    """A storage whose system can be told what will be read, and fetches it meanwhile into memory of its own."""

    def read_ahead(self, key: str, start: int, nbytes: int) -> None:
        """
        Have *nbytes* from *start* on fetched; may return before they are. Promises nothing.

        Raises:
            KeyMissing: There is no such key.
            StorageError: The medium failed.
        """


@runtime_checkable
class Swaps(Protocol):
    """
    A storage that can also change a value, provided that nobody else did meanwhile (compare and swap).

    Only a lease asks for it: what a root consists of is immutable.
    """

    @property
    def can_swap(self) -> bool:
        """Whether the two below work here; not every server of a kind has the means."""

    def read_version(self, key: str, *, limit: int) -> tuple[bytes, str]:
        """The value, as `Storage.read` gives it, and a name for this version of it."""

    def swap(self, key: str, data: bytes, *, expected: str) -> None:
        """
        Put *data* in place of the version *expected*.

        Raises:
            KeyChanged: Another version is there (perhaps of our own try whose answer was lost: read it back).
            StorageError: The medium failed. The value is the old or the new one.
        """
