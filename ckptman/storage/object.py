"""
Bytes in an object store, or in whatever else fsspec has a filesystem for. The only module that imports fsspec.

*Creating.* A put that fails if the key exists, by the store's own means (``If-None-Match: *`` on S3). That it does is
measured once per root and process, before the first write, by putting twice. A store that lets the second put pass is
refused for writing, unless its user says that there is one writer only.

*Trying again.* Everything here may take effect twice without harm, a create-only put included: its repetition finds
the first one and is refused; on S3 the nonce of what is there then tells whether it is ours (s3.py), elsewhere callers
of ``create`` compare nonces of their own, as they must for any answer that was lost.

*Forks.* A filesystem object does not survive one, so every process makes its own. And a child (a loader's worker) never
collects what it inherited: frames of the event loop's thread may be among it, which the child does not have, and
CPython 3.11 crashes where it visits them.
"""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.core import url_to_fs

from ckptman.errors import CkptmanError, StorageError, redact
from ckptman.storage.azure import AzureDriver
from ckptman.storage.base import Buffer, KeyChanged, KeyExists, Stored, check_key, is_key
from ckptman.storage.driver import AnyDriver, Driver, Upload
from ckptman.storage.ending import Ending
from ckptman.storage.foreign import is_presentable, is_transient, ours, secrets_of, without_traceback
from ckptman.storage.google import GoogleDriver
from ckptman.storage.probe import excludes
from ckptman.storage.retry import Retry
from ckptman.storage.s3 import S3Driver

Result = TypeVar("Result")

CLEANED_EVERY_S = 3600.0
_PROBE = ".ckptman-probe-"
_S3 = frozenset({"s3", "s3a"})
_AZURE = frozenset({"abfs", "abfss", "az"})
_GOOGLE = frozenset({"gs", "gcs"})
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "abfs": "azure", "abfss": "azure", "az": "azure"}
_CACHES = frozenset({"simplecache", "filecache", "blockcache", "cached"})
_READ_ONLY = frozenset({"http", "https", "data", "github", "git", "zip", "tar"})


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=gc.freeze)


def check_protocol(url: str) -> None:
    """
    Return if there is a driver for *url*, which is not contacted.

    Raises:
        ValueError: There is none, or no checkpoint could be kept there. The message says what to install.
    """
    protocols = [part.partition("://")[0].lower() for part in url.split("::")]
    for protocol in protocols:
        if protocol in ("file", "local"):
            raise ValueError(f"{redact(url)!r}: for a folder of this machine give its path alone, without a chain")
        if protocol in _CACHES:
            raise ValueError(f"{redact(url)!r}: a cache hides what other processes change: leave {protocol}:: out")
        if protocol in _READ_ONLY:
            raise ValueError(
                f"{redact(url)!r}: nothing can be created under {protocol}://, so it is no place for a root"
            )
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            todo = f"pip install 'ckptman[{extra}]'" if extra else str(error)
            raise ValueError(f"{redact(url)!r} needs a driver that is not installed: {todo}") from error
        except ValueError as error:
            raise ValueError(
                f"{redact(url)!r} cannot be opened: fsspec knows no protocol {protocol!r}. Local paths, file://, "
                "memory://name, s3:// (pip install 'ckptman[s3]'), gs:// ('ckptman[gcs]') and abfs:// "
                "('ckptman[azure]') are known"
            ) from error


