"""
The board that is a folder of a storage: for ranks that share nothing but a filesystem or a bucket.

All keys of a session lie flat in one folder, which is never empty while the session lives, so that no storage removes
it between two of them. Keys are found by listing, never by asking for one: NFS answers from memory for half a minute.
"""

from __future__ import annotations

import errno
import re
import time

from ckptman.errors import StorageError
from ckptman.storage.base import KeyExists, KeyMissing, Storage

GO = "go"
"""The key that lies in the folder for as long as the session lives."""

MAX_VALUE_NBYTES = 1 << 30
TORN_S = 10.0
TRIES = 3

_BEAT = re.compile(r"beat\.([0-9]+)\.([0-9]+)")


class StorageBoard:
    """
    The keys ``<folder>/<session>.…`` of *storage*.

    A value goes with its length before it: a filesystem without hard links shows a file that is still being written.
    """

    def __init__(self, storage: Storage, folder: str, session: str) -> None:
        self._storage = storage
        self._folder = folder
        self._session = session
        self._seen: set[str] = set()  # names, as of the last listing

    @property
    def beat_s(self) -> float:
        """4 seconds: a beat is a file that is made and one that is deleted."""
        return 4.0

    @property
    def max_pause_s(self) -> float:
        """Half a second."""
        return 0.5

    @property
    def keeper(self) -> int | None:
        """None: the storage outlives everybody."""
        return None

    def connect(self) -> StorageBoard:
        """The same board, with a listing of its own."""
        return StorageBoard(self._storage, self._folder, self._session)

    def pin(self, key: str, value: bytes) -> None:
        """Create *key*. See `Board.pin`."""
        if self.pin_first(key, value) != value:
            raise StorageError(
                f"{self._key(key)!r} in {self._storage.url} was written by somebody else: two processes of this job "
                "say that they are the same rank"
            )

    def pin_first(self, key: str, value: bytes) -> bytes:
        """Create *key* unless it is there. See `Board.pin_first`."""
        for tries_left in reversed(range(TRIES)):
            try:
                self._storage.create(self._key(key), len(value).to_bytes(8, "big") + value)
            except KeyExists:
                return self.read(key)  # perhaps ours, and the answer was lost
            except StorageError as error:
                # Another job may just have removed the folder above, which was empty for that moment.
                if error.errno != errno.ENOENT or not tries_left:
                    raise
            else:
                break
        return value

    def has(self, key: str) -> bool:
        """Whether *key* is listed. See `Board.has`."""
        if key not in self._seen:
            self.look()
        return key in self._seen

    def look(self) -> None:
        """List anew. Raises StorageError where the session was removed."""
        start = f"{self._folder}/{self._session}."
        listed = self._storage.listing(self._folder)
        self._seen = {stored.key.removeprefix(start) for stored in listed if stored.key.startswith(start)}
        if GO not in self._seen:
            raise StorageError(
                f"{self._folder!r} in {self._storage.url}, through which the ranks talk, was cleared: this process had "
                "been stopped for so long that another job took it for dead, or somebody deleted it"
            )

    def read(self, key: str) -> bytes:
        """The value, waiting a moment for one that is still being written. See `Board.read`."""
        ends_at = time.monotonic() + TORN_S
        while True:
            data = self._storage.read(self._key(key), limit=MAX_VALUE_NBYTES)
            if len(data) >= 8 and int.from_bytes(data[:8], "big") == len(data) - 8:
                return data[8:]
            if time.monotonic() > ends_at:
                raise StorageError(f"{self._key(key)!r} in {self._storage.url} was not written to its end")
            time.sleep(0.05)

    def remove(self, keys: list[str]) -> None:
        """Delete *keys*."""
        self._storage.delete([self._key(key) for key in keys])
        self._seen.difference_update(keys)

    def beat(self, rank: int, count: int) -> None:
        """Create the beat, then delete the one before it."""
        self.pin(f"beat.{rank}.{count}", b"")
        if count:
            self._storage.delete([self._key(f"beat.{rank}.{count - 1}")])

    def beats(self, ranks: list[int]) -> dict[int, int]:
        """The highest count of each. All were there when the session began, so one without a beat has count -1."""
        self.look()
        found = dict.fromkeys(ranks, -1)
        for rank, count in (map(int, match.groups()) for name in self._seen if (match := _BEAT.fullmatch(name))):
            if rank in found:
                found[rank] = max(found[rank], count)
        return found

    def close(self) -> None:
        """Nothing to let go of."""

    def clear_if_all_left(self, world_size: int) -> None:
        """Delete the session if every rank has left it: the last one out clears up."""
        try:
            self.look()
        except (StorageError, KeyMissing):
            return
        if all(f"left.{rank}" in self._seen for rank in range(world_size)):
            names = sorted(self._seen, key=lambda name: name == GO)  # last: with it, the session is over
            self._storage.delete([self._key(name) for name in names])

    def _key(self, name: str) -> str:
        return f"{self._folder}/{self._session}.{name}"
