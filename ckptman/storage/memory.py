"""The perfect storage: a dictionary. It never fails and forgets only with the process; the model for tests."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from ckptman.errors import StorageError
from ckptman.storage.base import Buffer, KeyExists, KeyMissing, Stored, check_key
from ckptman.storage.ending import Ending


class MemoryStorage:
    """
    Keys and values in memory, empty or with a copy of *values* at first.

    Two objects never share anything, whatever they are called: `open_storage` keeps one for every name.

    Not promised: anything after a fork while another thread uses it.
    """

    def __init__(self, name: str = "", *, values: Mapping[str, bytes] | None = None) -> None:
        self._url = f"memory://{name}"
        self._identity = f"{self._url}#{secrets.token_hex(8)}"
        self._lock = threading.Lock()  # guards the two below
        self._values = {check_key(key): bytes(value) for key, value in (values or {}).items()}
        self._reserved: set[str] = set()  # keys of files that are being written: taken, but not there

    def __repr__(self) -> str:
        return f"<MemoryStorage {self._url} with {len(self._values)} keys>"

    @property
    def url(self) -> str:
        """``memory://`` and the name."""
        return self._url

    @property
    def identity(self) -> str:
        """Unlike that of any other object."""
        return self._identity

    @property
    def lock_path(self) -> Path | None:
        """None: no other process can be here."""
        return None

    def create(self, key: str, data: Buffer) -> None:
        """Store a copy of *data* under the new *key*. See `Storage.create`."""
        check_key(key)
        with self._lock:
            self._refuse_taken(key)
            self._values[key] = bytes(data)

    def open_new(self, key: str) -> NewMemoryFile:
        """Reserve *key*; its value is there once the file is committed. See `Storage.open_new`."""
        check_key(key)
        with self._lock:
            self._refuse_taken(key)
            self._reserved.add(key)
        return NewMemoryFile(self, key)

    def persist(self, folders: Iterable[str]) -> None:
        """Nothing to do: there is nothing that lasts longer."""

    def read(self, key: str, *, limit: int) -> bytes:
        """The whole value, of at most *limit* bytes. See `Storage.read`."""
        value = self._value(key)
        if len(value) > limit:
            raise StorageError(f"{key!r} in {self._url} has {len(value)} bytes, at most {limit} can be right", key=key)
        return value

    def read_into(self, key: str, start: int, into: memoryview) -> int:
        """Fill *into* from byte *start* on; return how many bytes there were. See `Storage.read_into`."""
        part = memoryview(self._value(key))[start : start + len(into)]
        into[: len(part)] = part
        return len(part)

    def size(self, key: str) -> int:
        """Bytes stored under *key*. Raises `KeyMissing`."""
        return len(self._value(key))

    def listing(self, folder: str) -> list[Stored]:
        """Every key below *folder*, sorted."""
        if folder:
            check_key(folder)
        start = f"{folder}/" if folder else ""
        with self._lock:
            return [
                Stored(key=key, nbytes=len(self._values[key])) for key in sorted(self._values) if key.startswith(start)
            ]

    def folders(self) -> list[str]:
        """The first parts of all keys that have more than one, sorted."""
        with self._lock:
            return sorted({key.partition("/")[0] for key in self._values if "/" in key})

    def delete(self, keys: Iterable[str]) -> None:
        """Remove *keys* in their order. Missing keys are no error."""
        for key in keys:
            check_key(key)
            with self._lock:
                self._values.pop(key, None)

    def remove_temporaries(self, folder: str) -> None:
        """Nothing to do: unfinished writes leave nothing behind."""

    def _finish(self, key: str, value: bytes | None) -> None:
        """End the reservation of *key*: with its *value*, or with None."""
        with self._lock:
            self._reserved.discard(key)
            if value is not None:
                self._values[key] = value

    def _refuse_taken(self, key: str) -> None:
        if key in self._values or key in self._reserved:
            raise KeyExists(f"{key!r} in {self._url} is taken, and never overwritten", key=key)

    def _value(self, key: str) -> bytes:
        check_key(key)
        with self._lock:
            value = self._values.get(key)
        if value is None:
            raise KeyMissing(f"there is no {key!r} in {self._url}", key=key)
        return value


class NewMemoryFile(Ending[bytearray]):
    """A `NewFile` in a `MemoryStorage`; nobody sees it before ``commit``."""

    def __init__(self, storage: MemoryStorage, key: str) -> None:
        super().__init__(repr(key), bytearray())
        self._storage = storage
        self._key = key

    def write(self, data: Buffer) -> None:
        """Append all of *data*."""
        self._still().extend(data)

    def commit(self) -> None:
        """Store what was written, all at once."""
        self._storage._finish(self._key, bytes(self._still()))
        self._held = None

    def abort(self) -> None:
        """Forget what was written; does nothing after a commit."""
        if self._held is not None:
            self._storage._finish(self._key, None)
            self._held = None
