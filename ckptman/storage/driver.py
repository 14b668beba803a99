"""The little that `ObjectStorage` asks of a filesystem of fsspec's, and how any of them does it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Protocol, cast

from ckptman.errors import StorageError
from ckptman.storage.base import Buffer
from ckptman.storage.foreign import Unanswered, is_conflict, is_transient
from ckptman.storage.retry import Retry

SMALL_NBYTES = 8 << 20
"""What is no longer is put from memory, create-only; longer files by the driver's own upload of a local file."""


class Upload(Protocol):
    """A new object whose bytes come one after another. Nobody sees it before ``finish`` returned."""

    def expect(self, nbytes: int) -> None:
        """Prepare for *nbytes* in all. Raises `StorageError` if there is no room for so many under one key."""

    def write(self, data: memoryview) -> None:
        """Append *data*, which belongs to the caller again when this returns."""

    def finish(self) -> None:
        """Create the object. Fails where it exists."""

    def drop(self) -> None:
        """Give everything up that was not finished, on the server too."""


class Driver(Protocol):
    """
    Objects by path. Raises whatever it likes: the storage translates.

    ``put_new``, ``swap`` and an upload repeat by themselves what they can; any other call may be repeated.
    """

    @property
    def can_swap(self) -> bool:
        """Whether ``swap`` works."""

    def put_new(self, path: str, data: Buffer) -> None: ...

    def upload(self, path: str) -> Upload: ...

    def get(self, path: str, limit: int) -> tuple[bytes, str]:
        """The whole value, and what ``swap`` knows it by."""

    def get_into(self, path: str, start: int, into: memoryview) -> int: ...

    def get_each(self, path: str, start: int, into: Sequence[memoryview]) -> int:
        """As ``get_into``, by one request for all of *into*, which are filled one after the other."""

    def get_beginning(self, path: str, into: memoryview) -> tuple[int, int]:
        """As ``get_into`` from byte 0 on, and the ``size``."""

    def size(self, path: str) -> int: ...

    def modified_at(self, path: str) -> datetime:
        """When the object was created, by the server's clock."""

    def walk(self, folder: str) -> Iterator[tuple[str, int]]: ...

    def children(self, folder: str) -> list[str]: ...

    def delete(self, path: str) -> None: ...

    def remove_folder(self, folder: str) -> None:
        """Remove what is left of *folder* after its last object, if it is empty."""

    def swap(self, path: str, data: bytes, expected: str) -> None: ...

    def remove_stale(self, root: str, prefix: str) -> None:
        """Remove unfinished uploads below *root*, and objects beginning with *prefix*, that are older than a day."""