class ObjectStorage:
    """
    Keys below *url*, in any filesystem of fsspec's. See `Storage` for the promises.

    Args:
        url: Such as ``s3://bucket/runs/7``.
        storage_options: Handed to the driver. What looks like a credential in it is never shown.
        single_writer: Accept a store whose create-only put does not exclude: the caller sees to it that there is one
            writer. Nothing is probed then, and two writers may lose each other's checkpoints.
        retry: How calls that failed in passing are repeated.
        filesystem: Makes the filesystem in place of fsspec; called once in every process.
    """

    def __init__(
        self,
        url: str,
        *,
        storage_options: Mapping[str, object] | None = None,
        single_writer: bool = False,
        retry: Retry = Retry(),  # noqa: B008 - it is immutable
        filesystem: Callable[[], Any] | None = None,
    ) -> None:
        self._whole_url = url.rstrip("/")
        self._options = dict(storage_options or {})
        self._secrets = secrets_of(self._options)
        self._is_single = single_writer
        self._retry = retry
        self._filesystem = filesystem
        self._forget()

    def _forget(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()  # guards what follows
        self._probing = threading.Lock()  # guards _excludes, and is held while probing
        self._made: tuple[Driver, str] | None = None
        self._excludes: bool | None = None
        self._being_written: set[str] = set()
        self._cleaned_at: float | None = None

    def __repr__(self) -> str:
        return f"<ObjectStorage {self.url}>"

    @property
    def url(self) -> str:
        """The URL; credentials redacted."""
        return redact(self._whole_url)

    @property
    def identity(self) -> str:
        """The URL and the server; two objects with filesystems of their own are never equal."""
        client = self._options.get("client_kwargs")
        inner = client.get("endpoint_url", "") if isinstance(client, Mapping) else ""
        where = id(self._filesystem) if self._filesystem else self._options.get("endpoint_url", inner)
        return f"{self._whole_url}#{where}"

    @property
    def lock_path(self) -> Path | None:
        """None: no file lock reaches here."""
        return None

    # creating

    def create(self, key: str, data: Buffer) -> None:
        """Store *data* under the new *key*, visible at once and whole. See `Storage.create`."""
        check_key(key)
        self._refuse_inexclusive()
        self._guard("create", key, lambda driver: driver.put_new(self._path(key), data))

    def open_new(self, key: str) -> NewObject:
        """Begin a large object; nobody sees it before it is committed. See `Storage.open_new`."""
        check_key(key)
        self._refuse_inexclusive()
        upload = self._guard("create", key, lambda driver: driver.upload(self._path(key)))
        with self._lock:
            is_taken = key in self._being_written
            self._being_written.add(key)
        if is_taken:
            self._guard("create", key, lambda driver: upload.drop())
            raise KeyExists(f"{key!r} in {self.url} is being written", key=key)
        return NewObject(self, key, upload)

    def persist(self, folders: Iterable[str]) -> None:
        """Nothing to do: a put that was answered is durable with its name."""

    # reading

    @property
    def read_nbytes(self) -> int:
        """32 MiB, two parts of an upload: to ask costs both sides as much as some MiB. See `Distant`."""
        return 32 << 20

    def read(self, key: str, *, limit: int) -> bytes:
        """The whole value, of at most *limit* bytes. See `Storage.read`."""
        return self.read_version(key, limit=limit)[0]

    def read_into(self, key: str, start: int, into: memoryview) -> int:
        """Fill *into* from byte *start* on, by several requests at once if it is large. See `Storage.read_into`."""
        check_key(key)
        return self._try("read", key, lambda driver: driver.get_into(self._path(key), start, into))

    def read_into_each(self, key: str, start: int, into: Sequence[memoryview]) -> int:
        """Fill *into*, one after the other, by one request. See `Distant`."""
        check_key(key)
        return self._try("read", key, lambda driver: driver.get_each(self._path(key), start, into))

    def read_beginning(self, key: str, into: memoryview) -> tuple[int, int]:
        """Fill *into* from byte 0 on; return how many bytes came, and how many there are. See `Distant`."""
        check_key(key)
        return self._try("read", key, lambda driver: driver.get_beginning(self._path(key), into))

    def size(self, key: str) -> int:
        """Bytes stored under *key*. Raises `KeyMissing`."""
        check_key(key)
        return self._try("read", key, lambda driver: driver.size(self._path(key)))

    def modified_at(self, key: str) -> datetime:
        """When *key* was created, in UTC, by the server's clock and as exactly as it tells. Or `KeyMissing`."""
        told = self._try("look at", check_key(key), lambda driver: driver.modified_at(self._path(key)))
        return told.astimezone(UTC) if told.tzinfo else told.replace(tzinfo=UTC)

    def listing(self, folder: str) -> list[Stored]:
        """Every key below *folder*, sorted: one request for each thousand."""
        path = f"/{check_key(folder)}" if folder else ""
        found = self._try("list", folder, lambda driver: list(driver.walk(f"{self._root()}{path}")))
        keys = ((self._key(name), nbytes) for name, nbytes in found)
        return sorted((Stored(key=k, nbytes=nbytes) for k, nbytes in keys if is_key(k)), key=lambda stored: stored.key)

    def folders(self) -> list[str]:
        """The first parts of all keys that have more than one, sorted; some servers add a folder emptied lately."""
        found = self._try("list", "", lambda driver: driver.children(self._root()))
        return sorted(key for key in map(self._key, found) if is_key(key))

    # changing

    @property
    def can_swap(self) -> bool:
        """Whether `read_version` and `swap` work here."""
        return self._guard("open", "", lambda driver: driver.can_swap)

    def read_version(self, key: str, *, limit: int) -> tuple[bytes, str]:
        """The whole value, and the name of this version of it. See `Swaps`."""
        check_key(key)
        return self._try("read", key, lambda driver: driver.get(self._path(key), limit))

    def swap(self, key: str, data: bytes, *, expected: str) -> None:
        """Put *data* in place of the version *expected*. See `Swaps`."""
        check_key(key)
        try:
            self._try("change", key, lambda driver: driver.swap(self._path(key), data, expected))
        except KeyExists as error:
            raise KeyChanged(f"{key!r} in {self.url} was changed by another", key=key) from error

    # removing

    def delete(self, keys: Iterable[str]) -> None:
        """Remove *keys* in their order, one request each, then their folders, if empty. Missing keys are no error."""
        folders: set[str] = set()
        for key in keys:
            self._delete(check_key(key))
            folders.add(key.rpartition("/")[0])
        for folder in sorted(folders - {""}, key=len, reverse=True):
            self._remove_folder(folder)

    def _delete(self, key: str) -> None:
        self._try("delete", key, lambda driver: driver.delete(self._path(key)))

    def _remove_folder(self, folder: str) -> None:
        self._try("delete", folder, lambda driver: driver.remove_folder(self._path(folder)))

    def remove_temporaries(self, folder: str) -> None:
        """
        Abort uploads below the root that began more than a day ago, wherever in it they are; at most once an hour.

        Unfinished uploads are invisible, in *folder* as elsewhere, but they are stored and paid for.
        """
        if folder:
            check_key(folder)
        now = time.monotonic()
        with self._lock:
            if self._cleaned_at is not None and now - self._cleaned_at < CLEANED_EVERY_S:
                return
            self._cleaned_at = now
        self._try("clean up", folder, lambda driver: driver.remove_stale(self._root(), self._path(_PROBE)))

    # the border

    def _try(self, verb: str, key: str, call: Callable[[Driver], Result]) -> Result:
        """As `_guard`; what failed in passing is called again."""
        return self._guard(verb, key, lambda driver: self._retry(lambda: call(driver), is_transient=is_transient))

    def _guard(self, verb: str, key: str, call: Callable[[Driver], Result]) -> Result:
        """What *call* returns. Whatever the driver raises becomes a `StorageError` without anything secret."""
        try:
            return call(self._connected()[0])
        except StorageError as error:
            failure, cause, error.__traceback__ = error, error.__cause__, None
            failure.key = failure.key or key
        except CkptmanError:
            raise
        except Exception as error:  # noqa: BLE001 - the border: drivers raise what they like
            failure = ours(error, verb, key, self.url, self._secrets)
            cause = without_traceback(error) if is_presentable(error, self._secrets) else None
        raise failure from cause  # outside of the block above, so that no __context__ keeps what may not be shown

    def _refuse_inexclusive(self) -> None:
        if self._is_single:
            return
        self._root()  # after a fork, it forgets what the parent found out
        with self._probing:
            if self._excludes is None:
                self._excludes = excludes(self._probe_put, self._probe_delete)
        if not self._excludes:
            raise StorageError(
                f"{self.url} lets a create-only put overwrite: two writers could lose each other's checkpoints there, "
                "so nothing was written. Use another storage; or, if nobody else ever writes to this root, say "
                "single_writer=True"
            )

    def _probe_put(self, name: str, data: Buffer) -> None:
        self._guard("create", _PROBE + name, lambda driver: driver.put_new(self._path(_PROBE + name), data))

    def _probe_delete(self, name: str) -> None:
        self._try("delete", _PROBE + name, lambda driver: driver.delete(self._path(_PROBE + name)))

    # the filesystem of this process

    def _connected(self) -> tuple[Driver, str]:
        if self._pid != os.getpid():
            self._forget()
        with self._lock:
            if self._made is None:
                self._made = self._connect()
            return self._made

    def _root(self) -> str:
        self._guard("open", "", lambda driver: None)
        return self._connected()[1]

    def _connect(self) -> tuple[Driver, str]:
        protocol = self._whole_url.partition("://")[0].lower()
        if self._filesystem is not None:
            filesystem = self._filesystem()
            root = filesystem._strip_protocol(self._whole_url)
        else:
            options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True, **self._options}
            if protocol in _S3:
                config = {"retries": {"total_max_attempts": 1}, **(options.get("config_kwargs") or {})}
                options["config_kwargs"] = config
            filesystem, root = url_to_fs(self._whole_url, **options)
        return _driver_of(protocol)(filesystem, self._retry), str(root).rstrip("/")

    def _path(self, key: str) -> str:
        return f"{self._root()}/{key}"

    def _key(self, path: str) -> str:
        return path.removeprefix(f"{self._root()}/")

    def _end(self, key: str) -> None:
        with self._lock:
            self._being_written.discard(key)


