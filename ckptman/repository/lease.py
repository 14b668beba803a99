"""
The lock of a root on object stores: ``writer.json``, held by whoever changed it last, as long as it goes on changing.

It keeps writers from wasting each other's work. It does not make a root safe; the catalog does (commit.py).

*Taking.* The document is created, or swapped for ours (compare and swap, so of several only one succeeds), when it says
that it is free, or when it has not changed for `LIFE_S`.

*Expiry* is judged by whoever waits, by the waiter's own monotonic clock: it has seen one version, and no other, for
that long. Nobody compares two clocks, and a waiter that slept sees at once whether the holder lives.

*Keeping.* A thread, ``ckptman-lease``, swaps in a fresh nonce every `RENEW_S`. A lost answer is settled by reading the
nonce back. A storage that is down for a while costs nothing but the chance that another takes over.

*Ending.* The document is never deleted, so its epoch never falls: it is marked free, and a successor goes on at once.
A holder that was killed is succeeded after `LIFE_S`.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Protocol

import msgspec

from ckptman.errors import StorageError
from ckptman.repository.commit import utc_now
from ckptman.storage.base import KeyChanged, KeyExists, KeyMissing, Storage, Swaps

LEASE = "writer.json"
LIFE_S = 30.0
RENEW_S = 10.0
POLL_S = 1.0
MAX_LEASE_NBYTES = 1 << 16

_log = logging.getLogger("ckptman")


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """What ``writer.json`` says: who took the lease last, and whether it is still held."""

    format: int = 1
    epoch: int
    host: str
    pid: int
    since: datetime
    is_held: bool
    nonce: str


class SwappingStorage(Storage, Swaps, Protocol):
    """What a lease needs."""


class Lease:
    """
    The lease of one root, held or free. May be released on another thread than it was taken on.

    Args:
        storage: The root.
        clock: Monotonic seconds.
        sleep: Waits for so many seconds.
        now: The time that others are told.

    Attributes:
        holder: Who had it when we looked last; None if nobody, or if the document cannot be read.
    """

    def __init__(
        self,
        storage: SwappingStorage,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._storage = storage
        self._clock = clock
        self._sleep = sleep
        self._now = now
        self.holder: Holder | None = None
        self._version: str | None = None
        self._mine: Holder | None = None  # the document of ours that lies there, as far as we know
        self._unsettled: Holder | None = None  # one that was to renew it, and may have: nobody said
        self._pid = os.getpid()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="ckptman-lease", daemon=True)

    def acquire(self, timeout_s: float) -> bool:
        """
        Wait up to *timeout_s* seconds for the lease; return whether we hold it, and keep it from then on.

        Raises:
            StorageError: The storage failed. Whether we hold it is not known; nobody keeps it up.
        """
        began = seen_at = self._clock()
        seen: str | None = ""  # no version has this name
        while True:
            self._look()
            at = self._clock()
            if self._version != seen:
                seen, seen_at = self._version, at
            if (self._is_free() or at - seen_at >= LIFE_S) and self._put(self._ours()):
                self._thread.start()
                atexit.register(self.release)
                return True
            left_s = timeout_s - (at - began)
            if left_s <= 0:
                return False
            self._sleep(min(POLL_S, left_s))

    def renew(self) -> bool:
        """
        Show that we are alive; return whether the lease is still ours.

        Raises:
            StorageError: The storage failed. It may still be ours.
        """
        if self._mine is None:
            return False
        # The same one until we know what became of it: with a nonce of its own, the next would take it for another's.
        document = self._unsettled or msgspec.structs.replace(self._mine, nonce=secrets.token_hex(16))
        self._unsettled = document
        is_ours = self._put(document)
        self._unsettled = None
        return is_ours

    def release(self) -> None:
        """Mark the lease free. In a forked child, or where another took it, this does nothing."""
        atexit.unregister(self.release)
        if os.getpid() != self._pid or self._is_over.is_set():
            return
        self._is_over.set()
        self._thread.join()
        try:
            if self._unsettled is not None:
                self.renew()
            if self._mine is None:
                return
            self._put(msgspec.structs.replace(self._mine, nonce=secrets.token_hex(16), is_held=False))
        except (StorageError, RuntimeError) as error:  # RuntimeError: the interpreter is almost gone
            _log.info("%s: the lease could not be marked free, so it lasts %g s more: %s", self.url, LIFE_S, error)

    @property
    def url(self) -> str:
        """Where the root is; credentials redacted."""
        return self._storage.url

    def _keep(self) -> None:
        while not self._is_over.wait(RENEW_S):
            try:
                if not self.renew():
                    _log.warning("%s: another writer took the lease over; the next save will say so", self.url)
                    return
            except StorageError as error:
                _log.info("%s: the lease could not be renewed, trying again in %g s: %s", self.url, RENEW_S, error)

    def _is_free(self) -> bool:
        return self._version is None or (self.holder is not None and not self.holder.is_held)

    def _ours(self) -> Holder:
        return Holder(
            epoch=self.holder.epoch + 1 if self.holder else 1,
            host=socket.gethostname(),
            pid=self._pid,
            since=self._now(),
            is_held=True,
            nonce=secrets.token_hex(16),
        )

    def _put(self, document: Holder) -> bool:
        """
        Whether *document* is there now, in place of what we saw last: what counts is what we read back.

        Raises:
            StorageError: The storage failed, and what was there still is, as far as we know.
        """
        data, failure = msgspec.json.encode(document), None
        try:
            if self._version is None:
                self._storage.create(LEASE, data)
            else:
                self._storage.swap(LEASE, data, expected=self._version)
        except (KeyExists, KeyChanged):
            pass
        except StorageError as error:
            failure = error
        seen = self.holder, self._version
        self._look()
        if self.holder is not None and self.holder.nonce == document.nonce:
            self._mine = document
            return True
        if failure is not None and (self.holder, self._version) == seen:
            raise failure
        if self._mine is not None and self.holder == self._mine:
            raise StorageError(f"{self.url}/{LEASE} could not be changed, though nobody else has changed it", key=LEASE)
        self._mine = None  # another is there: whatever we do from now on must not touch it
        return False

    def _look(self) -> None:
        try:
            data, version = self._storage.read_version(LEASE, limit=MAX_LEASE_NBYTES)
        except KeyMissing:
            self.holder, self._version = None, None
            return
        self._version = version
        try:
            self.holder = msgspec.json.decode(data, type=Holder)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self.holder = None  # held by nobody knows whom: it is taken when it does not change