class AnyDriver:
    """
    Any filesystem, by fsspec's own calls. A streamed file waits on the local disk until it is whole.

    Not promised: that the put of a streamed file of more than 8 MiB excludes. Its keys are never used twice, and the
    catalog's are not streamed.
    """

    can_swap = False  # fsspec has no word for it

    def __init__(self, filesystem: Any, retry: Retry) -> None:
        self._fs = filesystem
        self._retry = retry

    def put_new(self, path: str, data: Buffer) -> None:
        value = bytes(data)
        create(lambda: self._put_new(path, value), self._retry)

    def _put_new(self, path: str, value: bytes) -> None:
        try:
            self._fs.pipe_file(path, value, mode="create")
        except FileNotFoundError:  # a filesystem with real folders
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            self._fs.pipe_file(path, value, mode="create")

    def put_file_new(self, local: str, path: str) -> None:
        """As ``put_new``, for the bytes of the file *local*."""
        create(lambda: self._fs.put_file(local, path, mode="create"), self._retry)

    def upload(self, path: str) -> Upload:
        return _Spooled(self, self._fs, path)

    def get(self, path: str, limit: int) -> tuple[bytes, str]:
        nbytes = self.size(path)
        refuse_above(nbytes, limit, path)
        return (cast(bytes, self._fs.cat_file(path, start=0, end=nbytes)) if nbytes else b""), ""

    def get_into(self, path: str, start: int, into: memoryview) -> int:
        end = min(self.size(path), start + len(into))
        if end <= start:
            return 0
        data = self._fs.cat_file(path, start=start, end=end)
        if len(data) != end - start:
            raise ConnectionError(f"{len(data)} bytes came of {end - start}")
        into[: len(data)] = data
        return len(data)

    def get_each(self, path: str, start: int, into: Sequence[memoryview]) -> int:
        return get_each(self.get_into, path, start, into)

    def get_beginning(self, path: str, into: memoryview) -> tuple[int, int]:
        return self.get_into(path, 0, into), self.size(path)

    def size(self, path: str) -> int:
        found = self._fs.info(path)
        if found["type"] != "file":
            raise FileNotFoundError(path)
        return int(found["size"])

    def modified_at(self, path: str) -> datetime:
        return cast(datetime, self._fs.modified(path))

    def walk(self, folder: str) -> Iterator[tuple[str, int]]:
        with suppress(FileNotFoundError):
            for path, found in self._fs.find(folder, detail=True).items():
                yield path, int(found["size"])

    def children(self, folder: str) -> list[str]:
        try:
            return [str(found["name"]) for found in self._fs.ls(folder, detail=True) if found["type"] == "directory"]
        except FileNotFoundError:
            return []

    def delete(self, path: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def remove_folder(self, folder: str) -> None:
        """Nothing: most drivers have no folders, and an empty one does no harm."""

    def swap(self, path: str, data: bytes, expected: str) -> None:
        raise NotImplementedError(f"{path!r}: fsspec cannot compare and swap")

    def remove_stale(self, root: str, prefix: str) -> None:
        """Nothing: fsspec cannot list unfinished uploads. Their servers drop them (GCS and Azure, after a week)."""


class _Spooled:
    def __init__(self, driver: AnyDriver, filesystem: Any, path: str) -> None:
        self._driver = driver
        self._fs = filesystem
        self._path = path
        self._file = tempfile.NamedTemporaryFile(prefix="ckptman-", delete=False)  # noqa: SIM115 - closed by drop

    def expect(self, nbytes: int) -> None:
        """Nothing: the driver sees to it."""

    def write(self, data: memoryview) -> None:
        self._file.write(data)

    def finish(self) -> None:
        self._file.flush()
        if self._file.tell() <= SMALL_NBYTES:
            self._file.seek(0)
            self._driver.put_new(self._path, self._file.read())
        else:
            self._driver.put_file_new(self._file.name, self._path)
        self.drop()

    def drop(self) -> None:
        self._file.close()
        with suppress(FileNotFoundError):
            os.unlink(self._file.name)  # noqa: PTH108 - one string goes to the system as it is


def create(send: Callable[[], object], retry: Retry, *, is_ours: Callable[[], bool] = lambda: False) -> None:
    """
    Send a create-only request, again where that may help, and find out what came of it.

    Args:
        send: Sends it once.
        retry: How often, and how slowly.
        is_ours: Whether what lies there came from this request; asked where an answer may have been lost. That may be
            so at the first conflict: aiohttp sends a PUT again by itself when its connection is cut.

    Raises:
        Unanswered: The last try failed, and it or an earlier one may take effect yet.
        Exception: What the only try was refused with, or that the key is taken: nothing of ours will be there.
    """
    tries = 0

    def counted() -> None:
        nonlocal tries
        tries += 1
        send()

    try:
        retry(counted, is_transient=is_transient)
    except Exception as error:
        if tries == 1 and not is_transient(error) and not is_conflict(error):
            raise
        if is_ours():
            return
        if is_conflict(error):
            raise
        raise Unanswered(str(error) or type(error).__name__) from error


def get_each(get_into: Callable[[str, int, memoryview], int], path: str, start: int, into: Sequence[memoryview]) -> int:
    """Fill *into* with what *get_into* gets, at once and by way of other memory, from byte *start* on."""
    whole = memoryview(bytearray(sum(map(len, into))))
    nbytes, at = get_into(path, start, whole), 0
    for part in cut(into, nbytes):
        part[:] = whole[at : at + len(part)]
        at += len(part)
    return nbytes


def cut(into: Sequence[memoryview], nbytes: int) -> Iterator[memoryview]:
    """The first *nbytes* of *into*."""
    for part in into:
        yield part[:nbytes]
        nbytes = max(0, nbytes - len(part))


def refuse_above(nbytes: int, limit: int, path: str) -> None:
    """Raise `StorageError` if *path* is longer than it can rightly be."""
    if nbytes > limit:
        raise StorageError(f"{path!r} has {nbytes} bytes, at most {limit} can be right")