def _driver_of(protocol: str) -> Callable[[Any, Retry], Driver]:
    if protocol in _S3:
        return S3Driver
    if protocol in _AZURE:
        return AzureDriver
    return GoogleDriver if protocol in _GOOGLE else AnyDriver


class NewObject(Ending[Upload]):
    """A `NewFile` in an `ObjectStorage`; nobody sees it before ``commit``."""

    def __init__(self, storage: ObjectStorage, key: str, upload: Upload) -> None:
        super().__init__(repr(key), upload)
        self._storage = storage
        self._key = key

    def expect(self, nbytes: int) -> None:
        """Prepare for *nbytes* in all; refuse them, before anything is sent, if they can have no place."""
        upload = self._still()
        self._storage._guard("create", self._key, lambda driver: upload.expect(nbytes))

    def write(self, data: Buffer) -> None:
        """Append all of *data*, which may be changed again when this returns."""
        upload = self._still()
        self._storage._guard("create", self._key, lambda driver: upload.write(memoryview(data)))

    def commit(self) -> None:
        """Create the object from what was written, or leave nothing."""
        upload = self._still()
        try:
            self._storage._guard("create", self._key, lambda driver: upload.finish())
        except BaseException:
            self.abort()
            raise
        self._held = None
        self._storage._end(self._key)

    def abort(self) -> None:
        """Drop what was written; does nothing after a commit. What the server will not drop now is cleaned up later."""
        upload, self._held = self._held, None
        if upload is not None:
            self._storage._end(self._key)
            with suppress(Exception):  # an abort never raises
                upload.drop()
