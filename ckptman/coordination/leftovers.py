"""
What dead jobs left of their talk, deleted without touching a live one.

A session is dead when none of its keys changed for `DEAD_AFTER_S`, on the clock of the one who watches: a live one
makes a new beat every few seconds. A job that was stopped for longer and wakes up finds its session gone, and says so.
"""

from __future__ import annotations

import time

from ckptman.storage.base import Storage

FOLDER = "ranks"
DEAD_AFTER_S = 600.0


class Leftovers:
    """Looks at what is there when it is made, and deletes what has not changed since when `sweep` is called."""

    def __init__(self, storage: Storage, *, dead_after_s: float = DEAD_AFTER_S) -> None:
        self._storage = storage
        self._dead_after_s = dead_after_s
        self._began = time.monotonic()
        self._then = _sessions(storage)

    def sweep(self) -> None:
        """Delete what is dead; nothing if too little time has passed. Raises StorageError."""
        if self._then and time.monotonic() - self._began >= self._dead_after_s:
            now = _sessions(self._storage)
            for session, keys in self._then.items():
                if now.get(session) == keys:
                    self._storage.delete(sorted(keys))


def _sessions(storage: Storage) -> dict[str, frozenset[str]]:
    """The keys of each ``ranks/<job>/<session>``."""
    found: dict[str, set[str]] = {}
    for stored in storage.listing(FOLDER):
        folder, _, name = stored.key.rpartition("/")
        found.setdefault(f"{folder}/{name.partition('.')[0]}", set()).add(stored.key)
    return {session: frozenset(keys) for session, keys in found.items()}
